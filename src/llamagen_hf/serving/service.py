"""Drawings from order to file: cache, queue, engine, decoder. It knows nothing of HTTP but its errors."""

import asyncio
import hashlib
import io
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass

import torch

from ..inputs import DrawingInputs
from ..parameters import describe
from ..picture_input import open_picture
from ..sampling import check_sampling
from .engine import DrawingRequest, Engine, EngineDied
from .errors import engine_is_away, is_draining, queue_is_full, took_too_long, wrong_value
from .front import Darkroom, Development, FrontPipeline, PictureFile, PromptEncoder
from .metrics import Metrics
from .micro_batches import MicroBatches
from .settings import ServingSettings
from .stores import ResultCache, UrlStore


logger = logging.getLogger(__name__)

MAX_SEED = 2**53 - 1  # what numbers in JSON hold exactly everywhere


@dataclass(frozen=True)
class Order:
    """What a client asks for. `None` is the checkpoint's default, and without a seed each picture gets any."""

    prompt: str | None = None
    class_label: int | str | None = None
    n: int = 1
    seed: int | None = None
    guidance_scale: float | None = None
    guidance_interval: int = -1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    upload: bytes | None = None
    keep_rows: int | None = None
    file: PictureFile = PictureFile()
    partial_images: int = 0
    timeout: float | None = None

    @property
    def inputs(self) -> DrawingInputs:
        """As the pipeline would be asked for one picture, an upload not among it."""
        return DrawingInputs(
            prompt=self.prompt,
            class_labels=self.class_label,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
        )


@dataclass(frozen=True)
class FinishedPicture:
    """A picture for the client: its place in the order, its file, its seed, and how many codes of which kind."""

    index: int
    file: bytes
    seed: int
    condition_tokens: int
    kept_codes: int
    drawn_codes: int
    is_cached: bool

    @property
    def facts(self) -> dict:
        names = ("condition_tokens", "kept_codes", "drawn_codes")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Preview:
    """A partial picture: the place of the picture, its own number, and the file."""

    index: int
    number: int
    file: bytes


