"""The HTTP routes: OpenAI's images API, health, metrics."""

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from .. import __version__
from .errors import ERRORS, APIError, ErrorBody
from .events import EventStream, usage
from .gate import Gate
from .job import Job
from .metrics import CONTENT_TYPE
from .order import FinishedPicture
from .schemas import DrawingFields, ImagesResponse, Model, ModelList, Status, build_bodies
from .service import ImageService


logger = logging.getLogger(__name__)


def error_answers(*statuses: int) -> dict[int, dict]:
    """For the OpenAPI page."""
    return {status: {"model": ErrorBody, "description": ERRORS[status]} for status in statuses}


def build_app(service: ImageService) -> FastAPI:
    """The application around a service, which starts and stops with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    settings, started = service.settings, int(time.time())
    size = f"{service.pipe.image_size}x{service.pipe.image_size}"
    app = FastAPI(
        title="llamagen",
        version=__version__,
        description="Images from LlamaGen, through OpenAI's images API.",
        lifespan=lifespan,
    )
    app.add_middleware(Gate, service=service)
    add_error_handlers(app)
    # The gate has checked it; this is for the OpenAPI page.
    key = [Depends(HTTPBearer(auto_error=False))] if settings.api_key is not None else []
    guarded = {"dependencies": key}
    drawing_body, completion_body = build_bodies(service.pipe, settings)
    answers = error_answers(400, 401, 413, 429, 500, 503, 504)
    answers[200] = {"description": "Images, or with `stream` events.", "content": {"text/event-stream": {}}}

    async def answer(request: Request, body: DrawingFields, kind: str, upload: bytes | None = None) -> Response:
        facts = request.state.facts
        facts |= {"n": body.n, "stream": body.stream}
        if settings.log_prompts:
            facts |= {"prompt": body.prompt, "class_label": getattr(body, "class_label", None)}
        order = body.order(upload)
        cut = await service.check_prompt(order)
        headers = {} if cut is None else {"Warning": f"299 llamagen {json.dumps(cut)}"}
        job = service.open(order)
        facts["cached"] = body.n - len(job.missing)
        if body.stream:
            return EventStream(job, body, kind, size, headers)
        pictures = await unless_disconnected(request, job)
        return JSONResponse(
            {
                "created": int(time.time()),
                "background": "opaque",
                "output_format": body.output_format,
                "size": size,
                "data": [show(request, body, picture) for picture in pictures],
                "usage": usage(pictures),
            },
            headers=headers,
        )

    def show(request: Request, body: DrawingFields, picture: FinishedPicture) -> dict:
        if body.response_format == "b64_json":
            return {"b64_json": base64.b64encode(picture.file).decode(), "seed": picture.seed}
        name = service.urls.put(picture.file, body.output_format)
        base = settings.public_url or str(request.base_url)
        return {"url": f"{base.rstrip('/')}/images/{name}", "seed": picture.seed}

    @app.post("/v1/images/generations", response_model=ImagesResponse, responses=answers, **guarded)
    async def generate(request: Request, body: drawing_body) -> Response:
        """Draw images of a prompt or a class."""
        return await answer(request, body, "image_generation")

    form = Annotated[completion_body, Form(media_type="multipart/form-data")]

    @app.post("/v1/images/edits", response_model=ImagesResponse, responses=answers, **guarded)
    async def edit(request: Request, body: form) -> Response:
        """Complete a picture: its upper rows are kept, what is below them is drawn."""
        return await answer(request, body, "image_edit", await body.image.read())

    model = {"id": settings.model_name, "object": "model", "created": started, "owned_by": "llamagen"}

    @app.get("/v1/models", responses=error_answers(401, 429), **guarded)
    async def list_models() -> ModelList:
        """The one model there is."""
        return ModelList(object="list", data=[Model(**model)])

    @app.get("/v1/models/{model_name:path}", responses=error_answers(401, 404, 429), **guarded)
    async def get_model(model_name: str) -> Model:
        """A model by its name."""
        if model_name != settings.model_name:
            raise APIError(404, f"There is no such model; there is {settings.model_name!r}.", code="model_not_found")
        return Model(**model)

    @app.get(
        "/images/{name}",
        response_class=Response,
        responses=error_answers(404) | {200: {"content": {"image/*": {}}, "description": "The picture."}},
    )
    async def fetch(name: str) -> Response:
        """A picture that was asked for by address, for as long as it is kept."""
        found = service.urls.get(name)
        if found is None:
            raise APIError(404, "There is no such picture, or not any more.", code="picture_not_found")
        file, media_type = found
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=86400, immutable"}
        return Response(file, media_type=media_type, headers=headers)

    @app.get("/health")
    async def health() -> Status:
        """Whether the server lives."""
        return Status(status="ok")

    @app.get("/ready", responses={503: {"model": Status, "description": "No drawings now."}})
    async def ready() -> Status:
        """Whether it draws."""
        answer = Status(status=service.status)
        return answer if service.status == "ready" else JSONResponse(answer.model_dump(), 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        service.observe()
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    return app


async def unless_disconnected(request: Request, job: Job) -> list[FinishedPicture]:
    """The pictures of a job, which ends if the client goes away."""
    work = job.start()
    watch = asyncio.ensure_future(until_disconnected(request))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise APIError(499, "The client is gone.")
    finally:
        work.cancel()
        watch.cancel()


async def until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def add_error_handlers(app: FastAPI) -> None:
    """Make every error one of OpenAI's shape."""

    @app.exception_handler(APIError)
    async def known(request: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return APIError(400, "The body is no valid JSON.", code="invalid_json").response()
        # What was sent is not repeated: it may be long, or secret.
        place = [str(part) for part in first["loc"][1:] if part in app_fields or isinstance(part, int)]
        param = ".".join(place) or None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "There is a field that this server does not know"
            param = str(first["loc"][-1])[:100]
        return APIError(400, f"{param or 'body'}: {message}.", param=param, code=first["type"]).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        sentence = ERRORS.get(error.status_code) or HTTPStatus(error.status_code).phrase + "."
        response = APIError(error.status_code, sentence).response()
        response.headers.update(error.headers or {})  # such as the methods that are allowed
        return response

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return APIError(500, "Something went wrong in the server.").response()

    app_fields = {"prompt", "class_label", "n", "size", "model", "image", "keep_rows", *DrawingFields.model_fields}
