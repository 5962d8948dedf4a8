"""Errors in OpenAI's shape, from which its clients make exceptions of their own kinds."""

import math
import re

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field


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


class ErrorDetails(BaseModel):
    message: str = Field(description="What is wrong, in a sentence.")
    type: str
    param: str | None = Field(description="The field that is wrong, if it is one.")
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetails


class APIError(Exception):
    """What a client is told instead of an answer.

    Args:
        status (`int`): Of HTTP.
        message (`str`): A sentence.
        param (`str`, *optional*): The field that is wrong.
        code (`str`, *optional*): For programs.
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
        """As OpenAI writes it."""
        if self.status >= 500:
            kind = "server_error"
        else:
            kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As HTTP."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 504:
            headers["X-Should-Retry"] = "false"  # OpenAI's clients would ask for the same again
        return JSONResponse(self.body, self.status, headers)


def engine_is_away() -> APIError:
    return APIError(503, "The engine is not ready; try again later.", code="engine_not_ready", retry_after=5)


def is_draining() -> APIError:
    return APIError(503, "The server is shutting down.", code="shutting_down", retry_after=10)


def queue_is_full(retry_after: float) -> APIError:
    return APIError(429, "The queue is full; try again later.", code="queue_full", retry_after=retry_after)


def took_too_long(seconds: float) -> APIError:
    return APIError(504, f"The request was not done after {seconds:g} seconds.", code="timeout")


def no_such_route(path: str) -> APIError:
    """What is said of an address that is none, above all where only `/v1` is missing in it."""
    found = re.search(r"/(images/(generations|edits)|models)(/|$)", path)
    if found:
        sentence = f"There is no such address, but /v1/{found[1]}: the base URL of a client ends in /v1, once."
    else:
        sentence = "There is no such address; this server has /v1/images/generations, /v1/images/edits and /v1/models."
    return APIError(404, sentence, code="unknown_url")


def wrong_value(error: ValueError, names: dict[str, str]) -> APIError:
    """What a check of the pipeline's found.

    Args:
        error (`ValueError`): Mostly a [`~llamagen_hf.arguments.FieldError`].
        names (`dict[str, str]`): What the client calls arguments of the pipeline, where it is something else.
    """
    param = getattr(error, "field", None)
    param = names.get(param, {"class_labels": "class_label"}.get(param, param))
    return APIError(400, str(error).replace("`class_labels`", "`class_label`"), param=param, code="invalid_value")
