"""The server process: logs, signals, a graceful end."""

import time

import uvicorn
from pythonjsonlogger.core import RESERVED_ATTRS

from .app import build_app
from .service import ImageService


GRACE = 5  # seconds that requests still have after the server was told to end

# One line of JSON for each event, on standard error.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "json": {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "fmt": "%(asctime)s %(levelname)s %(name)s %(message)s",
            "reserved_attrs": [*RESERVED_ATTRS, "color_message"],
            "rename_fields": {"asctime": "time", "levelname": "level", "name": "logger"},
        }
    },
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "loggers": {
        name: {"handlers": ["stderr"], "level": "INFO", "propagate": False}
        for name in ("llamagen_hf.serving", "uvicorn", "limits")
    },
}


class Server(uvicorn.Server):
    """Uvicorn that drains: after SIGTERM or SIGINT active requests finish, and new ones get 503.

    A second signal ends it at once.

    Args:
        service ([`ImageService`]): The service.
        host (`str`): Address to listen on.
        port (`int`): Port to listen on.
    """

    def __init__(self, service: ImageService, host: str, port: int):
        self.service = service
        self._end = float("inf")
        super().__init__(
            uvicorn.Config(
                build_app(service),
                host=host,
                port=port,
                log_config=LOGGING,
                access_log=False,
                timeout_graceful_shutdown=GRACE,
            )
        )

    def handle_exit(self, sig, frame) -> None:
        if self.service.is_draining:
            self.should_exit = True
        self.service.is_draining = True
        self._end = time.monotonic() + self.service.settings.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        service = self.service
        is_drained = service.is_draining and (service.active == 0 or time.monotonic() > self._end)
        return await super().on_tick(counter) or is_drained or service.has_failed


def serve(service: ImageService, host: str, port: int) -> None:
    """Serve until a signal comes.

    Args:
        service ([`ImageService`]): The service.
        host (`str`): Address to listen on.
        port (`int`): Port to listen on.

    Raises:
        ValueError: If the engine can't start, or died and does not come back.
    """
    Server(service, host, port).run()
    if service.failure is not None:
        raise ValueError(service.failure)
    if service.engine.has_given_up:
        raise ValueError("The engine died.")
