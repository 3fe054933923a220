"""Listens, serves until it is told to end, and ends in order. Knows no route and no engine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from kvferry.errors import ConfigError
from kvferry.serving.app import make_app
from kvferry.serving.service import Service

_LAST_WORDS_SECONDS = 2
"""How long the answers to ended requests may take to leave."""


class Server(uvicorn.Server):
    """Serves on a bound socket until SIGINT or SIGTERM, or `should_exit`.

    Then nobody new is let in; requests under way have `grace_seconds` to end by themselves, are ended after it, and
    their clients are told. A second SIGINT leaves at once.
    """

    def __init__(self, service: Service, grace_seconds: float) -> None:
        # uvicorn's own limit is the last resort: it cuts connections.
        limit = int(grace_seconds + 1) + _LAST_WORDS_SECONDS
        config = uvicorn.Config(
            make_app(service),
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=limit,
        )
        super().__init__(config)
        self._service = service
        self._grace_seconds = grace_seconds

    def serve_on(self, listener: socket.socket, on_ready: Callable[[], None]) -> None:
        """Let clients in; returns when all have been served or sent away. ConfigError: the address is taken."""
        try:
            listener.listen(self.config.backlog)
        except OSError as error:
            raise ConfigError(f"cannot listen: {error.strerror}") from error
        on_ready()
        try:
            self.run(sockets=[listener])
        finally:
            self._service.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's, which would raise the signal again at the end: this end is the wanted one."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See the class."""
        asyncio.get_running_loop().call_later(self._grace_seconds, self._service.abort_all)
        await super().shutdown(sockets)
