"""The HTTP routes: OpenAI's images API, health, metrics."""

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import Annotated

from fastapi import Depends, FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from .errors import ERRORS, APIError, ErrorBody, no_such_route
from .events import EventStream, usage
from .front import MEDIA_TYPES
from .gate import Gate
from .job import Job
from .metrics import CONTENT_TYPE
from .order import FinishedImage, Order
from .schemas import GenerationFields, ImagesResponse, Model, ModelList, Status, build_bodies
from .service import ImageService


# What Hugging Face's clients know and LlamaGen has not.
OF_DIFFUSION = ("negative_prompt", "num_inference_steps", "scheduler", "strength")


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
    app = FastAPI(
        title="llamagen",
        version=version("llamagen-hf"),
        description="Images from LlamaGen, through OpenAI's images API.",
        lifespan=lifespan,
        redirect_slashes=False,  # the gate takes care of them; many clients do not follow a POST
    )
    app.add_middleware(Gate, service=service)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-ID", "X-Seed", "Retry-After", "Warning"],
        )
    # The gate has checked it; this is for the OpenAPI page.
    key = [Depends(HTTPBearer(auto_error=False))] if settings.api_key is not None else []
    guarded = {"dependencies": key}
    drawing_body, completion_body, text_to_image_body = build_bodies(service.pipe, settings)
    parameters = text_to_image_body.model_fields["parameters"].default_factory
    bodies = (drawing_body, completion_body, text_to_image_body, parameters)
    add_error_handlers(app, {name for body in bodies for name in body.model_fields})
    answers = error_answers(400, 401, 413, 429, 500, 503, 504)
    answers[200] = {"description": "Images, or with `stream` events.", "content": {"text/event-stream": {}}}

    def open_job(request: Request, order: Order) -> Job:
        facts = request.state.facts
        if settings.log_prompts:
            facts |= {"prompt": order.prompt, "class_label": order.class_label}
        job = service.open(order)
        facts |= {"n": order.n, "cached": order.n - len(job.missing)}
        return job

    async def warn(order: Order) -> dict[str, str]:
        """Headers that say what is left out of a prompt."""
        cut = await service.check_prompt(order)
        return {} if cut is None else {"Warning": f"299 llamagen {json.dumps(cut)}"}

    async def answer(request: Request, body: GenerationFields, kind: str, **uploads) -> Response:
        request.state.facts["stream"] = body.stream
        order = body.to_order(**uploads)
        headers = await warn(order)
        job, side = open_job(request, order), body.side or service.pipe.image_size
        size = f"{side}x{side}"
        if body.stream:
            return EventStream(job, body, kind, size, headers)
        pictures = await unless_disconnected(request, job)
        return JSONResponse(
            {
                "created": int(time.time()),
                "background": "opaque",
                "output_format": body.output_format,
                "size": size,
                "data": show(request, body, pictures),
                "usage": usage(pictures),
            },
            headers=headers,
        )

    def show(request: Request, body: GenerationFields, pictures: list[FinishedImage]) -> list[dict]:
        if body.response_format == "b64_json":
            return [
                {"b64_json": base64.b64encode(picture.file).decode(), "seed": picture.seed} for picture in pictures
            ]
        try:
            names = service.urls.put([picture.file for picture in pictures], body.output_format)
            base = (settings.public_url or str(request.base_url)).rstrip("/")
        except ValueError as error:
            raise APIError(400, str(error), param="response_format", code="invalid_value") from error
        return [
            {"url": f"{base}/images/{name}", "seed": picture.seed}
            for name, picture in zip(names, pictures, strict=True)
        ]

    @app.post("/v1/images/generations", response_model=ImagesResponse, responses=answers, **guarded)
    async def generate(request: Request, body: drawing_body) -> Response:
        """Draw images of a prompt or a class."""
        return await answer(request, body, "image_generation")

    form = Annotated[completion_body, Form(media_type="multipart/form-data")]

    @app.post("/v1/images/edits", response_model=ImagesResponse, responses=answers, **guarded)
    async def edit(request: Request, body: form) -> Response:
        """Complete an image: its upper rows are kept, what is below them is drawn."""
        given = Counter(name for name, _ in (await request.form()).multi_items())
        for name, count in given.items():
            if count > 1 and name not in ("image", "image[]"):
                raise APIError(400, f"`{name}` is there {count} times; expected once.", param=name)
        images = body.image + body.image_list
        if len(images) != 1:
            raise APIError(
                400, f"There are {len(images)} files as `image`; expected one, the image to complete.", param="image"
            )
        files = {"upload": await images[0].read(), "mask": body.mask and await body.mask.read()}
        return await answer(request, body, "image_edit", **files, keep_rows=body.keep_rows)

    @app.post("/v1", include_in_schema=False)
    @app.post(
        "/",
        response_class=Response,
        responses=error_answers(400, 401, 413, 429, 500, 503, 504)
        | {200: {"content": {"image/*": {}}, "description": "The image."}},
        **guarded,
    )
    async def text_to_image(request: Request, body: text_to_image_body) -> Response:
        """Draw an image, as Hugging Face's `InferenceClient.text_to_image` asks for it."""
        order = body.to_order(request.headers.get("accept", ""))
        headers = await warn(order)
        (picture,) = await unless_disconnected(request, open_job(request, order))
        headers["X-Seed"] = str(picture.seed)
        return Response(picture.file, media_type=MEDIA_TYPES[order.file.format], headers=headers)

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
        responses=error_answers(404) | {200: {"content": {"image/*": {}}, "description": "The image."}},
    )
    async def fetch(name: str) -> Response:
        """An image that was asked for by address, for as long as it is kept."""
        found = service.urls.get(name)
        if found is None and name in ("generations", "edits"):
            raise no_such_route(f"/images/{name}")
        if found is None:
            raise APIError(404, "There is no such image, or not any more.", code="image_not_found")
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


