"""The HTTP routes: OpenAI's images API, health, metrics."""

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated

from fastapi import Depends, FastAPI, Form, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from .errors import ERRORS, NO_EDITS, NO_VARIATIONS, ROUTES, APIError, ErrorBody, add_error_handlers, no_such_route
from .frontend import MEDIA_TYPES, ImageRequest
from .middleware import RequestMiddleware
from .schemas import FormFields, GenerationFields, ImagesResponse, Model, ModelList, Status, build_bodies, count_usage
from .service import ActiveRequest, GeneratedImage, ImageService
from .sse import EventStream


def error_answers(*statuses: int) -> dict[int, dict]:
    """Errors of a route, for the OpenAPI page."""
    return {status: {"model": ErrorBody, "description": ERRORS[status]} for status in statuses}


def build_app(service: ImageService) -> FastAPI:
    """The application around a service, which starts and stops with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    settings, frontend, started = service.settings, service.frontend, int(time.time())
    app = FastAPI(
        title="llamagen",
        version=version("llamagen-hf"),
        description="Generates images, through OpenAI's images API.",
        lifespan=lifespan,
        redirect_slashes=False,  # the middleware strips slashes; many clients do not follow the redirect of a POST
    )
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=settings.max_body_bytes)
    app.add_middleware(RequestMiddleware, service=service)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "X-Seed", "Retry-After", "Warning"],
        )
    # The middleware checks the key; this is for the OpenAPI page.
    key = [Depends(HTTPBearer(auto_error=False))] if settings.api_key is not None else []
    guarded = {"dependencies": key}
    bodies = build_bodies(frontend, settings)
    add_error_handlers(app, bodies.field_names)
    answers = error_answers(400, 401, 413, 429, 500, 503, 504)
    answers[200] = {"description": "Images, or with `stream` events.", "content": {"text/event-stream": {}}}

    def open_request(request: Request, asked: ImageRequest) -> ActiveRequest:
        facts = request.state.facts
        if settings.log_prompts:
            facts |= {"prompt": asked.prompt, "class_label": asked.class_label}
        active = ActiveRequest(service, asked)
        facts |= {"n": asked.n, "cached": asked.n - len(active.missing)}
        return active

    async def warn(asked: ImageRequest) -> dict[str, str]:
        """Headers that say which end of the prompt the checkpoint does not read."""
        sentence = await service.check_prompt(asked)
        return {} if sentence is None else {"Warning": f"299 llamagen {json.dumps(sentence)}"}

    async def answer(request: Request, body: GenerationFields, kind: str, **uploads) -> Response:
        request.state.facts["stream"] = body.stream
        asked = body.to_request(frontend, **uploads)
        headers = await warn(asked)
        active, side = open_request(request, asked), asked.side or frontend.pipe.image_size
        size = f"{side}x{side}"
        if body.stream:
            return EventStream(active, body, kind, size, headers)
        images = await unless_disconnected(request, active)
        return JSONResponse(
            {
                "created": int(time.time()),
                "background": "opaque",
                "output_format": body.output_format,
                "size": size,
                "data": show(request, body, images),
                "usage": count_usage(images),
            },
            headers=headers,
        )

    def show(request: Request, body: GenerationFields, images: list[GeneratedImage]) -> list[dict]:
        if body.response_format == "b64_json":
            return [{"b64_json": base64.b64encode(image.file).decode(), "seed": image.seed} for image in images]
        try:
            names = service.urls.put([image.file for image in images], body.output_format)
            base = (settings.public_url or str(request.base_url)).rstrip("/")
        except ValueError as error:
            raise APIError(400, str(error), param="response_format", code="invalid_value") from error
        urls = [f"{base}/images/{name}" for name in names]
        return [{"url": url, "seed": image.seed} for url, image in zip(urls, images, strict=True)]

    @app.post("/v1/images/generations", response_model=ImagesResponse, responses=answers, **guarded)
    async def generate(request: Request, body: bodies.generation) -> Response:
        """Generate images of a prompt or a class."""
        return await answer(request, body, "image_generation")

    if bodies.edit is not None:

        @app.post("/v1/images/edits", response_model=ImagesResponse, responses=answers, **guarded)
        async def edit(request: Request, body: as_form(bodies.edit)) -> Response:
            """Edit an image: generate a part of it anew."""
            upload = await read_upload(request, body, "the image to edit")
            files = {"upload": upload, "mask": body.mask and await body.mask.read()}
            return await answer(request, body, "image_edit", **files)

    else:

        @app.post("/v1/images/edits", include_in_schema=False)
        async def refuse_edits() -> Response:
            """Say that this checkpoint edits no images."""
            raise APIError(400, NO_EDITS, code="no_edits")

    if bodies.variation is not None:

        @app.post("/v1/images/variations", response_model=ImagesResponse, responses=answers, **guarded)
        async def vary(request: Request, body: as_form(bodies.variation)) -> Response:
            """Vary an image: generate others with its content."""
            upload = await read_upload(request, body, "the image to vary")
            return await answer(request, body, "image_variation", variation_of=upload)

    else:

        @app.post("/v1/images/variations", include_in_schema=False)
        async def refuse_variations() -> Response:
            """Say that this checkpoint draws no variations."""
            raise APIError(400, NO_VARIATIONS, code="no_variations")

    @app.post("/v1", include_in_schema=False)
    @app.post(
        "/",
        response_class=Response,
        responses=answers | {200: {"content": {"image/*": {}}, "description": "The image."}},
        **guarded,
    )
    async def text_to_image(request: Request, body: bodies.text_to_image) -> Response:
        """Generate an image, as Hugging Face's `InferenceClient.text_to_image` asks for it."""
        asked = body.to_request(frontend, request.headers.get("accept", ""))
        headers = await warn(asked)
        (image,) = await unless_disconnected(request, open_request(request, asked))
        headers["X-Seed"] = str(image.seed)
        return Response(image.file, media_type=MEDIA_TYPES[asked.output_format], headers=headers)

    model = {"id": settings.model_name, "object": "model", "created": started, "owned_by": "llamagen"}

    @app.get("/v1/models", responses=error_answers(401, 429), **guarded)
    async def list_models() -> ModelList:
        """The checkpoint that is served, as the only model."""
        return ModelList(object="list", data=[Model(**model)])

    @app.get("/v1/models/{model_name:path}", responses=error_answers(401, 404, 429), **guarded)
    async def get_model(model_name: str) -> Model:
        """The model, by its name."""
        if model_name != settings.model_name:
            raise APIError(404, f"There is no such model, only {settings.model_name!r}.", code="model_not_found")
        return Model(**model)

    @app.get(
        "/images/{name}",
        response_class=Response,
        responses=error_answers(404) | {200: {"content": {"image/*": {}}, "description": "The image."}},
    )
    async def fetch(name: str) -> Response:
        """An image that was requested by address, for as long as it is kept."""
        found = service.urls.get(name)
        if found is None and name in ROUTES:
            raise no_such_route(f"/images/{name}")
        if found is None:
            raise APIError(404, "There is no such image, or it is no longer kept.", code="image_not_found")
        file, media_type = found
        headers = {"X-Content-Type-Options": "nosniff", "Cache-Control": "private, max-age=86400, immutable"}
        return Response(file, media_type=media_type, headers=headers)

    @app.get("/health")
    async def health() -> Status:
        """Whether the server is alive."""
        return Status(status="ok")

    @app.get("/ready", responses={503: {"model": Status, "description": "The server takes no requests now."}})
    async def ready() -> Status:
        """Whether the server takes requests for images."""
        answer = Status(status=service.status)
        return answer if service.status == "ready" else JSONResponse(answer.model_dump(), 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        service.observe()
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def as_form(body: type[FormFields]) -> type:
    """A body that is read from a form."""
    return Annotated[body, Form(media_type="multipart/form-data")]


async def read_upload(request: Request, body: FormFields, what: str) -> bytes:
    """The file of the one image in a form; `what` it is.

    Raises:
        APIError: If there is another number of images, or another field is there several times.
    """
    given = Counter(name for name, _ in (await request.form()).multi_items())
    for name, count in given.items():
        if count > 1 and name not in ("image", "image[]"):
            raise APIError(400, f"`{name}` is there {count} times; expected once.", param=name)
    images = body.image + body.image_list
    if len(images) != 1:
        raise APIError(400, f"There are {len(images)} files as `image`; expected one, {what}.", param="image")
    return await images[0].read()


async def unless_disconnected(request: Request, active: ActiveRequest) -> list[GeneratedImage]:
    """The images of a request, which is cancelled if the client disconnects."""
    work = active.start()
    watch = asyncio.ensure_future(until_disconnected(request))
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise APIError(499, "The client has disconnected.")
    finally:
        work.cancel()
        watch.cancel()


async def until_disconnected(request: Request) -> None:
    """Wait for the end of the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
