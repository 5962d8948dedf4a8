"""The settings that every training has."""

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
