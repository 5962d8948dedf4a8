"""Server-sent events under OpenAI's names."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

from .errors import APIError
from .job import Job
from .order import FinishedImage, Preview
from .schemas import GenerationFields


def usage(images: list[FinishedImage]) -> dict:
    """Positions of the generator, as OpenAI counts tokens."""
    text, kept, drawn = (
        sum(getattr(image, name) for image in images) for name in ("condition_tokens", "kept_codes", "drawn_codes")
    )
    return {
        "input_tokens": text + kept,
        "input_tokens_details": {"text_tokens": text, "image_tokens": kept},
        "output_tokens": drawn,
        "total_tokens": text + kept + drawn,
    }


def write_event(name: str, data: dict) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


class EventStream(StreamingResponse):
    """Previews and images of a job as they come. The job ends with the connection.

    Args:
        job ([`Job`]): Just opened.
        body ([`GenerationFields`]): What was asked for.
        kind (`str`): "image_generation" or "image_edit".
        size (`str`): Of the images.
        headers (`dict[str, str]`): More of them.
    """

    def __init__(self, job: Job, body: GenerationFields, kind: str, size: str, headers: dict[str, str]):
        self._reports: asyncio.Queue = asyncio.Queue()
        self._task = job.start(self._reports.put_nowait)
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
        while (report := await self._reports.get()) is not None:
            yield self._event(report)
        error = self._task.exception()
        if isinstance(error, APIError):
            yield write_event("error", {"type": "error"} | error.body)
        elif error is not None:
            unknown = APIError(500, "Something went wrong in the server.")
            yield write_event("error", {"type": "error"} | unknown.body)
            raise error

    def _event(self, report: Preview | FinishedImage) -> bytes:
        data = {"b64_json": base64.b64encode(report.file).decode(), "created_at": int(time.time())} | self._common
        data["image_index"] = report.index
        if isinstance(report, Preview):
            name = f"{self._kind}.partial_image"
            data["partial_image_index"] = report.number
        else:
            name = f"{self._kind}.completed"
            data |= {"seed": report.seed, "usage": usage([report])}
        return write_event(name, {"type": name} | data)
