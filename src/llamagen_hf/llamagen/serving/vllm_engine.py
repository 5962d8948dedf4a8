"""`VLLMBackend`: an engine of the server on vLLM, on one or several GPUs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from ...serving.engine import Engine, EngineDied
from ..vllm import EngineDiedError, VLLMEngine
from .batch import GenerationRequest


WATCH = 1.0  # seconds between checks that vLLM's processes are alive


class VLLMBackend(Engine):
    """[`~llamagen_hf.llamagen.vllm.engine.VLLMEngine`] as an engine of the server.

    Args:
        checkpoint (`str`, *optional*): As for [`~llamagen_hf.llamagen.vllm.engine.VLLMEngine`].
        max_num_seqs (`int`, *optional*, defaults to 64): Images generated at once.
        restarts (`bool`, *optional*, defaults to `True`): Whether to start again when vLLM dies.
        kwargs: More of vLLM's arguments, such as `tensor_parallel_size`.
    """

    def __init__(self, checkpoint: str | None = None, max_num_seqs: int = 64, restarts: bool = True, **kwargs):
        super().__init__(restarts)
        self.checkpoint, self.capacity = checkpoint, max_num_seqs
        self.arguments = {"max_num_seqs": max_num_seqs, **kwargs}
        self._active = 0
        self._engine: VLLMEngine | None = None
        self._watch: asyncio.Task | None = None

    @property
    def is_ready(self) -> bool:
        return self._engine is not None and self._engine.is_alive

    @property
    def statistics(self) -> dict[str, float]:
        return {"drawing": self._active} | super().statistics

    async def start(self) -> None:
        await self._load()
        self._watch = asyncio.ensure_future(self._keep_alive())

    async def _load(self) -> None:
        try:
            # Loading takes a while, in which the server answers other requests.
            self._engine = await asyncio.to_thread(VLLMEngine, self.checkpoint, **self.arguments)
        except RuntimeError as error:  # raised if one of vLLM's processes did not start
            raise EngineDied(f"vLLM does not start: {error}") from error

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)

    async def _keep_alive(self) -> None:
        while not self.has_given_up:
            await asyncio.sleep(WATCH)
            if not self.is_ready:
                await self.recover(self._reload)

    async def _reload(self) -> None:
        await asyncio.to_thread(self._engine.shutdown)
        await self._load()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[list[int]]:
        if not self.is_ready:
            raise EngineDied("The engine is not ready.")
        arguments = vars(request) | {"class_label": None}
        if request.class_id is not None:
            arguments["class_label"] = request.class_id - self._engine.config.vocab_size
        del arguments["class_id"], arguments["place"], arguments["finishing"]
        self._active += 1
        try:
            async with aclosing(self._engine.draw(**arguments)) as steps:
                async for codes in steps:
                    yield codes
        except EngineDiedError as error:
            raise EngineDied("The engine died while it generated the image; try again.") from error
        finally:
            self._active -= 1
