"""What every request passes: API key, rate limit, log, metrics."""

import hmac
import logging
import secrets
import time

from limits import parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ERRORS, APIError, is_draining
from .service import ImageService


logger = logging.getLogger(__name__)


class RequestMiddleware:
    """Checks requests, gives each an id, and logs and counts them.

    Health, metrics, the OpenAPI page and images with unguessable names need no key. An address may end in a slash, and
    HEAD is answered as GET, whose body the server leaves out.

    Args:
        app (`ASGIApp`): The application behind it.
        service ([`ImageService`]): Has the settings and the metrics.
    """

    def __init__(self, app: ASGIApp, service: ImageService):
        self.app, self.service, self.settings = app, service, service.settings
        self.rate = parse(self.settings.rate_limit) if self.settings.rate_limit else None
        self.limiter = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = scope | {"path": scope["path"].rstrip("/") or "/"}
        method = scope["method"]
        if method == "HEAD":
            scope["method"] = "GET"
        start, status = time.perf_counter(), 499  # for a client that left before there was an answer
        facts = scope.setdefault("state", {})["facts"] = {"request_id": f"req_{secrets.token_hex(12)}"}
        metrics = self.service.metrics

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = facts["request_id"]
            await send(message)

        self.service.active += 1
        try:
            try:
                await self._check(scope)
            except APIError as error:
                await error.response()(scope, receive, send_with_id)
                return
            await self.app(scope, receive, send_with_id)
        except Exception:
            if status != 499:  # an answer has begun already
                raise
            logger.exception("request failed", extra={"request_id": facts["request_id"]})
            await APIError(500, ERRORS[500]).response()(scope, receive, send_with_id)
        finally:
            self.service.active -= 1
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "none")
            metrics.requests.labels(route, status).inc()
            metrics.seconds.labels(route).observe(seconds)
            if route not in ("/health", "/ready", "/metrics"):
                facts |= {"method": method, "route": route, "status": status, "seconds": round(seconds, 4)}
                logger.info("request", extra=facts)

    async def _check(self, scope: Scope) -> None:
        """Raise an `APIError` if a request is not allowed."""
        if scope["path"].startswith("/v1") or scope["path"] == "/":
            key = self.settings.api_key
            if key is not None:
                scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
                if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), key.encode()):
                    raise APIError(401, "The API key is missing or wrong.", code="invalid_api_key")
            if self.rate is not None:
                client = scope["client"][0] if scope.get("client") else ""
                if not await self.limiter.hit(self.rate, client):
                    reset = (await self.limiter.get_window_stats(self.rate, client)).reset_time
                    raise APIError(
                        429, f"More than {self.rate}.", code="rate_limit_exceeded", retry_after=reset - time.time()
                    )
            if self.service.is_draining and scope["method"] == "POST":
                raise is_draining()
        # Starlette's middleware stops bodies that turn out too large, but of these it reads nothing.
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.settings.max_body_bytes:
            raise APIError(413, ERRORS[413])
