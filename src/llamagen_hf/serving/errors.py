"""Errors in OpenAI's shape, which its clients turn into exceptions of their own."""

import math
import re
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException


ROUTES = ("generations", "edits", "variations")  # of images
FORMS = ("/v1/images/edits", "/v1/images/variations")
ERRORS = {
    400: "The body can't be read; JSON must be UTF-8, and a form multipart/form-data.",
    401: "The API key is missing or wrong.",
    404: "There is no such address, model or image.",
    413: "The request is too large.",
    429: "Too many requests, or the queue is full; see `Retry-After`.",
    500: "Something went wrong in the server.",
    503: "The engine is not ready, or the server is shutting down; see `Retry-After`.",
    504: "It took too long.",
}

NO_VARIATIONS = (
    "This checkpoint draws no variations: they take a prior that has an image encoder, and its decoder. "
    "/v1/images/edits of LlamaGen generates a part of an image anew, by a prompt or a class."
)
NO_EDITS = "This checkpoint edits no images: pixel diffusion draws all pixels at once, and keeps no part of an image."

# Parameters of Hugging Face's clients that not every family has.
OTHER_MODELS = ("negative_prompt", "num_inference_steps", "scheduler", "strength")


class ErrorDetails(BaseModel):
    """What is wrong with a request."""

    message: str = Field(description="What is wrong, in a sentence.")
    type: str
    param: str | None = Field(description="The field that is wrong, if it is a single one.")
    code: str | None


class ErrorBody(BaseModel):
    """The body of an answer that is an error."""

    error: ErrorDetails


class APIError(Exception):
    """An error for a client.

    Args:
        status (`int`): HTTP status.
        message (`str`): A sentence.
        param (`str`, *optional*): The field that is wrong.
        code (`str`, *optional*): Name of the error, for programs.
        retry_after (`float`, *optional*): Seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict:
        """The error as OpenAI writes it."""
        if self.status >= 500:
            kind = "server_error"
        else:
            kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as an answer."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 504:
            headers["X-Should-Retry"] = "false"  # else OpenAI's clients repeat the request
        return JSONResponse(self.body, self.status, headers)


def engine_is_away() -> APIError:
    """The error while the engine starts, or after it died."""
    return APIError(503, "The engine is not ready; try again later.", code="engine_not_ready", retry_after=5)


def is_draining() -> APIError:
    """The error for new requests after SIGTERM."""
    return APIError(503, "The server is shutting down.", code="shutting_down", retry_after=10)


def no_such_route(path: str) -> APIError:
    """The error for an unknown address, with a hint where only `/v1` is missing in it."""
    found = re.search(rf"/(images/({'|'.join(ROUTES)})|models)(/|$)", path)
    if found:
        sentence = f"There is no such address, but /v1/{found[1]}: the base URL of a client ends in /v1, once."
    else:
        routes = ", ".join(f"/v1/images/{route}" for route in ROUTES)
        sentence = f"There is no such address; this server has {routes} and /v1/models."
    return APIError(404, sentence, code="unknown_url")


def wrong_value(error: ValueError, names: dict[str, str]) -> APIError:
    """The error for a value that the pipeline refuses.

    Args:
        error (`ValueError`): Mostly a [`~llamagen_hf.arguments.FieldError`].
        names (`dict[str, str]`): What the client calls arguments of the pipeline, where the names differ.
    """
    param = getattr(error, "field", None)
    param = names.get(param, {"class_labels": "class_label"}.get(param, param))
    return APIError(400, str(error).replace("`class_labels`", "`class_label`"), param=param, code="invalid_value")


def invalid_body(request: Request, error: RequestValidationError, fields: set[str]) -> APIError:
    """The error for a body that does not fit its schema.

    Args:
        request (`Request`): The request.
        error (`RequestValidationError`): What FastAPI found.
        fields (`set[str]`): Names of fields that errors may repeat; anything else may be long, or secret.
    """
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return APIError(400, "The body is not valid JSON.", code="invalid_json")
    is_form = "form" in request.headers.get("content-type", "")
    if request.scope["path"] in FORMS and not is_form:
        return APIError(400, "The body must be a form, sent as multipart/form-data.", code="invalid_form")
    if first["loc"] == ("body",):
        sentence = "The body must be a JSON object, sent with `Content-Type: application/json`."
        return APIError(400, sentence, code="invalid_json")
    place = [str(part).removesuffix("[]") for part in first["loc"][1:] if part in fields or isinstance(part, int)]
    param = place[-1] if place and place[0] == "parameters" else ".".join(place) or None
    message = first["msg"].removeprefix("Value error, ")
    if param in ("size", "width", "height") and first["type"] == "literal_error":
        message += "; with the option --any-size the server scales images to others"
    if first["type"] == "extra_forbidden":
        param = str(first["loc"][-1])[:100]
        message = "This server does not know this field; /docs lists those that it knows"
        if param in OTHER_MODELS:
            message = "This is a parameter of other models, which this one does not have. Leave it out"
    return APIError(400, f"{param or 'body'}: {message}.", param=param, code=first["type"])


def http_error(request: Request, error: HTTPException) -> APIError:
    """The error for what Starlette refuses, such as an unknown address or a method that is not allowed."""
    path, status = request.scope["path"], error.status_code
    if status == 404 or (status == 405 and path.removeprefix("/images/") in ROUTES):
        return no_such_route(path)
    if status == 405:
        allowed = Headers(error.headers)["allow"]
        return APIError(405, f"This address does not take {request.scope['method']}, but {allowed}.")
    return APIError(status, ERRORS.get(status) or HTTPStatus(status).phrase + ".")


def add_error_handlers(app: FastAPI, fields: set[str]) -> None:
    """Give every error OpenAI's shape.

    Args:
        app (`FastAPI`): The application.
        fields (`set[str]`): Names of fields that errors may repeat.
    """

    @app.exception_handler(APIError)
    async def handle_known(request: Request, error: APIError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def handle_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return invalid_body(request, error, fields).response()

    @app.exception_handler(HTTPException)
    async def handle_http(request: Request, error: HTTPException) -> JSONResponse:
        response = http_error(request, error).response()
        response.headers.update(Headers(error.headers))  # such as the methods that are allowed
        return response