async def unless_disconnected(request: Request, job: Job) -> list[FinishedImage]:
    """The images of a job, which ends if the client goes away."""
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


def is_edit(request: Request) -> bool:
    return request.scope["path"] == "/v1/images/edits"


def add_error_handlers(app: FastAPI, fields: set[str]) -> None:
    """Make every error one of OpenAI's shape.

    Args:
        app (`FastAPI`): The application.
        fields (`set[str]`): Names that bodies may have, which alone are repeated in errors.
    """

    @app.exception_handler(APIError)
    async def known(request: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return APIError(400, "The body is no valid JSON.", code="invalid_json").response()
        if is_edit(request) and "form" not in request.headers.get("content-type", ""):
            return APIError(
                400, "The body must be a form, sent as multipart/form-data.", code="invalid_form"
            ).response()
        if first["loc"] == ("body",):
            sentence = "The body must be a JSON object, sent with `Content-Type: application/json`."
            return APIError(400, sentence, code="invalid_json").response()
        # What was sent is not repeated: it may be long, or secret.
        place = [str(part).removesuffix("[]") for part in first["loc"][1:] if part in fields or isinstance(part, int)]
        param = place[-1] if place and place[0] == "parameters" else ".".join(place) or None
        message = first["msg"].removeprefix("Value error, ")
        if param in ("size", "width", "height") and first["type"] == "literal_error":
            message += "; with the option --any-size the server scales images to others"
        if first["type"] == "extra_forbidden":
            param = str(first["loc"][-1])[:100]
            message = "There is a field that this server does not know; /docs shows those that it knows"
            if param in OF_DIFFUSION:
                message = "This is a parameter of diffusion models; this one draws code by code. Leave it out"
        return APIError(400, f"{param or 'body'}: {message}.", param=param, code=first["type"]).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        path, headers = request.scope["path"], Headers(error.headers)
        sentence = ERRORS.get(error.status_code) or HTTPStatus(error.status_code).phrase + "."
        known = APIError(error.status_code, sentence)
        if error.status_code == 404 or (error.status_code == 405 and path in ("/images/generations", "/images/edits")):
            known = no_such_route(path)
        elif error.status_code == 405:
            known.message = f"This address does not take {request.scope['method']}, but {headers['allow']}."
        response = known.response()
        response.headers.update(headers)  # such as the methods that are allowed
        return response
