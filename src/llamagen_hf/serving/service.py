"""From requests to image files: cache, queue, engine, decoder. Of HTTP it knows only the errors."""

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace

from .batcher import Batcher
from .engine import Engine, EngineDied, EngineRequest
from .errors import APIError, engine_is_away, is_draining, wrong_value
from .frontend import Frontend, ImageRequest, TokenCounts
from .metrics import Metrics
from .result_cache import ResultCache, UrlStore
from .settings import ServingSettings


logger = logging.getLogger(__name__)

MAX_SEED = 2**53 - 1  # the largest integer that every reader of JSON holds exactly


@dataclass(frozen=True)
class GeneratedImage:
    """An image for the client: its index in the request, file, seed and size; `partial_index` counts its previews."""

    index: int
    file: bytes
    seed: int
    tokens: TokenCounts
    partial_index: int | None = None


class ImageService:
    """Everything behind the HTTP routes.

    Args:
        frontend ([`Frontend`]): Prepares requests and decodes images.
        engine ([`Engine`]): Generates latents.
        settings ([`ServingSettings`]): Limits.
    """

    def __init__(self, frontend: Frontend, engine: Engine, settings: ServingSettings):
        self.frontend, self.engine, self.settings = frontend, engine, settings
        self.metrics = Metrics()
        self.cache = ResultCache(settings.cache_bytes)
        self.urls = UrlStore(settings.url_bytes, settings.url_seconds)
        self.pending = 0  # images that wait or are being generated
        self.active = 0  # requests that are being answered
        self.is_draining = False
        self.failure: str | None = None
        # Moving averages: from the first latent to the last, and of the decoder's work, where images come in turn.
        self.seconds_per_image = 1.0
        self.decoder_seconds_per_image = 0.0
        self._decoder_seconds = 0.0  # since the last image that it finished
        self.encode_prompt = Batcher(frontend.encode_prompts, "text-encoder")
        self.add_conditions = Batcher(frontend.add_conditions, "conditions")
        self.write_file = Batcher(self._write_files, "decoder")
        self._starting: asyncio.Task | None = None

    @property
    def status(self) -> str:
        """ "ready", or why not."""
        if self.is_draining:
            return "shutting down"
        return "ready" if self.engine.is_ready else "engine not ready"

    @property
    def has_failed(self) -> bool:
        """Whether the server should end, because there will be no engine."""
        return self.failure is not None or self.engine.has_given_up

    def start(self) -> None:
        """Let the engine load. Meanwhile the server answers that it is not ready."""
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
        self.encode_prompt.close()
        self.add_conditions.close()
        self.write_file.close()

    async def check_prompt(self, request: ImageRequest) -> str | None:
        """A sentence on the end of a prompt that the checkpoint does not read; `None` if it reads all of it.

        Raises:
            APIError: If the checkpoint can read nothing of the prompt.
        """
        if not request.prompt or self.frontend.pipe.condition_kind != "text":
            return None
        loss = await asyncio.to_thread(self.frontend.find_loss, request.prompt)
        if loss is not None and loss.is_total:
            param = request.field_names.get("prompt", "prompt")
            raise APIError(400, loss.sentence, param=param, code="unreadable_prompt")
        return loss and loss.sentence

    def _write_files(self, items: list[tuple[list, EngineRequest, ImageRequest, dict]]) -> list[bytes]:
        """Files of latents, of all or the first ones, and the requests and parameters that belong to them."""
        start = time.perf_counter()
        images = self.frontend.decode([(prepared, latents) for latents, prepared, *_ in items])
        files = [
            request.write(image, parameters) for image, (_, _, request, parameters) in zip(images, items, strict=True)
        ]
        self._decoder_seconds += time.perf_counter() - start
        count = sum(len(latents) == self.frontend.count_tokens(prepared).output for latents, prepared, *_ in items)
        if count:  # the time of previews counts as that of the images that follow them
            share = 1 - 0.9**count if self.decoder_seconds_per_image else 1.0
            new, self._decoder_seconds = self._decoder_seconds / count, 0.0
            self.decoder_seconds_per_image += share * (new - self.decoder_seconds_per_image)
        return files

    def seconds_until_free(self, places: int) -> float:
        """About how long it takes until so many places of the queue are free, which they become one by one.

        Engine and decoder, which also enlarges images, work side by side; the slower one sets the pace.
        """
        engine = self.seconds_per_image / min(self.engine.capacity, self.settings.max_pending)
        return places * max(engine, self.decoder_seconds_per_image)

    def observe(self) -> None:
        """Update the gauges."""
        self.metrics.pending.set(self.pending)
        self.metrics.active.set(self.active)
        self.metrics.cache_bytes.set(self.cache.bytes)
        self.metrics.url_bytes.set(self.urls.bytes)
        self.metrics.ready.set(self.engine.is_ready)
        for name, value in self.engine.statistics.items():
            self.metrics.engine.labels(name).set(value)


