"""`VLLMBackend`: the server's codes drawn by vLLM, on as many GPUs as that is given."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

from ..llamagen.vllm import EngineDiedError, VLLMEngine
from .engine import Engine, EngineDied, GenerationRequest
from .revival import start_again


logger = logging.getLogger(__name__)

WATCH = 1.0  # seconds between looks at whether vLLM's processes live


class VLLMBackend(Engine):
    """[`~llamagen_hf.llamagen.vllm.engine.VLLMEngine`] as an engine of the server.

    Args:
        checkpoint (`str`, *optional*): As for [`~llamagen_hf.llamagen.vllm.engine.VLLMEngine`].
        max_num_seqs (`int`, *optional*, defaults to 64): Images drawn at once.
        restarts (`bool`, *optional*, defaults to `True`): Whether to start again when vLLM dies.
        kwargs: More of vLLM's arguments, such as `tensor_parallel_size`.
    """

    def __init__(self, checkpoint: str | None = None, max_num_seqs: int = 64, restarts: bool = True, **kwargs):
        self.checkpoint, self.restarts = checkpoint, restarts
        self.arguments = {"max_num_seqs": max_num_seqs, **kwargs}
        self.deaths = self._drawing = 0
        self._engine: VLLMEngine | None = None
        self._has_given_up = False
        self._watch: asyncio.Task | None = None

    @property
    def is_ready(self) -> bool:
        return self._engine is not None and self._engine.is_alive

    @property
    def has_given_up(self) -> bool:
        return self._has_given_up

    @property
    def capacity(self) -> int:
        return self.arguments["max_num_seqs"]

    @property
    def statistics(self) -> dict[str, float]:
        return {"drawing": self._drawing, "deaths": self.deaths}

    async def start(self) -> None:
        await self._load()
        self._watch = asyncio.ensure_future(self._keep_alive())

    async def _load(self) -> None:
        try:
            # It takes a while, and the server answers meanwhile.
            self._engine = await asyncio.to_thread(VLLMEngine, self.checkpoint, **self.arguments)
        except RuntimeError as error:  # how vLLM says that a process of its own did not come up
            raise EngineDied(f"vLLM does not start: {error}") from error

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(WATCH)
            if self.is_ready:
                continue
            self.deaths += 1
            logger.error("engine died", extra={"deaths": self.deaths})
            if not (self.restarts and await start_again(self._reload)):
                self._has_given_up = True
                return

    async def _reload(self) -> None:
        await asyncio.to_thread(self._engine.shutdown)
        await self._load()

    async def draw(self, request: GenerationRequest) -> AsyncIterator[list[int]]:
        if not self.is_ready:
            raise EngineDied("The engine is not ready.")
        condition = {
            "prompt_embeds": request.prompt_embeds,
            "prompt_attention_mask": request.prompt_attention_mask,
        }
        if request.class_id is not None:
            condition = {"class_label": request.class_id - self._engine.config.vocab_size}
        drawing = self._engine.draw(
            **condition,
            prefix_codes=request.prefix_codes,
            seed=request.seed,
            guidance_scale=request.guidance_scale,
            guidance_interval=request.guidance_interval,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
        )
        self._drawing += 1
        try:
            async with aclosing(drawing):
                async for codes in drawing:
                    yield codes
        except EngineDiedError as error:
            raise EngineDied("The engine died while it drew; try again.") from error
        finally:
            self._drawing -= 1
