"""Settings of the training of a prior."""

from dataclasses import dataclass, field
from typing import Literal

from ...arguments import FieldError
from ...training.config import RunConfig


@dataclass
class PriorTrainingConfig(RunConfig):
    """A recipe's section `prior`: the settings of [`~llamagen_hf.unclip.training.prior_trainer.train_prior`].

    The prior is new, or starts from the weights of another one. CLIP is frozen; it encodes images and captions of each
    batch anew.
    """

    adam_beta2: float = field(default=0.99, metadata={"help": "AdamW's second beta."})

    # What is trained
    clip: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the CLIP model whose image embeddings to draw."}
    )
    kind: Literal["diffusion", "autoregressive"] = field(
        default="diffusion", metadata={"help": "Whether the prior denoises embeddings or writes their codes."}
    )
    init_from: str | None = field(
        default=None,
        metadata={"help": "Prior to start from, a folder or Hub id; its kind, sizes, statistics and CLIP count."},
    )

    # The transformer
    num_layers: int = field(default=6, metadata={"help": "Layers."})
    num_attention_heads: int = field(default=6, metadata={"help": "Attention heads."})
    attention_head_dim: int = field(
        default=64, metadata={"help": "Width of an attention head; in codes a multiple of 4."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout in all layers."})
    grid_size: int = field(
        default=6,
        metadata={"help": "An autoregressive prior writes grid_size**2 codes, at most the embeddings' width."},
    )
    num_buckets: int = field(default=1024, metadata={"help": "Codes of each dimension of an autoregressive prior."})
    statistics_rows: int = field(
        default=100_000,
        metadata={"help": "Training rows that mean and deviation, or the quantizer, are measured on at the start."},
    )

    # Captions
    caption_templates: dict = field(
        default_factory=lambda: {"{caption}": 1.0},
        metadata={
            "help": "Captions with the columns' names in braces, and their weights; the first one is for tests."
        },
    )
    condition_dropout: float = field(default=0.1, metadata={"help": "Chance of no caption, for guidance."})
    truncate_captions: bool = field(
        default=False, metadata={"help": "Cut captions that are longer than CLIP reads; else such rows are skipped."}
    )

    # Optimization and results
    weight_decay: float = field(default=0.06, metadata={"help": "Decay of matrices; vectors have none."})
    eval_rows: int = field(
        default=100, metadata={"help": "Test rows that embeddings are drawn for, and among which they are looked up."}
    )
    sampling_defaults: dict = field(default_factory=dict, metadata={"help": "Saved with the pipeline."})

    def __post_init__(self):
        super().__post_init__()
        if (self.clip is None) == (self.init_from is None):
            raise FieldError("clip", "Set either clip, for a new prior, or init_from, which brings its own.")
        if not 0 <= self.condition_dropout <= 1:
            raise FieldError(
                "condition_dropout", f"condition_dropout is {self.condition_dropout}; expected a number from 0 to 1."
            )
        counts = ("num_layers", "num_attention_heads", "attention_head_dim", "grid_size", "statistics_rows")
        for name in (*counts, "eval_rows"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_buckets < 2:
            raise FieldError("num_buckets", f"num_buckets is {self.num_buckets}; it must be at least 2.")