class ActiveRequest:
    """A request that is being answered. It looks up images in the cache and queues those that are missing.

    Call [`start`] at once: the end of its task frees the places in the queue.

    Args:
        service ([`ImageService`]): The service.
        request ([`ImageRequest`]): The request.

    Attributes:
        images (`list[GeneratedImage | None]`): The images that are done.
        missing (`list[int]`): Indices of images that the cache did not have.

    Raises:
        APIError: If the queue is full, or the engine is not ready.
    """

    def __init__(self, service: ImageService, request: ImageRequest):
        self.service, self.request = service, request
        self.arrived = time.perf_counter()
        first = request.seed if request.seed is not None else secrets.randbelow(MAX_SEED)
        self.seeds = [first + i for i in range(request.n)]
        settings = service.frontend.resolve_settings(request.settings)
        uploads = (request.upload, request.mask, request.variation_of)
        uploads = [file and hashlib.sha256(file).digest() for file in uploads]
        # All that determines a file, with this checkpoint, but for the seed.
        self.key = (request.prompt, type(request.class_label), request.class_label, tuple(sorted(settings.items())))
        self.key += (*uploads, request.output_format, request.quality, request.side)
        self.images = [self._cached(i) for i in range(request.n)]
        self.missing = [i for i, image in enumerate(self.images) if image is None]
        self.places = len(self.missing)
        if self.missing:
            self._enqueue()

    def _enqueue(self) -> None:
        service, limit = self.service, self.service.settings.max_pending
        if service.is_draining:
            raise is_draining()
        if not service.engine.is_ready:
            raise engine_is_away()
        if service.pending + self.places > limit:
            seconds = min(60.0, service.seconds_until_free(service.pending + self.places - limit))
            raise APIError(429, "The queue is full; try again later.", code="queue_full", retry_after=seconds)
        service.pending += self.places

    def _cached(self, index: int) -> GeneratedImage | None:
        found = None
        if self.request.seed is not None:
            found = self.service.cache.get((*self.key, self.seeds[index]))
        return found and GeneratedImage(index, found[0], self.seeds[index], found[1])

    def start(self, report: Callable[[GeneratedImage], None] = lambda _: None) -> asyncio.Task:
        """Generate the images that are missing.

        Args:
            report (`Callable`, *optional*): Called with each image, partial ones among them, as it comes.

        Returns:
            `asyncio.Task`: Its result is a list of [`GeneratedImage`]. It raises an `APIError` if something does not
            fit the checkpoint, the time is over, or the engine dies. Cancelling it ends the work.
        """
        task = asyncio.ensure_future(self._run(report))
        task.add_done_callback(self._close)  # a task that is cancelled early enough never begins
        return task

    def _close(self, task: asyncio.Task) -> None:
        self.service.metrics.cancelled.inc(self.places)
        self.service.pending -= self.places

    async def _run(self, report: Callable) -> list[GeneratedImage]:
        limit = self.service.settings.timeout
        timeout = limit if self.request.timeout is None else min(self.request.timeout, limit)
        for image in self.images:
            if image is not None:
                self.service.metrics.images.labels("cache").inc()
                report(image)
        try:
            if self.missing:
                await asyncio.wait_for(self._generate_missing(report), timeout)
        except asyncio.TimeoutError as error:
            raise APIError(504, f"The request was not done after {timeout:g} seconds.", code="timeout") from error
        except EngineDied as error:
            raise engine_is_away() from error
        return self.images

    async def _generate_missing(self, report: Callable) -> None:
        frontend, request, states = self.service.frontend, self.request, None
        try:
            if frontend.pipe.condition_kind == "text" and request.prompt is not None:
                states = await self.service.encode_prompt(request.prompt)
            prepared, parameters = await asyncio.to_thread(frontend.prepare, request, states)
        except ValueError as error:
            raise wrong_value(error, request.field_names) from error
        parameters["checkpoint"] = self.service.settings.model_name
        await gather_or_cancel(
            *(
                self._generate(
                    index,
                    replace(prepared, seed=self.seeds[index], place=place),
                    parameters | {"seed": self.seeds[index]},
                    report,
                )
                for place, index in enumerate(self.missing)
            )
        )

    async def _generate(self, index: int, prepared: EngineRequest, parameters: dict, report: Callable) -> None:
        """Generate one image with its previews, and free its place in the queue."""
        service, request = self.service, self.request
        try:
            prepared = await service.add_conditions(prepared)
        except ValueError as error:
            raise wrong_value(error, request.field_names) from error
        parameters = service.frontend.complete(prepared, parameters)
        tokens, latents, start = service.frontend.count_tokens(prepared), [], None

        async def write(latents: list, partial_index: int | None = None) -> GeneratedImage:
            file = await service.write_file((latents, prepared, request, parameters))
            return GeneratedImage(index, file, self.seeds[index], tokens, partial_index)

        async def show(latents: list, number: int) -> None:
            image = await write(latents, number)
            if number == 0:
                service.metrics.first_preview.observe(time.perf_counter() - self.arrived)
            report(image)

        # Previews are spread evenly over the steps. One is made at a time, and those that come too early are left out.
        due = [tokens.output * (i + 1) // (request.partial_images + 1) for i in range(request.partial_images)]
        number, preview = 0, None
        try:
            async with aclosing(service.engine.generate(replace(prepared, finishing=None))) as steps:
                async for new in steps:
                    start = start or time.perf_counter()
                    latents += new
                    is_due = due and due[0] <= len(latents) < tokens.output
                    due = [step for step in due if step > len(latents)]
                    # Images and first previews, of whichever request, come before the next preview of this one.
                    is_late = number > 0 and len(service.write_file) > 0
                    if is_due and (preview is None or preview.done()) and not is_late:
                        preview = asyncio.ensure_future(show(list(latents), number))
                        number += 1
            if preview is not None:
                await preview
        except ValueError as error:
            raise wrong_value(error, request.field_names) from error
        finally:
            if preview is not None:
                preview.cancel()
        service.seconds_per_image += 0.1 * (time.perf_counter() - start - service.seconds_per_image)
        image = await write(latents)
        if request.seed is not None:
            service.cache.put((*self.key, image.seed), image.file, tokens)
        service.metrics.images.labels("drawn").inc()
        self.images[index] = image
        self.places -= 1
        service.pending -= 1
        report(image)


async def gather_or_cancel(*coroutines: Coroutine) -> list:
    """As `asyncio.gather`, but when one fails the others are cancelled."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
