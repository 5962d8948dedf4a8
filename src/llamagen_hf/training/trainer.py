"""One loop for every family's training, which can be stopped at any moment and goes on exactly.

A family says what it trains in a [`TrainingTask`]; all else is the same for all of them.
"""

import copy
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

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
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..data.fingerprint import Inputs, claim_inputs
from ..data.loader import StepLoader, batches_once
from ..data.samples import BadRows
from ..files import replacing, write_json
from ..loading.compilation import check_compiler
from ..processes import on_main_process, this_process
from .checkpoints import latest_checkpoint, remove_run, resume, save_checkpoint
from .config import RunConfig
from .hardware import can_compile, fast_precision, memory_in_use, peak_flops, run_sentence
from .record import FACTS_FILE


logger = get_logger(__name__)

COMPILED_FROM = 1000  # steps of a training; compiling takes as long as a few hundred steps of a small model


class TrainingTask(ABC):
    """What a [`Trainer`] trains.

    A task is made from its settings alone. The trainer then calls the methods below, in the order in which they are
    listed and on every process unless they say otherwise. Until the end of [`load`] random weights depend on the seed
    alone; after [`prepare`] each process draws its own random numbers.

    Attributes:
        trainer ([`Trainer`]): The trainer, from [`load`] on.
        results (`tuple[str, ...]`): The files by which loading recognizes the results that [`save`] may write.
        max_bad_rows (`int`, *optional*, defaults to 0): Unusable rows to skip before the training stops.
        flops_per_sample (`float`, *optional*): Arithmetic of a training row, to log how much of the device is used.
        compiles_by_default (`bool`, *optional*, defaults to `False`): Compiling was measured to be faster on a CPU.
    """

    trainer: "Trainer"
    results: tuple[str, ...]
    max_bad_rows: int = 0
    flops_per_sample: float | None = None
    compiles_by_default: bool = False

    @abstractmethod
    def load(self) -> None:
        """Build or load the models, and open the rows."""

    @abstractmethod
    def inputs(self) -> Inputs:
        """Fingerprints of the data and the weights that were loaded; called on the main process."""

    @abstractmethod
    def step_loader(self) -> StepLoader:
        """The training rows, from [`Trainer.step_loader`]."""

    def pretrain(self, steps: Iterable[list[dict]]) -> None:  # noqa: B027 (most have no need of it)
        """Prepare new weights with the training rows; called before the first step only, not when a run resumes."""

    @abstractmethod
    def prepare(self) -> tuple[nn.Module, list]:
        """Prepare models and optimizers with the accelerator, and make their schedulers.

        Returns:
            `tuple[torch.nn.Module, list]`: The module whose averaged weights are the result, in training mode and
            without the accelerator's wrapper; and what else checkpoints hold, such as schedulers, each with a
            `state_dict`.
        """

    @abstractmethod
    def train_step(self, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
        """Take one optimizer step; returns scalars to log, under the same names at each step."""

    def log_values(self, samples_per_second: float) -> dict[str, float]:
        """More values for a line of the training's log; called on every process."""
        return {}

    @abstractmethod
    def measure(self) -> dict[str, float]:
        """Metrics on the test split, empty if there is none; called with averaged weights."""

    @abstractmethod
    def draw_samples(self) -> Image.Image:
        """An image of what the model does so far; called on the main process, with averaged weights."""

    @abstractmethod
    def save(self) -> None:
        """Write the result to the output folder; called with averaged weights."""

    @abstractmethod
    def facts(self, metrics: dict[str, float]) -> dict:
        """The content of training.json, with what [`measure`] returned if it was called; on the main process."""


class Trainer:
    """Trains a task: Accelerate's state, averaged weights, checkpoints, logs and images.

    A run that is killed at any moment and started again ends with the same weights, bit for bit, as one that was not
    (on one machine and device, with the same settings).

    Args:
        config ([`RunConfig`]): Settings.
        task ([`TrainingTask`]): What to train. Each attempt works on a copy, `trainer.task`.

    Example:

    ```python
    metrics = Trainer(config, task).fit()
    ```
    """

    def __init__(self, config: RunConfig, task: TrainingTask):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.checkpoints = self.output_dir / "checkpoints"
        self._task, self._overwrite = task, config.overwrite

    def fit(self) -> dict[str, float]:
        """Train from the newest checkpoint on, if there is one; then save, draw and measure the result.

        With `auto_micro_batch_size`, training resumes with the next smaller divisor of the batch when memory runs
        out. A step stays the same, only in more and smaller parts.

        Returns:
            `dict[str, float]`: What the task measured at the end.

        Raises:
            ValueError: Settings, data and models do not fit each other, or the output folder holds another run.
            OSError: A checkpoint or the result can't be written.
        """
        config = self.config
        if not config.auto_micro_batch_size:
            return self._fit(None)
        if this_process().num_processes > 1:  # memory runs out on one, and the others would wait for it
            raise ValueError("auto_micro_batch_size is for one process; set micro_batch_size instead.")
        size = config.micro_batch_size or config.batch_size

        def reduce() -> int:
            nonlocal size
            size = next((part for part in range(size - 1, 0, -1) if config.batch_size % part == 0), 0)
            logger.warning(f"Out of memory; going on with micro_batch_size {size}.", main_process_only=False)
            return size

        return find_executable_batch_size(self._fit, starting_batch_size=size, reduce_batch_size_fn=reduce)()

    def _fit(self, micro_batch_size: int | None) -> dict[str, float]:
        self.setup(micro_batch_size)
        self.train()
        return self.finish()

    def setup(self, micro_batch_size: int | None = None) -> None:
        """Get everything ready for [`train`], and load the newest checkpoint, if there is one.

        Args:
            micro_batch_size (`int`, *optional*): Rows of one forward pass of one process; that of the settings, or as
                many as a step has, by default.
        """
        config = self.config
        # What an attempt that ran out of memory holds must be free before the next one begins.
        self.task, self.model, self.parameters, self.ema = copy.copy(self._task), None, [], None
        self.task.trainer = self
        self.accelerator = self._build_accelerator()
        self.device = self.accelerator.device
        share = max(1, config.batch_size // self.accelerator.num_processes)
        self.micro_batch_size = micro_batch_size or config.micro_batch_size or share
        self.bad_rows = BadRows(self.task.max_bad_rows)
        if config.compile:
            check_compiler(self.device)
        set_seed(config.seed)
        self.task.load()
        self.steps = self.task.step_loader()
        self.accelerator.gradient_accumulation_steps = self.steps.micro_batches
        self.last_step = config.max_train_steps
        if config.num_train_epochs is not None:
            self.last_step = config.num_train_epochs * self.steps.steps_per_epoch
        on_main_process(self._claim_output)
        self._overwrite = False  # from now on, what is there is this run's, and stays when memory runs out
        accelerator = self.accelerator
        logger.info(run_sentence(self.device, accelerator.num_processes, accelerator.mixed_precision, self.compiles))
        if latest_checkpoint(self.checkpoints) is None:
            self.task.pretrain(self.steps)
            self.steps.restart()

        self.model, stateful = self.task.prepare()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if config.ema_decay:
            # Warm-up lets short runs forget their first weights.
            self.ema = EMAModel(self.parameters, decay=config.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
            self.accelerator.register_for_checkpointing(self.ema)
        self.accelerator.register_for_checkpointing(self.steps, self.bad_rows, *stateful)
        set_seed(config.seed, device_specific=True)  # from here on, dropout differs between processes
        self.step = resume(self.accelerator, self.checkpoints)
        if self.ema is not None:
            self.ema.to(self.device)
        if config.report_to is not None:
            settings = {name: value for name, value in asdict(config).items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers("llamagen", config=settings)

    def _build_accelerator(self) -> Accelerator:
        config, precision = self.config, self.config.mixed_precision
        device = this_process().device
        if precision is None and "ACCELERATE_MIXED_PRECISION" not in os.environ:
            precision = fast_precision(device)
        accelerator = Accelerator(
            mixed_precision=precision,
            # The step loader, not a loader of Accelerate's, says which micro-batches make up a step.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            step_scheduler_with_optimizer=False,
            # A discriminator's running means are never read, and exchanging them breaks its second forward pass.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            log_with=config.report_to,
            project_dir=str(self.output_dir),
        )
        if config.report_to is not None and not accelerator.log_with:
            raise ValueError(f"report_to is {config.report_to!r}, which is not installed; install it or leave it out.")
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("DeepSpeed is not supported; shard with FSDP 2 (distributed_type: FSDP) instead.")
        if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise ValueError("FSDP 1 is not supported; set fsdp_version to 2.")
        if accelerator.distributed_type == DistributedType.FSDP and config.ema_decay:
            raise ValueError("Averaged weights of a sharded model are not supported; set ema_decay to 0 with FSDP.")
        return accelerator

    def _claim_output(self) -> None:
        """Check that a checkpoint to resume from was made from the same input; with `overwrite`, remove it."""
        inputs = self.task.inputs()
        if self._overwrite:
            remove_run(self.output_dir, self.task.results)
        goes_on = latest_checkpoint(self.checkpoints) is not None
        # Where an earlier version recorded no inputs, the step loader still compares the number of rows.
        claim_inputs(self.output_dir, inputs, goes_on, is_checked_otherwise=True)

    def train(self) -> None:
        """Take the steps that are left."""
        config, losses = self.config, []
        started, counted = time.perf_counter(), 0
        for micro_batches in self.steps if self.step < self.last_step else ():
            losses.append(self.task.train_step(send_to_device(micro_batches, self.device)))
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
                self.log(mean | self._throughput(counted / (time.perf_counter() - started)))
                losses, counted, started = [], 0, time.perf_counter()
            if is_last:  # what is measured and drawn last is the result, once it is saved
                break
            if self.step % config.eval_steps == 0:
                with self.averaged():
                    self.log(self.task.measure())
            if self.step % config.sample_steps == 0:
                with self.averaged():
                    self._draw_samples()

    def _throughput(self, steps_per_second: float) -> dict[str, float]:
        samples = steps_per_second * self.config.batch_size
        values = {"images/s": samples} | self.task.log_values(samples)
        if self.task.flops_per_sample and (peak := peak_flops(self.device)):
            values["mfu"] = samples * self.task.flops_per_sample / (peak * self.accelerator.num_processes)
        return values | {"memory_gb": memory_in_use(self.device) / 1e9}

    def finish(self) -> dict[str, float]:
        """Save the result, then draw and measure it; a failure of the last two loses nothing."""
        with self.averaged():
            self.task.save()
            self._write_facts({})
            self._draw_samples()
            metrics = self.task.measure()
            self._write_facts(metrics)
        for reasons in gather_object([self.bad_rows.reasons]):  # each process has met rows of its own
            self.bad_rows.reasons |= reasons
        self.log(metrics | {f"bad rows: {reason}": count for reason, count in self.bad_rows.report().items()})
        for tracker in self.accelerator.trackers:  # the processes may have more to do after this training
            tracker.finish()
        return metrics

    def _write_facts(self, metrics: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            write_json(self.output_dir / FACTS_FILE, self.task.facts(metrics))

    def _draw_samples(self) -> None:
        """Write an image to samples/ on the main process, and send it to trackers that take images.

        A sharded model can't be used by one process alone, so it draws nothing.
        """
        if self.is_sharded or not self.accelerator.is_main_process:
            return
        image = self.task.draw_samples()
        folder = self.output_dir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"step-{self.step:08d}.png") as partial:
            image.save(partial, "PNG")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":  # it takes arrays, the others take images
                tracker.log_images({"samples": np.asarray(image)[None]}, step=self.step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"samples": [image]}, step=self.step)

    # What tasks use.

    @property
    def compiles(self) -> bool:
        """Whether the task compiles its model: as set, or by default where it pays."""
        pays = self.task.compiles_by_default and self.last_step >= COMPILED_FROM and can_compile(self.device)
        return pays if self.config.compile is None else self.config.compile

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the weights (FSDP)."""
        return self.accelerator.distributed_type == DistributedType.FSDP

    def step_loader(self, rows, make: Callable, collate: Callable, **kwargs) -> StepLoader:
        """The [`~llamagen_hf.data.loader.StepLoader`] of `rows` for this run; arguments as there."""
        sizes = {"batch_size": self.config.batch_size, "micro_batch_size": self.micro_batch_size}
        options = {"seed": self.config.seed, "num_workers": self.config.num_workers, **kwargs}
        return StepLoader(
            rows, make, collate, bad_rows=self.bad_rows, accelerator=self.accelerator, **sizes, **options
        )

    def batches_once(self, rows, make: Callable, collate: Callable) -> Iterator[dict]:
        """Batches of this process's part of a split, once through; arguments as for the step loader."""
        split = (self.accelerator.process_index, self.accelerator.num_processes)
        if self.is_sharded:  # all processes must take the same number of steps, so each of them takes all
            split = (0, 1)
        return batches_once(rows, make, collate, self.micro_batch_size, *split)

    def scheduler(self, optimizer: torch.optim.Optimizer, num_steps: int | None = None) -> LRScheduler:
        """The settings' learning rate scheduler for `num_steps` steps, by default for the whole training."""
        name, warmup = self.config.lr_scheduler, self.config.lr_warmup_steps
        return get_scheduler(name, optimizer, None, warmup, self.last_step if num_steps is None else num_steps)

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        """Propagate a loss backward, and after the last micro-batch clip the gradients and take the optimizer's step.

        Call it within `accelerator.accumulate(model)`.
        """
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it, the model is in evaluation mode and has its averaged weights."""
        self.model.eval()
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.restore(self.parameters)
            self.model.train()

    def log(self, values: dict[str, float]) -> None:
        """Write one line of the log, one of `log.jsonl`, and one record of the trackers."""
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.log(logging.INFO, f"step {self.step}: {shown}")
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with open(self.output_dir / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step} | values) + "\n")
        self.accelerator.log(values, step=self.step)
