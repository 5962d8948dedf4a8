"""The settings that every training has, and those of trainings from captions."""

from dataclasses import dataclass, field
from typing import Literal

from ..arguments import FieldError, check_choices


@dataclass
class RunConfig:
    """The settings that every training has."""

    output_dir: str = field(metadata={"help": "Folder for the result, with checkpoints/ and samples/ below it."})
    max_train_steps: int = field(default=100_000, metadata={"help": "Optimizer steps."})
    num_train_epochs: int | None = field(
        default=None, metadata={"help": "Passes over the rows, in place of max_train_steps; not for streams."}
    )
    batch_size: int = field(default=256, metadata={"help": "Rows of an optimizer step, over all processes."})
    micro_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows of one forward pass of one process; gradients accumulate up to batch_size."},
    )
    auto_micro_batch_size: bool = field(
        default=False, metadata={"help": "Go on with a smaller micro_batch_size when memory runs out (one process)."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak rate."})
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = field(default="constant_with_warmup", metadata={"help": "How the rate changes after the warm-up."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first beta."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping."})
    ema_decay: float = field(
        default=0.9999, metadata={"help": "Decay of the averaged weights, which are saved; 0 saves the weights."}
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None,
        metadata={"help": "By default what accelerate launch says, else bf16 on CPUs with instructions for it."},
    )
    compile: bool | None = field(
        default=None,
        metadata={"help": "Use torch.compile. Default: for generators, on a CPU, from 1,000 steps on."},
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations again in the backward pass, to save memory."}
    )
    num_workers: int = field(default=0, metadata={"help": "Processes that load data beside each training process."})
    checkpointing_steps: int = field(default=5000, metadata={"help": "Steps between checkpoints."})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept, at least 1."})
    log_steps: int = field(default=50, metadata={"help": "Steps between log lines."})
    eval_steps: int = field(default=5000, metadata={"help": "Steps between measurements on the test split."})
    sample_steps: int = field(default=5000, metadata={"help": "Steps between images in samples/."})
    report_to: str | None = field(
        default=None, metadata={"help": "A tracker of Accelerate, such as tensorboard, trackio or wandb."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, data order, augmentation and dropout."})
    overwrite: bool = field(
        default=False, metadata={"help": "Start over: remove checkpoints, log and result in output_dir first."}
    )

    def __post_init__(self):
        check_choices(self)
        counts = ("batch_size", "checkpointing_steps", "checkpoints_total_limit", "log_steps", "eval_steps")
        for name in (*counts, "sample_steps"):
            if getattr(self, name) < 1:
                raise FieldError(name, f"{name} is {getattr(self, name)}; it must be at least 1.")


@dataclass
class CaptionTrainingConfig(RunConfig):
    """The settings of a training that reads captions."""

    init_from: str | None = field(
        default=None,
        metadata={"help": "Pipeline folder or Hub id to start from; its sizes count, not those of the recipe."},
    )
    caption_templates: dict = field(
        default_factory=lambda: {"{caption}": 1.0},
        metadata={
            "help": "Captions with the columns' names in braces, and their weights; the first one is for tests."
        },
    )
    text_vocab_size: int = field(default=2048, metadata={"help": "Tokens of a new text tokenizer."})
    text_width: int = field(default=256, metadata={"help": "Width of a new text encoder."})
    text_layers: int = field(default=3, metadata={"help": "Layers of a new text encoder."})
    text_heads: int = field(default=4, metadata={"help": "Heads of a new text encoder."})


@dataclass
class ConditionalTrainingConfig(CaptionTrainingConfig):
    """The settings of a training that draws images from captions, new or from a pipeline, or as an adapter of one."""

    text_encoder: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a pretrained text encoder, which is not trained; else a small new one."
        },
    )
    train_text_encoder: bool = field(
        default=False, metadata={"help": "Also train the text encoder that init_from brings; a new one always is."}
    )
    text_pretrain_steps: int = field(
        default=0, metadata={"help": "Steps in which a new text encoder learns what its captions look like, first."}
    )
    text_pretrain_learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate of these steps."})
    text_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak rate of what reads the text; learning_rate by default."}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Train a LoRA adapter of this rank for init_from, in place of all weights."}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA's alpha; lora_rank by default."})
    sampling_defaults: dict = field(default_factory=dict, metadata={"help": "Saved with the pipeline."})

    def __post_init__(self):
        super().__post_init__()
        if self.lora_rank and self.init_from is None:
            raise ValueError("A LoRA adapter needs weights to adapt: set init_from to a pipeline.")
