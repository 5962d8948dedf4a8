"""Settings of a generator training."""

from dataclasses import dataclass, field
from typing import Literal

from ...arguments import FieldError
from ...training.config import ConditionalTrainingConfig


@dataclass
class GeneratorTrainingConfig(ConditionalTrainingConfig):
    """A recipe's section `generator`: [`~llamagen_hf.llamagen.training.generator_trainer.train_generator`]'s settings.

    The defaults are LlamaGen's on ImageNet, except `ema_decay`: the released training does not average its weights.

    A generator is class- or text-conditional. It is new or starts from the weights of another pipeline, at the same or
    at another grid size, since rotary positions have no parameters. All weights are trained, or a LoRA adapter alone.
    """

    # Data and conditions
    codes_dir: str = field(
        kw_only=True, metadata={"help": "Folder that extract_codes wrote, or the Hub id of published codes."}
    )
    vq_model: str = field(
        kw_only=True,
        metadata={
            "help": "Folder or Hub id of the image tokenizer that wrote the codes, or of a pipeline with it.",
            "aliases": ["--tokenizer"],  # its name in earlier versions
        },
    )
    conditioning: Literal["class", "text"] = field(default="class", metadata={"help": "What the images are of."})
    label_column: str = field(default="label", metadata={"help": "Column with class ids."})
    num_classes: int | None = field(default=None, metadata={"help": "Classes, if the column does not name them."})
    max_bad_rows: int = field(
        default=0, metadata={"help": "Rows without a caption or with a wrong label to skip before the run stops."}
    )

    # The Llama
    variant: Literal["B", "L", "XL", "XXL", "XXXL", "1B", "3B", "7B"] | None = field(
        default=None, metadata={"help": "LlamaGen's sizes by name, in place of the four below."}
    )
    hidden_size: int = field(default=768, metadata={"help": "Width of the Llama."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of its SwiGLU."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Layers of the Llama."})
    num_attention_heads: int = field(default=12, metadata={"help": "Heads of the Llama."})
    condition_length: int = field(default=120, metadata={"help": "Positions of a prompt."})
    new_condition: bool = field(
        default=False,
        metadata={
            "help": "Take only the layers and the codes' embeddings of init_from; what reads the condition is new, so "
            "it may be of another kind, width or length."
        },
    )
    condition_rotary: Literal["zero", "identity"] | None = field(
        default=None,
        metadata={
            "help": "Rotary embedding of the condition, see LlamaGenConfig. Default: as for init_from, else identity "
            "for text and zero for classes."
        },
    )
    dropout: float | None = field(
        default=None, metadata={"help": "Embedding, residual and FFN dropout. Default: as for init_from, else 0.1."}
    )
    condition_dropout: float = field(default=0.1, metadata={"help": "Chance of the null condition."})
    code_noise: float = field(
        default=0.0,
        metadata={
            "help": "Largest share of an image's input codes that are replaced by random ones; each image draws its "
            "own share from 0 on. So the generator relies on its condition and recovers from its own mistakes (word "
            "dropout, arXiv 1511.06349)."
        },
    )

    # Prompts
    stored_states: bool = field(
        default=False,
        metadata={
            "help": "Take the states that extract_codes stored: templates are '{column}', or '{image}' for embeddings."
        },
    )
    prompt_cleaning: Literal["unicode", "released"] | None = field(
        default=None,
        metadata={"help": "How prompts are cleaned. Default: as for init_from or the stored states, else unicode."},
    )

    # Optimization
    weight_decay: float = field(default=0.05, metadata={"help": "Decay of matrices; vectors have none."})

    # Results
    sample_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts or classes of the images in samples/; those of 8 rows by default."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.new_condition and (self.init_from is None or self.lora_rank):
            raise ValueError("new_condition trains all weights of a pipeline: set init_from, and no lora_rank.")
        if self.dropout is None and self.init_from is None:
            self.dropout = 0.1
        if not 0 <= self.code_noise <= 1:
            raise FieldError("code_noise", f"code_noise is {self.code_noise}; expected a number from 0 to 1.")
        if self.stored_states and self.conditioning != "text":
            raise ValueError("stored_states stand in place of text; set conditioning to 'text'.")