class ImageService:
    """Everything behind the HTTP routes.

    Args:
        pipe ([`FrontPipeline`]): Reads prompts and pictures, makes pictures of codes.
        engine ([`Engine`]): Draws codes.
        settings ([`ServingSettings`]): Limits.
    """

    def __init__(self, pipe: FrontPipeline, engine: Engine, settings: ServingSettings):
        self.pipe, self.engine, self.settings = pipe, engine, settings
        self.metrics = Metrics()
        self.cache = ResultCache(settings.cache_bytes)
        self.urls = UrlStore(settings.url_bytes, settings.url_seconds)
        self.pending = 0  # pictures that wait or are being drawn
        self.active = 0  # requests that are being answered
        self.is_draining = False
        self.failure: str | None = None
        self.facts = self.pipe.facts | {"checkpoint": settings.model_name}
        self._seconds_a_picture = 1.0
        self._encode = MicroBatches(PromptEncoder(pipe).encode, 32, "text-encoder")
        self._develop = MicroBatches(Darkroom(pipe).develop, 32, "decoder")
        self._starting: asyncio.Task | None = None

    @property
    def num_codes(self) -> int:
        return self.pipe.transformer.config.num_codes

    @property
    def status(self) -> str:
        """ "ready", or why not."""
        if self.is_draining:
            return "shutting down"
        return "ready" if self.engine.is_ready else "engine not ready"

    @property
    def has_failed(self) -> bool:
        """Whether the server should end, for there will be no engine."""
        return self.failure is not None or self.engine.has_given_up

    def start(self) -> None:
        """Let the engine load; the server answers meanwhile, that it is not ready."""
        self._starting = asyncio.ensure_future(self._start())

    async def _start(self) -> None:
        try:
            await self.engine.start()
        except Exception as error:  # whatever it is, there will be no engine
            logger.error("engine does not start", exc_info=not isinstance(error, (OSError, ValueError, EngineDied)))
            self.failure = str(error)

    async def stop(self) -> None:
        """End the engine and the threads."""
        self._starting.cancel()
        await self.engine.stop()
        self._encode.close()
        self._develop.close()

    def open(self, order: Order) -> "Job":
        """Look into the cache and take places in the queue for the rest; [`Job.start`] is next, without a pause.

        Raises:
            APIError: If there is none, or nobody to draw.
        """
        return Job(self, order)

    def take_places(self, count: int) -> None:
        """Make `count` pictures pending."""
        if self.is_draining:
            raise is_draining()
        if not self.engine.is_ready:
            raise engine_is_away()
        limit = self.settings.max_pending
        if self.pending + count > limit:
            # Places come free one by one, as fast as the engine draws.
            rate = min(self.engine.capacity, limit) / self._seconds_a_picture
            raise queue_is_full(retry_after=min(60.0, (self.pending + count - limit) / rate))
        self.pending += count

    def leave_places(self, count: int) -> None:
        self.pending -= count

    def took(self, seconds: float) -> None:
        """Learn from a picture how long one takes from the first code to the last."""
        self._seconds_a_picture += 0.1 * (seconds - self._seconds_a_picture)

    async def prepare(self, order: Order) -> tuple[DrawingRequest, dict]:
        """Check an order and read its prompt and picture.

        Returns:
            What the engine draws, and the parameters that say so, both for the seed 0.

        Raises:
            APIError: If something does not fit.
        """
        config, inputs = self.pipe.transformer.config, order.inputs
        try:
            if order.upload is not None:
                picture = await asyncio.to_thread(open_picture, io.BytesIO(order.upload))
                rows = config.grid_size // 2 if order.keep_rows is None else order.keep_rows
                inputs.image, inputs.keep_rows = picture, rows
            elif order.keep_rows is not None:
                inputs.keep_rows = order.keep_rows
            inputs.check(config, self.pipe.image_size, self.pipe.tokenizer if self.pipe.text_encoder else None)
            settings = self.pipe.sampling_settings(**inputs.sampling)
            check_sampling(**settings)
            condition = {}
            if self.pipe.is_text_conditional:
                embeds, mask = await self._encode(order.prompt)
                condition = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
            else:
                condition = {"class_id": self.pipe.get_class_ids(order.class_label).item()}
            prefix = None
            if inputs.image is not None:
                prefix = await asyncio.to_thread(self._read_picture, inputs)
        except ValueError as error:
            raise wrong_value(error) from error
        generator = torch.Generator().manual_seed(0)
        (parameters,) = describe(inputs, settings, [generator], prefix, self.facts)
        kept = [] if prefix is None else prefix[0].tolist()
        return DrawingRequest(seed=0, prefix_codes=kept, **condition, **settings), parameters

    @torch.no_grad()
    def _read_picture(self, inputs: DrawingInputs) -> torch.LongTensor:
        return self.pipe.encode_image(inputs.image)[:, : inputs.keep_rows].flatten(1).cpu()

    async def develop(self, codes: list[int], file: PictureFile, parameters: dict) -> bytes:
        """A file of codes."""
        return await self._develop(Development(codes, file, parameters))

    @property
    def decoder_is_late(self) -> bool:
        """Whether pictures wait for the decoder."""
        return len(self._develop) > 0

    def observe(self) -> None:
        """Bring the gauges up to date."""
        self.metrics.pending.set(self.pending)
        self.metrics.active.set(self.active)
        self.metrics.cache_bytes.set(self.cache.bytes)
        self.metrics.url_bytes.set(self.urls.bytes)
        self.metrics.ready.set(self.engine.is_ready)
        for name, value in self.engine.statistics.items():
            self.metrics.engine.labels(name).set(value)


