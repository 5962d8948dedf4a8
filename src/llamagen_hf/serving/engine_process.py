"""The engine's own process: the generator and nothing else, between a pipe's two ends."""

import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
import transformers

from ..llamagen.modeling import LlamaGenForConditionalGeneration
from ..llamagen.serving.batch import ContinuousBatch, Progress
from .engine import GenerationRequest


@dataclass(frozen=True)
class EngineSettings:
    """What a process needs to make a batch.

    Args:
        folder (`str`): Of the generator, that is a checkpoint's `transformer`.
        device (`str`): Where it draws.
        dtype (`str`): Of its weights: float32, float16 or bfloat16.
        slots (`int`, *optional*, defaults to 64): See [`ContinuousBatch`].
        compile (`bool`, *optional*, defaults to `False`): Whether to compile the step.
        threads (`int`, *optional*): Of torch on a CPU.
    """

    folder: str
    device: str = "cpu"
    dtype: str = "float32"
    slots: int = 64
    compile: bool = False
    threads: int | None = None

    def load(self) -> ContinuousBatch:
        """Read the weights."""
        transformers.utils.logging.disable_progress_bar()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = LlamaGenForConditionalGeneration.from_pretrained(self.folder, dtype=getattr(torch, self.dtype))
        batch = ContinuousBatch(model.to(self.device).eval(), self.slots)
        if self.compile:
            batch.compile()
        return batch


def pack(request: GenerationRequest) -> GenerationRequest:
    """Tensors as arrays: torch would share their memory between processes, with a file descriptor for each."""
    if request.prompt_embeds is None:
        return request
    embeds = request.prompt_embeds.cpu().float().numpy()  # numpy knows no bfloat16; float32 holds all of its numbers
    return replace(request, prompt_embeds=embeds, prompt_attention_mask=request.prompt_attention_mask.cpu().numpy())


def unpack(request: GenerationRequest) -> GenerationRequest:
    """The other way."""
    if request.prompt_embeds is None:
        return request
    embeds, mask = torch.from_numpy(request.prompt_embeds), torch.from_numpy(request.prompt_attention_mask)
    return replace(request, prompt_embeds=embeds, prompt_attention_mask=mask)


def run_engine(connection: Connection, settings: EngineSettings) -> None:
    """Load, say "ready", and draw until the pipe closes.

    Received: `("draw", name, request)` and `("cancel", name)`. Sent: `("ready", None)` or `("failed", sentence)`; then
    after each step `("progress", (codes, failures, statistics))`.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the server ends it, when all images are drawn
        signal.signal(number, signal.SIG_IGN)
    try:
        batch = settings.load()
    except (OSError, ValueError) as error:
        connection.send(("failed", str(error)))
        return
    connection.send(("ready", None))

    def report(progress: Progress) -> None:
        statistics = {"drawing": len(batch.images), "waiting": len(batch.waiting), "rows": batch.rows_in_use}
        connection.send(("progress", (dict(progress.codes), progress.failures, statistics)))

    try:
        draw_until_closed(batch, connection, report)
    except (EOFError, OSError):
        pass  # the server is gone


def draw_until_closed(batch: ContinuousBatch, connection: Connection, report: Callable[[Progress], None]) -> None:
    while True:
        while batch.is_idle or connection.poll():
            kind, name, *request = connection.recv()
            if kind == "draw":
                batch.add(name, unpack(request[0]))
            else:
                batch.cancel(name)
                if batch.is_idle:
                    report(Progress())
        report(batch.step())


def spawn(settings: EngineSettings) -> tuple[BaseProcess, Connection]:
    """Start the process; it inherits nothing of this one's threads and devices."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        # A small process that has imported what engines need and done nothing else: the first start takes as long as
        # with "spawn", and an engine that died is back in no time.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    else:
        context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_engine, args=(theirs, settings), name="llamagen-engine", daemon=True)
    process.start()
    theirs.close()  # so that ours tells when the process is gone
    return process, ours
