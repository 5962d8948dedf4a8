"""An order under way: images from the cache, the others drawn, with previews."""

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import TYPE_CHECKING

from .engine import EngineDied, GenerationRequest
from .errors import engine_is_away, took_too_long, wrong_value
from .order import MAX_SEED, FinishedImage, Order, Preview


if TYPE_CHECKING:
    from .service import ImageService


class Job:
    """An order that has its places in the queue. [`start`] it at once: the end of its task gives them back.

    Args:
        service ([`ImageService`]): Who does it.
        order ([`Order`]): What to do.

    Attributes:
        images (`list[FinishedImage | None]`): What is done.
    """

    def __init__(self, service: "ImageService", order: Order):
        self.service, self.order = service, order
        self.arrived = time.perf_counter()
        first = order.seed if order.seed is not None else secrets.randbelow(MAX_SEED)
        self.seeds = [first + i for i in range(order.n)]
        self.keys = [self._key(seed) for seed in self.seeds]
        self.images = [self._cached(i) for i in range(order.n)] if order.seed is not None else [None] * order.n
        self.missing = [i for i, image in enumerate(self.images) if image is None]
        self.places = len(self.missing)
        if self.missing:
            service.take_places(self.places)

    def _key(self, seed: int) -> tuple:
        """All that determines an image's file, with this checkpoint."""
        order = self.order
        settings = self.service.pipe.sampling_settings(**order.inputs.sampling)
        uploads = [file and hashlib.sha256(file).digest() for file in (order.upload, order.mask)]
        condition = (order.prompt, type(order.class_label), order.class_label)
        return (*condition, tuple(sorted(settings.items())), seed, *uploads, order.keep_rows, order.file)

    def _cached(self, index: int) -> FinishedImage | None:
        found = self.service.cache.get(self.keys[index])
        if found is None:
            return None
        file, facts = found
        return FinishedImage(index, file, self.seeds[index], **facts, is_cached=True)

    def start(self, report: Callable[[Preview | FinishedImage], None] = lambda _: None) -> asyncio.Task:
        """Draw what is missing.

        Args:
            report (`Callable`, *optional*): Called with previews and images as they come.

        Returns:
            `asyncio.Task`: Its result is a list of [`FinishedImage`]. It raises an `APIError` if something does not
            fit, the time is over, or the engine dies. Cancelling it ends the work.
        """
        task = asyncio.ensure_future(self._run(report))
        task.add_done_callback(self._close)  # a task that is cancelled early enough never begins
        return task

    def _close(self, task: asyncio.Task) -> None:
        self.service.metrics.cancelled.inc(self.places)
        self.service.leave_places(self.places)

    async def _run(self, report: Callable) -> list[FinishedImage]:
        service, limit = self.service, self.service.settings.timeout
        timeout = limit if self.order.timeout is None else min(self.order.timeout, limit)
        for image in self.images:
            if image is not None:
                service.metrics.images.labels("cache").inc()
                report(image)
        try:
            if self.missing:
                await asyncio.wait_for(self._draw_missing(report), timeout)
        except asyncio.TimeoutError as error:
            raise took_too_long(timeout) from error
        except EngineDied as error:
            raise engine_is_away() from error
        return self.images

    async def _draw_missing(self, report: Callable) -> None:
        request, parameters = await self.service.prepare(self.order)
        await gather_or_cancel(
            *(self._draw(index, place, request, parameters, report) for place, index in enumerate(self.missing))
        )

    async def _draw(
        self, index: int, place: int, request: GenerationRequest, parameters: dict, report: Callable
    ) -> None:
        """Draw one image, with previews, and give its place back."""
        service, order, seed = self.service, self.order, self.seeds[index]
        request = GenerationRequest(**vars(request) | {"seed": seed, "place": place})
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
            raise wrong_value(error, order.field_names) from error
        finally:
            previews.stop()
        service.took(time.perf_counter() - begin)
        file = await service.develop(codes, order.file, parameters)
        if request.class_id is not None:
            tokens = 1
        else:
            tokens = int(request.prompt_attention_mask.sum())
        image = FinishedImage(index, file, seed, tokens, kept, service.num_codes - kept, is_cached=False)
        if order.seed is not None:
            service.cache.put(self.keys[index], file, image.facts)
        service.metrics.images.labels("drawn").inc()
        self.images[index] = image
        self.places -= 1
        service.leave_places(1)
        report(image)


class Previews:
    """The partial images of one image, evenly spread over its codes; the first at least, others as there is time.

    Args:
        job ([`Job`]): What the image belongs to.
        index (`int`): Which image of it.
        kept (`int`): Codes that are there from the beginning.
        parameters (`dict`): Of the image.
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
        # Images and first previews, of whichever request, are worth more than the next preview of this one.
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
        """Wait for the one that is being made; those that were late are left out, the image itself comes next."""
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
