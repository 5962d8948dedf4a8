"""Server-sent events under OpenAI's names."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

from .errors import ERRORS, APIError
from .schemas import GenerationFields, count_usage
from .service import ActiveRequest, GeneratedImage


def write_event(name: str, data: dict) -> bytes:
    """One event, with its data as JSON."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class EventStream(StreamingResponse):
    """Partial and final images of a request as they come. The work ends with the connection.

    Args:
        request ([`ActiveRequest`]): The request, just opened.
        body ([`GenerationFields`]): Its body.
        kind (`str`): "image_generation" or "image_edit".
        size (`str`): Size of the images.
        headers (`dict[str, str]`): Further headers.
    """

    def __init__(self, request: ActiveRequest, body: GenerationFields, kind: str, size: str, headers: dict[str, str]):
        self._reports: asyncio.Queue = asyncio.Queue()
        self._task = request.start(self._reports.put_nowait)
        self._task.add_done_callback(lambda _: self._reports.put_nowait(None))
        self._kind = kind
        self._common = {
            "size": size,
            "quality": body.quality or "auto",
            "background": "opaque",
            "output_format": body.output_format,
        }
        headers = {"Cache-Control": "no-store"} | headers
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._task.cancel()

    async def _events(self) -> AsyncIterator[bytes]:
        while (image := await self._reports.get()) is not None:
            yield self._event(image)
        error = self._task.exception()
        if error is not None:
            known = error if isinstance(error, APIError) else APIError(500, ERRORS[500])
            yield write_event("error", {"type": "error"} | known.body)
            if known is not error:
                raise error

    def _event(self, image: GeneratedImage) -> bytes:
        data = {"b64_json": base64.b64encode(image.file).decode(), "created_at": int(time.time())} | self._common
        data["image_index"] = image.index
        if image.partial_index is not None:
            name = f"{self._kind}.partial_image"
            data["partial_image_index"] = image.partial_index
        else:
            name = f"{self._kind}.completed"
            data |= {"seed": image.seed, "usage": count_usage([image])}
        return write_event(name, {"type": name} | data)
