"""Serves a store on a socket. Knows messages and sessions; no engine and no tensor."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from typing import Final

import msgspec
import zmq

from kvferry.errors import ConfigError
from kvferry.observability.log import OnceLog
from kvferry.server import protocol
from kvferry.server.answers import Answerer
from kvferry.server.curve import ServerKeys, protect_server
from kvferry.server.endpoint import Endpoint, Listener

logger = logging.getLogger(__name__)

_SWEEP_MILLISECONDS: Final = 100
_TIERS_MILLISECONDS: Final = 2
"""How often lower tiers are looked at while a load waits for them."""
_MOST_UNREAD: Final = 128
"""Messages of one client that wait in this process; more wait in the client's."""
_MOST_AT_ONCE: Final = 256


class StoreServer:
    """One thread that answers at `endpoint` for a store. The store stays the caller's.

    None: there is no store, which every client is told at once. StoreError: another server listens there, or the
    socket cannot be made. ConfigError: other machines could connect, and there are no keys.
    """

    def __init__(self, answerer: Answerer | None, endpoint: Endpoint, keys: ServerKeys | None = None) -> None:
        if keys is None and not endpoint.is_local:
            raise ConfigError(f"{endpoint.url} is open to other machines: that takes keys (`kvferry keygen`)")
        self._answerer = answerer
        self._log = OnceLog(logger)
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.maxmsgsize = protocol.MOST_MESSAGE_BYTES
        self._socket.rcvhwm = _MOST_UNREAD
        # A client that comes back may be quicker than the end of its last connection.
        self._socket.router_handover = True
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._last_sweep = time.monotonic()
        self._guard = protect_server(self._socket, keys) if keys is not None else None
        try:
            self._listener = Listener(self._socket, endpoint)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._serve, name="kvferry-server", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False: the thread broke off, and nobody is answered any more."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Answer nothing any more and remove the socket. To be called before the store is closed, once."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._listener.close()
        self._release()

    def _release(self) -> None:
        self._socket.close()
        if self._guard is not None:
            self._guard.stop()
        self._context.term()
        os.close(self._stop)

    def _serve(self) -> None:
        try:
            self._run()
        except Exception:  # the thread boundary
            logger.exception("the server has broken off")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop, zmq.POLLIN)
        while True:
            awaits_tiers = self._answerer is not None and self._answerer.awaits_tiers
            ready = dict(poller.poll(_TIERS_MILLISECONDS if awaits_tiers else _SWEEP_MILLISECONDS))
            is_drained = self._drain()
            if self._answerer is not None:
                for session, polled in self._answerer.take_polled():
                    self._send(protocol.QUESTIONS_LINK + session.client_id, protocol.UNNUMBERED, polled)
                if is_drained:
                    self._sweep(self._answerer)
                    self._answerer.check_when_idle()
            if self._stop in ready:
                self._drain()  # What ranks said before they ended.
                return

    def _drain(self) -> bool:
        """Answer what has come; false if there may be more."""
        for _ in range(_MOST_AT_ONCE):
            try:
                routing_id, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            self._take(routing_id, frames)
        return False

    def _take(self, routing_id: bytes, frames: list[bytes]) -> None:
        try:
            (message,) = frames
            number, deadline, question = protocol.decode_question(message)
        except (ValueError, msgspec.MsgspecError) as error:
            self._count("server_undecodable")
            self._log.warn("undecodable", "a message that is not of this protocol is refused: %s", error)
            self._send(routing_id, protocol.UNNUMBERED, protocol.Refused(f"not of this protocol: {error}"))
            return
        if self._answerer is None:
            self._send(routing_id, number, protocol.Refused("there is no store"))
        elif number != protocol.UNNUMBERED and deadline < time.monotonic():
            self._count("server_stale_questions")
        else:
            start = time.perf_counter()
            answer = self._answerer.answer(routing_id[1:], question)
            self._answerer.meter.took(type(question).__name__, time.perf_counter() - start)
            if number != protocol.UNNUMBERED:
                self._send(routing_id, number, answer)

    def _send(self, routing_id: bytes, number: int, answer: protocol.Answer) -> None:
        """To a client that is gone, or reads nothing, nothing is sent."""
        with contextlib.suppress(zmq.ZMQError):
            self._socket.send_multipart([routing_id, protocol.encode((number, answer))], zmq.NOBLOCK)

    def _sweep(self, answerer: Answerer) -> None:
        """End the sessions of the dead. All that had come is taken, and time in which this process itself did not run
        is not held against them."""
        now = time.monotonic()
        elapsed, most = now - self._last_sweep, 2 * _SWEEP_MILLISECONDS / 1000
        if elapsed >= most / 2:
            self._last_sweep = now
            for session in answerer.sessions.pass_time(min(elapsed, most)):
                answerer.end(session, "has died")

    def _count(self, name: str) -> None:
        if self._answerer is not None:
            self._answerer.meter.add(name)
