"""Drawings from order to file: cache, queue, engine, decoder. It knows nothing of HTTP but its errors."""

import asyncio
import io
import logging

import torch

from ..arguments import FieldError
from ..images.reading import UPLOAD_MEGAPIXELS, read_image
from ..llamagen.inputs import GenerationInputs
from ..llamagen.parameters import describe
from ..llamagen.sampling import check_sampling
from .engine import Engine, EngineDied, GenerationRequest
from .errors import APIError, engine_is_away, is_draining, queue_is_full, wrong_value
from .front import Darkroom, Development, FrontPipeline, ImageFile, PromptEncoder
from .job import Job
from .mask import rows_to_keep
from .metrics import Metrics
from .micro_batches import MicroBatches
from .order import Order
from .settings import ServingSettings
from .stores import ResultCache, UrlStore


logger = logging.getLogger(__name__)


class ImageService:
    """Everything behind the HTTP routes.

    Args:
        pipe ([`FrontPipeline`]): Reads prompts and images, makes images of codes.
        engine ([`Engine`]): Draws codes.
        settings ([`ServingSettings`]): Limits.
    """

    def __init__(self, pipe: FrontPipeline, engine: Engine, settings: ServingSettings):
        self.pipe, self.engine, self.settings = pipe, engine, settings
        self.metrics = Metrics()
        self.cache = ResultCache(settings.cache_bytes)
        self.urls = UrlStore(settings.url_bytes, settings.url_seconds)
        self.pending = 0  # images that wait or are being drawn
        self.active = 0  # requests that are being answered
        self.is_draining = False
        self.failure: str | None = None
        self.facts = self.pipe.facts | {"checkpoint": settings.model_name}
        self._seconds_a_image = 1.0
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

    async def check_prompt(self, order: Order) -> str | None:
        """A sentence on the end of a prompt that the checkpoint leaves out, `None` if there is none.

        Raises:
            APIError: If it can read nothing of the prompt.
        """
        if not order.prompt or not self.pipe.is_text_conditional or self.pipe.text_encoder is None:
            return None
        loss = await asyncio.to_thread(self.pipe.find_loss, order.prompt)
        if loss is not None and loss.is_total:
            param = order.field_names.get("prompt", "prompt")
            raise APIError(400, loss.sentence, param=param, code="unreadable_prompt")
        return loss and loss.sentence

    def open(self, order: Order) -> Job:
        """Look into the cache and take places in the queue for the rest; [`Job.start`] is next, without a pause.

        Raises:
            APIError: If there is none, or nobody to draw.
        """
        return Job(self, order)

    def take_places(self, count: int) -> None:
        """Make `count` images pending."""
        if self.is_draining:
            raise is_draining()
        if not self.engine.is_ready:
            raise engine_is_away()
        limit = self.settings.max_pending
        if self.pending + count > limit:
            # Places come free one by one, as fast as the engine draws.
            rate = min(self.engine.capacity, limit) / self._seconds_a_image
            raise queue_is_full(retry_after=min(60.0, (self.pending + count - limit) / rate))
        self.pending += count

    def leave_places(self, count: int) -> None:
        self.pending -= count

    def took(self, seconds: float) -> None:
        """Learn from an image how long one takes from the first code to the last."""
        self._seconds_a_image += 0.1 * (seconds - self._seconds_a_image)

    async def prepare(self, order: Order) -> tuple[GenerationRequest, dict]:
        """Check an order and read its prompt and image.

        Returns:
            What the engine draws, and the parameters that say so, both for the seed 0.

        Raises:
            APIError: If something does not fit.
        """
        config, inputs = self.pipe.transformer.config, order.inputs
        try:
            if order.upload is not None:
                await asyncio.to_thread(self._read_upload, order, inputs)
            inputs.check(config, self.pipe.image_size, self.pipe.tokenizer if self.pipe.text_encoder else None)
            settings = self.pipe.sampling_settings(**inputs.sampling)
            check_sampling(**settings)
            condition = {}
            if self.pipe.is_text_conditional:
                embeds, mask = await self._encode(order.prompt)
                condition = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
            else:
                condition = {"class_id": self.pipe.get_class_ids(inputs.class_labels).item()}
            prefix = None
            if inputs.image is not None:
                prefix = await asyncio.to_thread(self._read_image, inputs)
        except ValueError as error:
            raise wrong_value(error, order.field_names) from error
        generator = torch.Generator().manual_seed(0)
        (parameters,) = describe(inputs, settings, [generator], prefix, self.facts)
        kept = [] if prefix is None else prefix[0].tolist()
        return GenerationRequest(seed=0, prefix_codes=kept, **condition, **settings), parameters

    def _read_upload(self, order: Order, inputs: GenerationInputs) -> None:
        """Set `image` and `keep_rows`."""
        if order.mask is not None and order.keep_rows is not None:
            raise FieldError("mask", "Pass `mask` or `keep_rows`, not both: each says how much of `image` to keep.")
        try:
            image = read_image(io.BytesIO(order.upload), max_megapixels=UPLOAD_MEGAPIXELS)
        except ValueError as error:
            raise FieldError("image", str(error)) from error
        inputs.image, inputs.keep_rows = image, order.keep_rows
        if order.keep_rows is None:
            grid_size = self.pipe.transformer.config.grid_size
            inputs.keep_rows = rows_to_keep(order.mask, order.upload, image.size, grid_size)

    @torch.no_grad()
    def _read_image(self, inputs: GenerationInputs) -> torch.LongTensor:
        return self.pipe.encode_image(inputs.image)[:, : inputs.keep_rows].flatten(1).cpu()

    async def develop(self, codes: list[int], file: ImageFile, parameters: dict) -> bytes:
        """A file of codes."""
        return await self._develop(Development(codes, file, parameters))

    @property
    def decoder_is_late(self) -> bool:
        """Whether images wait for the decoder."""
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