class Job:
    """An order that has its places in the queue. [`start`] it at once: the end of its task gives them back.

    Args:
        service ([`ImageService`]): Who does it.
        order ([`Order`]): What to do.

    Attributes:
        pictures (`list[FinishedPicture | None]`): What is done.
    """

    def __init__(self, service: ImageService, order: Order):
        self.service, self.order = service, order
        self.arrived = time.perf_counter()
        first = order.seed if order.seed is not None else secrets.randbelow(MAX_SEED)
        self.seeds = [first + i for i in range(order.n)]
        self.keys = [self._key(seed) for seed in self.seeds]
        self.pictures = [self._cached(i) for i in range(order.n)] if order.seed is not None else [None] * order.n
        self.missing = [i for i, picture in enumerate(self.pictures) if picture is None]
        self.places = len(self.missing)
        if self.missing:
            service.take_places(self.places)

    def _key(self, seed: int) -> tuple:
        """All that determines a picture's file, with this checkpoint."""
        order = self.order
        settings = self.service.pipe.sampling_settings(**order.inputs.sampling)
        upload = None if order.upload is None else hashlib.sha256(order.upload).digest()
        condition = (order.prompt, type(order.class_label), order.class_label)
        return (*condition, tuple(sorted(settings.items())), seed, upload, order.keep_rows, order.file)

    def _cached(self, index: int) -> FinishedPicture | None:
        found = self.service.cache.get(self.keys[index])
        if found is None:
            return None
        file, facts = found
        return FinishedPicture(index, file, self.seeds[index], **facts, is_cached=True)

    def start(self, report: Callable[[Preview | FinishedPicture], None] = lambda _: None) -> asyncio.Task:
        """Draw what is missing.

        Args:
            report (`Callable`, *optional*): Called with previews and pictures as they come.

        Returns:
            `asyncio.Task`: Its result is a list of [`FinishedPicture`]. It raises an `APIError` if something does not
            fit, the time is over, or the engine dies. Cancelling it ends the work.
        """
        task = asyncio.ensure_future(self._run(report))
        task.add_done_callback(self._close)  # a task that is cancelled early enough never begins
        return task

    def _close(self, task: asyncio.Task) -> None:
        self.service.metrics.cancelled.inc(self.places)
        self.service.leave_places(self.places)

    async def _run(self, report: Callable) -> list[FinishedPicture]:
        service, limit = self.service, self.service.settings.timeout
        timeout = limit if self.order.timeout is None else min(self.order.timeout, limit)
        for picture in self.pictures:
            if picture is not None:
                service.metrics.pictures.labels("cache").inc()
                report(picture)
        try:
            if self.missing:
                await asyncio.wait_for(self._draw_missing(report), timeout)
        except asyncio.TimeoutError as error:
            raise took_too_long(timeout) from error
        except EngineDied as error:
            raise engine_is_away() from error
        return self.pictures

    async def _draw_missing(self, report: Callable) -> None:
        request, parameters = await self.service.prepare(self.order)
        await gather_or_cancel(
            *(self._draw(index, place, request, parameters, report) for place, index in enumerate(self.missing))
        )

    async def _draw(self, index: int, place: int, request: DrawingRequest, parameters: dict, report: Callable) -> None:
        """Draw one picture, with previews, and give its place back."""
        service, order, seed = self.service, self.order, self.seeds[index]
        request = DrawingRequest(**vars(request) | {"seed": seed, "place": place})
        parameters = parameters | {"seed": seed}
        codes, kept = list(request.prefix_codes), len(request.prefix_codes)
        previews = Previews(self, index, kept, parameters, report)
        begin = None
        try:
            async with aclosing(service.engine.draw(request)) as drawn:
                async for new in drawn:
                    begin = begin or time.perf_counter()
                    codes += new
                    previews.consider(codes)
            await previews.finish()
        except ValueError as error:
            raise wrong_value(error) from error
        finally:
            previews.stop()
        service.took(time.perf_counter() - begin)
        file = await service.develop(codes, order.file, parameters)
        if request.class_id is not None:
            tokens = 1
        else:
            tokens = int(request.prompt_attention_mask.sum())
        picture = FinishedPicture(index, file, seed, tokens, kept, service.num_codes - kept, is_cached=False)
        if order.seed is not None:
            service.cache.put(self.keys[index], file, picture.facts)
        service.metrics.pictures.labels("drawn").inc()
        self.pictures[index] = picture
        self.places -= 1
        service.leave_places(1)
        report(picture)


class Previews:
    """The partial pictures of one picture, evenly spread over its codes; the first at least, others as there is time.

    Args:
        job ([`Job`]): What the picture belongs to.
        index (`int`): Which picture of it.
        kept (`int`): Codes that are there from the beginning.
        parameters (`dict`): Of the picture.
        report (`Callable`): Takes them.
    """

    def __init__(self, job: Job, index: int, kept: int, parameters: dict, report: Callable[[Preview], None]):
        self.job, self.index, self.parameters, self.report = job, index, parameters, report
        drawn, count = job.service.num_codes - kept, job.order.partial_images
        self.due = [kept + drawn * (i + 1) // (count + 1) for i in range(count)]
        self.number = 0
        self._task: asyncio.Task | None = None

    def consider(self, codes: list[int]) -> None:
        """Make a preview if one is due."""
        if not self.due or len(codes) < self.due[0] or len(codes) == self.job.service.num_codes:
            return
        while self.due and self.due[0] <= len(codes):
            self.due.pop(0)
        # Pictures and first previews, of whichever request, are worth more than the next preview of this one.
        is_late = self.number > 0 and self.job.service.decoder_is_late
        if (self._task is None or self._task.done()) and not is_late:
            self._task = asyncio.ensure_future(self._make(list(codes)))

    async def _make(self, codes: list[int]) -> None:
        service = self.job.service
        file = await service.develop(codes, self.job.order.file, self.parameters)
        if self.number == 0:
            service.metrics.first_preview.observe(time.perf_counter() - self.job.arrived)
        self.report(Preview(self.index, self.number, file))
        self.number += 1

    async def finish(self) -> None:
        """Wait for the one that is being made; those that were late are left out, the picture itself comes next."""
        if self._task is not None:
            await self._task

    def stop(self) -> None:
        """Leave it at that."""
        if self._task is not None:
            self._task.cancel()


async def gather_or_cancel(*coroutines: Coroutine) -> list:
    """As `asyncio.gather`, but when one fails the others are cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
