"""Errors in OpenAI's shape, from which its clients make exceptions of their own kinds."""

import math

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field


ERRORS = {
    400: "Something in the request is wrong.",
    401: "The API key is missing or wrong.",
    404: "There is no such thing.",
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


def wrong_value(error: ValueError) -> APIError:
    """What a check of the pipeline's found, in the names of this API."""
    sentence = str(error).replace("`class_labels`", "`class_label`")
    # A sentence names the field that it is about first.
    param = sentence.split("`")[1] if "`" in sentence else None
    return APIError(400, sentence, param=param, code="invalid_value")
