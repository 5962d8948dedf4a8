"""Settings of a generator training."""

from dataclasses import dataclass, field
from typing import Literal

from ...training.config import RunConfig


@dataclass
class GeneratorTrainingConfig(RunConfig):
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
    init_from: str | None = field(
        default=None, metadata={"help": "Pipeline folder or Hub id to start from; its sizes count, not those below."}
    )
    conditioning: Literal["class", "text"] = field(default="class", metadata={"help": "What the images are of."})
    label_column: str = field(default="label", metadata={"help": "Column with class ids."})
    num_classes: int | None = field(default=None, metadata={"help": "Classes, if the column does not name them."})
    caption_templates: dict = field(
        default_factory=lambda: {"{caption}": 1.0},
        metadata={
            "help": "Captions with the columns' names in braces, and their weights; the first one is for tests."
        },
    )
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

    # The text encoder
    text_encoder: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a pretrained text encoder, which is not trained; else a small new one."
        },
    )
    stored_states: bool = field(
        default=False, metadata={"help": "Take the text states that extract_codes stored; templates are '{column}'."}
    )
    prompt_cleaning: Literal["unicode", "released"] | None = field(
        default=None,
        metadata={"help": "How prompts are cleaned. Default: as for init_from or the stored states, else unicode."},
    )
    train_text_encoder: bool = field(
        default=False, metadata={"help": "Also train the text encoder that init_from brings; a new one always is."}
    )
    text_vocab_size: int = field(default=2048, metadata={"help": "Tokens of a new text tokenizer."})
    text_width: int = field(default=256, metadata={"help": "Width of a new text encoder."})
    text_layers: int = field(default=3, metadata={"help": "Layers of a new text encoder."})
    text_heads: int = field(default=4, metadata={"help": "Heads of a new text encoder."})
    text_pretrain_steps: int = field(
        default=0, metadata={"help": "Steps in which a new text encoder learns what its captions look like, first."}
    )
    text_pretrain_learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate of these steps."})

    # Optimization
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak rate of text encoder and projector; learning_rate by default."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Decay of matrices; vectors have none."})
    lora_rank: int = field(
        default=0, metadata={"help": "Train a LoRA adapter of this rank for init_from, in place of all weights."}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's alpha; lora_rank by default."})

    # Results
    sample_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts or classes of the images in samples/; those of 8 rows by default."}
    )
    sampling_defaults: dict = field(default_factory=dict, metadata={"help": "Saved with the pipeline."})

    def __post_init__(self):
        super().__post_init__()
        if self.dropout is None and self.init_from is None:
            self.dropout = 0.1
        if self.lora_rank and self.init_from is None:
            raise ValueError("A LoRA adapter needs weights to adapt: set init_from to a pipeline.")
        if self.stored_states and self.conditioning != "text":
            raise ValueError("stored_states are text states; set conditioning to 'text'.")
