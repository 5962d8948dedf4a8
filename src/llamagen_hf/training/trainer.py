"""What both trainings share: the settings of a run, and the loop that can be stopped anywhere and goes on exactly."""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    find_executable_batch_size,
    gather_object,
    send_to_device,
    set_seed,
)
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn

from ..data.bad_rows import BadRows
from ..data.feed import Feed
from ..data.fingerprint import Inputs, claim_inputs
from ..images.grid import image_grid
from ..processes import on_main_process, this_process
from .checkpoints import latest_checkpoint, remove_run, resume, save_checkpoint
from .record import write_facts


logger = get_logger(__name__)


@dataclass
class RunConfig:
    """Settings that every training has."""

    output_dir: str = field(metadata={"help": "Folder for the result, with checkpoints/ and samples/ below it."})
    max_train_steps: int = field(default=100_000, metadata={"help": "Optimizer steps."})
    num_train_epochs: int | None = field(
        default=None, metadata={"help": "Passes over the rows, in place of max_train_steps; not for streams."}
    )
    batch_size: int = field(default=256, metadata={"help": "Rows of an optimizer step, over all processes."})
    micro_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows of one forward pass of one process; what is missing to batch_size is accumulated."},
    )
    auto_micro_batch_size: bool = field(
        default=False, metadata={"help": "Go on with a smaller micro_batch_size when memory runs out (one process)."}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak rate."})
    lr_scheduler: str = field(default="constant_with_warmup", metadata={"help": "A name diffusers knows."})
    lr_warmup_steps: int = field(default=0, metadata={"help": "Steps of linear warm-up."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's first beta."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping."})
    ema_decay: float = field(
        default=0.9999, metadata={"help": "Decay of the averaged weights, which are saved; 0 saves the weights."}
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16; by default what accelerate launch says."}
    )
    compile: bool = field(default=False, metadata={"help": "Compile the layers with torch.compile."})
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
        for name in ("batch_size", "checkpointing_steps", "checkpoints_total_limit", "log_steps", "eval_steps",
                     "sample_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision is {self.mixed_precision!r}; expected no, bf16 or fp16.")


class Stage(Protocol):
    """What a [`Run`] asks of the training it drives."""

    def train_step(self, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
        """Update the weights with the micro-batches of one step; the values to log, their names always the same."""

    def measure(self) -> dict[str, float]:
        """Metrics on the test split; called on every process, with averaged weights."""

    def draw(self) -> Image.Image:
        """An image of what the model can do by now; called on the main process, with averaged weights."""

    def speed(self, steps_per_second: float) -> dict[str, float]:
        """What to log of the speed."""

    def save(self) -> None:
        """Write the result to the output folder; called on every process, with averaged weights."""

    def facts(self, metrics: dict[str, float]) -> dict:
        """What training.json says of the result; called on the main process."""


class Run:
    """One training: Accelerate's state, the feed, averaged weights, checkpoints, logs and images.

    A run that is killed at any moment and started again ends with the same weights, bit for bit, as one that was not
    (on one machine and device, with the same settings).

    Args:
        config ([`RunConfig`]): Settings.
        micro_batch_size (`int`, *optional*): Rows of one forward pass of one process.
        max_bad_rows (`int`, *optional*, defaults to 0): Rows that may be unusable before the run stops.
    """

    def __init__(self, config: RunConfig, micro_batch_size: int | None = None, max_bad_rows: int = 0):
        self.config = config
        self.output_dir = Path(config.output_dir)
        this_process()
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            # The feed, not a loader of Accelerate's, says which micro-batches make up a step.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            step_scheduler_with_optimizer=False,
            # A discriminator's running means are never read, and exchanging them breaks its second forward pass.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            log_with=config.report_to,
            project_dir=str(self.output_dir),
        )
        if config.report_to is not None and not self.accelerator.log_with:
            raise ValueError(f"report_to is {config.report_to!r}, which is not installed; install it or leave it out.")
        if self.is_sharded and not self.accelerator.is_fsdp2:
            raise ValueError("FSDP 1 is not supported; set fsdp_version to 2.")
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("DeepSpeed is not supported; shard with FSDP 2 (distributed_type: FSDP) instead.")
        processes = self.accelerator.num_processes
        self.micro_batch_size = micro_batch_size or config.micro_batch_size or max(1, config.batch_size // processes)
        if self.is_sharded and config.ema_decay:
            raise ValueError("Averaged weights of a sharded model are not supported; set ema_decay to 0 with FSDP.")
        self.bad_rows = BadRows(max_bad_rows)
        self.ema = None
        set_seed(config.seed)

    @property
    def is_sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"

    def feed(self, rows, make: Callable, collate: Callable, **kwargs) -> Feed:
        """The run's [`Feed`] over `rows`."""
        feed = Feed(
            rows,
            make,
            collate,
            batch_size=self.config.batch_size,
            micro_batch_size=self.micro_batch_size,
            bad_rows=self.bad_rows,
            seed=self.config.seed,
            accelerator=self.accelerator,
            num_workers=self.config.num_workers,
            **kwargs,
        )
        self.accelerator.gradient_accumulation_steps = feed.micro_batches
        return feed

    def begin(self, read_inputs: Callable[[], Inputs], results: Iterable[str]) -> None:
        """See that a checkpoint to go on with was made from the same input; with `overwrite`, remove it.

        Args:
            read_inputs (`Callable[[], Inputs]`): Gives the fingerprints of what the run reads; called on one process.
            results (`Iterable[str]`): As for [`~llamagen_hf.training.checkpoints.remove_run`].

        Raises:
            ValueError: In one sentence, if it was made from something else.
        """

        def claim():
            inputs = read_inputs()
            if self.config.overwrite:
                remove_run(self.output_dir, results)
            goes_on = latest_checkpoint(self.checkpoints) is not None
            # The feed compares numbers of rows, at least, where an earlier version noted nothing.
            claim_inputs(self.output_dir, inputs, goes_on, is_checked_otherwise=True)

        on_main_process(claim)
        self.config.overwrite = False  # what is there from now on is this run's, and stays when memory runs out

    def set_length(self, feed: Feed) -> None:
        """Make `feed` what the run trains on, and find its last step."""
        self.trained = feed
        if self.config.num_train_epochs is None:
            self.last_step = self.config.max_train_steps
        elif feed.is_stream:
            raise ValueError("A stream has no known length; set max_train_steps in place of num_train_epochs.")
        else:
            self.last_step = self.config.num_train_epochs * feed.order.steps_per_epoch

    def start(self, model: nn.Module, *stateful) -> None:
        """Load the newest checkpoint, if there is one, after all that belongs into it is known.

        Args:
            model (`torch.nn.Module`): The module whose averaged weights are saved, prepared and unwrapped.
            stateful: What else belongs into checkpoints.
        """
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if self.config.ema_decay:
            # Warm-up lets short runs forget their first weights.
            self.ema = EMAModel(
                self.parameters, decay=self.config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True
            )
            self.accelerator.register_for_checkpointing(self.ema)
        self.accelerator.register_for_checkpointing(self.trained, self.bad_rows, *stateful)
        set_seed(self.config.seed, device_specific=True)  # from here on, dropout differs between processes
        self.step = resume(self.accelerator, self.checkpoints)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        if self.config.report_to is not None:
            settings = asdict(self.config)
            settings = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers("llamagen", config=settings)

    def train(self, stage: "Stage") -> None:
        """Take the steps that are left."""
        config, losses = self.config, []
        started, counted = time.perf_counter(), 0
        for micro_batches in self.trained if self.step < self.last_step else ():
            losses.append(stage.train_step(send_to_device(micro_batches, self.accelerator.device)))
            if self.ema is not None:
                self.ema.step(self.parameters)
            self.step += 1
            counted += 1
            is_last = self.step == self.last_step

            if self.step % config.checkpointing_steps == 0 or is_last:
                save_checkpoint(self.accelerator, self.checkpoints, self.step, config.checkpoints_total_limit)
            if self.step % config.log_steps == 0 or is_last:
                mean = {name: torch.stack([values[name] for values in losses]).float().mean() for name in losses[0]}
                mean = {name: value.item() for name, value in self.accelerator.reduce(mean, "mean").items()}
                self.log(mean | stage.speed(counted / (time.perf_counter() - started)))
                losses, counted, started = [], 0, time.perf_counter()
            if is_last:  # what is measured and drawn last is the result, once it is saved
                break
            if self.step % config.eval_steps == 0:
                with self.averaged():
                    self.log(stage.measure())
            if self.step % config.sample_steps == 0:
                with self.averaged():
                    self.show(stage.draw)

    def finish(self, stage: "Stage") -> dict[str, float]:
        """Save the result, then draw and measure it, and close the trackers; a fault in the last two loses nothing."""
        with self.averaged():
            stage.save()
            self.write_facts(stage.facts({}))
            self.show(stage.draw)
            metrics = stage.measure()
            self.write_facts(stage.facts(metrics))
        for reasons in gather_object([self.bad_rows.reasons]):  # each process has met rows of its own
            self.bad_rows.reasons |= reasons
        self.log(metrics | {f"bad rows: {reason}": count for reason, count in self.bad_rows.report().items()})
        for tracker in self.accelerator.trackers:  # the processes may have more to do after this training
            tracker.finish()
        return metrics

    def write_facts(self, facts: dict) -> None:
        if self.accelerator.is_main_process:
            write_facts(self.output_dir, facts)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the model has its averaged weights."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def log(self, values: dict[str, float]) -> None:
        """One line of the log, one of `log.jsonl`, and one record of the trackers."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.log(logging.INFO, f"step {self.step}: {shown}")
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with open(self.output_dir / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step} | values) + "\n")
        self.accelerator.log(values, step=self.step)

    def show(self, draw: Callable[[], Image.Image]) -> None:
        """Draw on the main process, keep the image in samples/, and hand it to trackers that take images.

        A sharded model can't be used by one process alone, so it draws nothing.
        """
        if self.is_sharded or not self.accelerator.is_main_process:
            return
        image = draw()
        folder = self.output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"partial-step-{self.step:08d}.png"
        image.save(partial)
        partial.rename(folder / f"step-{self.step:08d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":  # it takes arrays, the others take images
                tracker.log_images({"samples": np.asarray(image)[None]}, step=self.step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"samples": [image]}, step=self.step)


def side_by_side(rows: list[list[Image.Image]]) -> Image.Image:
    """Images of one size in rows of one length."""
    return image_grid([image for row in rows for image in row], columns=len(rows[0]))


def train_with_memory_at_hand(config: RunConfig, train: Callable[[int | None], dict]) -> dict:
    """Call `train(micro_batch_size)`, again with the next smaller divisor of the batch when memory runs out.

    The run goes on from its newest checkpoint. The step stays the same, only in more and smaller parts.
    """
    if not config.auto_micro_batch_size:
        return train(None)
    if this_process().num_processes > 1:  # memory runs out on one, and the others would wait for it
        raise ValueError("auto_micro_batch_size is for one process; set micro_batch_size instead.")
    sizes = [size for size in range(config.batch_size, 0, -1) if config.batch_size % size == 0]
    start = config.micro_batch_size or config.batch_size
    current = [start]

    def smaller() -> int:
        current[0] = next((size for size in sizes if size < current[0]), 0)
        logger.warning(f"Out of memory; going on with micro_batch_size {current[0]}.", main_process_only=False)
        return current[0]

    return find_executable_batch_size(train, starting_batch_size=start, reduce_batch_size_fn=smaller)()
