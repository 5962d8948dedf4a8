"""The server process: signals, and a graceful end."""

import time

import uvicorn

from .app import build_app
from .logs import LOGGING
from .service import ImageService


GRACE = 5  # seconds for what is left when the server ends anyway


class Server(uvicorn.Server):
    """Uvicorn that drains: after SIGTERM or SIGINT running requests finish, and new ones get 503.

    A second signal ends it at once.

    Args:
        service ([`ImageService`]): What it serves.
        host (`str`): Address to listen on.
        port (`int`): Port.
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

    Raises:
        ValueError: In one sentence, if the engine can't start, or died for good.
    """
    Server(service, host, port).run()
    if service.failure is not None:
        raise ValueError(service.failure)
    if service.engine.has_given_up:
        raise ValueError("The engine died.")
