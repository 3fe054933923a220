"""Keeps a client's session with a server alive, in a thread of its own: greets, registers, beats, and says whether the
server is to be asked at all. Knows no question of the engine's.

off    nobody asks the server anything: it was never there, does not answer, or has not agreed on the geometry again
on     it answered the last beat, and knows all that was registered
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import zmq

from kvferry.blocks import Geometry
from kvferry.errors import ConfigError, StoreError
from kvferry.observability.log import OnceLog
from kvferry.server import protocol
from kvferry.server.endpoint import Endpoint
from kvferry.server.link import Link
from kvferry.server.sessions import greeting

logger = logging.getLogger(__name__)

_BEAT_SECONDS: Final = 0.5
_BEAT_ANSWER_SECONDS: Final = 0.25
_CLOSE_BEAT_SECONDS: Final = 0.05
_CLOSE_ANSWER_SECONDS: Final = 0.08
"""While someone waits for what only a live server can bring, its end is to be known within 150 ms."""
_WATCH_SECONDS: Final = 0.2
_PROBE_SECONDS: Final = 0.1
_SETUP_ANSWER_SECONDS: Final = 0.5
_LONGEST_PAUSE_SECONDS: Final = 3.2
_STEADY_SECONDS: Final = 5.0
"""A server that fails after so long is soon asked again; one that fails at once again, later each time."""


class _Off(Exception):  # noqa: N818 - a state, not an error
    """The server cannot be used now. ends: so that it must be greeted again."""

    def __init__(self, reason: str, *, ends: bool) -> None:
        super().__init__(reason)
        self.ends = ends


class Attended(Protocol):
    """What the thread needs of its client."""

    def welcomed(self, welcome: protocol.Welcome) -> None:
        """A session begins. StoreError: the client cannot use this server."""

    def prove(self) -> bool:
        """Whether the server, which is off, answers questions."""

    def listen(self) -> None:
        """Take in what came too late, if nobody is asking."""


@dataclass(slots=True)
class _Registration:
    question: protocol.Register
    is_told: bool = False
    refusal: str | None = None


class Attendance:
    """A client's session. name: what the server calls the client. connect_seconds: how long callers wait at first."""

    def __init__(
        self,
        link: Link,
        endpoint: Endpoint,
        client: Attended,
        name: str,
        connect_seconds: float,
    ) -> None:
        self.is_on = False
        self._link = link
        self._endpoint = endpoint
        self._client = client
        self._name = name
        self._setup_until = time.monotonic() + connect_seconds
        self._has_session = False
        self._is_refused = False
        self._was_on = False
        self._may_miss = True
        self._watched_until = 0.0
        self._switched_at = 0.0
        self._pause_seconds = _PROBE_SECONDS
        self._registrations: dict[tuple[str, int], _Registration] = {}
        self._watched: dict[str, Geometry | None] = {}
        """Engines that were asked for, and what their ranks were last heard to agree on."""
        self._heard: set[str] = set()
        """Those of which this session has said something,"""
        self._agreed: set[str] = set()
        """and those whose ranks have all registered with it."""
        self._log = OnceLog(logger)
        self._changed = threading.Condition()
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="kvferry-client", daemon=True)
        self._thread.start()

    # -- for the client ----------------------------------------------------------------------------------------------

    def register(self, engine: str, rank: int, geometry: Geometry) -> None:
        """Register now, if the server is there, and with every session to come. ConfigError: it refuses."""
        registration = _Registration(protocol.Register(engine, rank, geometry))
        with self._changed:
            self._registrations[engine, rank] = registration
            self._await(lambda: registration.is_told)
            if registration.refusal is not None:
                del self._registrations[engine, rank]
                raise ConfigError(registration.refusal)

    def geometry(self, engine: str) -> Geometry | None:
        """What the engine's ranks agree on, as last heard. Only the first question for an engine waits."""
        if engine not in self._watched:
            with self._changed:
                self._watched[engine] = None
                self._await(lambda: engine in self._heard)
        return self._watched[engine]

    def await_on(self) -> bool:
        """Wait at first for the server to come on; whether it is."""
        with self._changed:
            self._await(lambda: self.is_on)
        return self.is_on

    def watch(self) -> bool:
        """Whether the server is on, for one who waits for it and asks again and again: known within 150 ms."""
        now = time.monotonic()
        is_watched, self._watched_until = now < self._watched_until, now + _WATCH_SECONDS
        if not is_watched:
            os.eventfd_write(self._wake, 1)
        return self.is_on

    def trip(self, *, ends: bool) -> None:
        """Ask no more: questions were not answered, or (ends) the server does not know the session."""
        self._fail(_Off("it does not answer in time", ends=ends))
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the thread."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _await(self, predicate: Callable[[], bool]) -> None:
        """Wait while the server may still come, or, if it is there, until it should have answered."""
        os.eventfd_write(self._wake, 1)
        seconds = self._setup_until - time.monotonic()
        if self._has_session:
            seconds = max(seconds, _SETUP_ANSWER_SECONDS)
        self._changed.wait_for(lambda: predicate() or self._is_refused, max(0.0, seconds))

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        monitor = self._link.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        poller = zmq.Poller()
        poller.register(monitor, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        while not self._closing:
            try:
                self._attend()
            except _Off as off:
                self._fail(off)
            except Exception as error:  # the thread boundary
                logger.exception("the session with the cache server broke off")
                self._fail(_Off(repr(error), ends=True))
            with self._changed:
                self._changed.notify_all()
            ready = dict(poller.poll(int(1000 * self._interval_seconds())))
            if self._wake in ready:
                os.eventfd_read(self._wake)
            if monitor in ready:
                monitor.recv_multipart()
                self._fail(_Off("it has ended", ends=True))
        self._link.socket.disable_monitor()
        monitor.close()

    def _attend(self) -> None:
        if self._has_session:
            self._beat()
            self._client.listen()
        else:
            self._greet()
        for registration in [*self._registrations.values()]:
            if not registration.is_told:
                answer = self._expect(registration.question)
                registration.refusal = answer.reason if isinstance(answer, protocol.Refused) else None
                registration.is_told = True
                if registration.refusal is not None:
                    self._log.warn("refused", "KV is not kept beyond the engine's pool: %s", registration.refusal)
        for engine in [*self._watched]:
            if engine not in self._agreed:
                answer = self._expect(protocol.AskGeometry(engine))
                assert isinstance(answer, protocol.Agreed)
                self._heard.add(engine)
                if answer.geometry is not None:
                    self._agreed.add(engine)
                    self._watched[engine] = answer.geometry
        missing = [engine for engine, geometry in self._watched.items() if geometry and engine not in self._agreed]
        if not (self.is_on or missing) and time.monotonic() >= self._switched_at + self._pause_seconds:
            self._go_on()

    def _beat(self) -> None:
        """One beat may be missed, as a busy machine may not let the server run, unless someone waits."""
        is_watched, may_miss, self._may_miss = self._is_watched, self._may_miss, False
        try:
            self._expect(protocol.Beat(), _CLOSE_ANSWER_SECONDS if is_watched else _BEAT_ANSWER_SECONDS)
        except _Off as off:
            if is_watched or off.ends or not may_miss:
                raise
        else:
            self._may_miss = True

    def _greet(self) -> None:
        try:
            self._endpoint.check_owner()
            self._link.await_connected(_PROBE_SECONDS)
            answer = self._link.ask(greeting(protocol.VERSION, time.monotonic(), self._name), _SETUP_ANSWER_SECONDS)
            if isinstance(answer, protocol.Welcome):
                self._client.welcomed(answer)
        except StoreError as error:
            raise _Off(str(error), ends=True) from error
        self._is_refused = isinstance(answer, protocol.Refused)
        if isinstance(answer, protocol.Refused):
            raise _Off(answer.reason, ends=True)
        if answer is None:
            raise _Off("nobody answers", ends=True)
        self._has_session = True
        self._heard.clear()
        self._agreed.clear()
        for registration in [*self._registrations.values()]:
            registration.is_told = False

    def _expect(self, question: protocol.Question, timeout_seconds: float | None = None) -> protocol.Answer:
        answer = self._link.ask(question, timeout_seconds or _SETUP_ANSWER_SECONDS)
        if answer is None or isinstance(answer, protocol.Stranger):
            raise _Off("it does not answer in time", ends=answer is not None)
        return answer

    def _go_on(self) -> None:
        if not self._client.prove():
            raise _Off("nobody answers", ends=False)
        self.is_on = True
        self._switched_at = time.monotonic()
        if self._log.forget("off"):
            logger.warning("the cache server at %s is back", self._endpoint.url)
        self._was_on = True

    def _fail(self, off: _Off) -> None:
        now = time.monotonic()
        self._has_session = self._has_session and not off.ends
        if self.is_on:
            self.is_on = False
            is_steady = now - self._switched_at >= _STEADY_SECONDS
            self._pause_seconds = _PROBE_SECONDS if is_steady else min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
            self._switched_at = now
        if self._was_on:
            self._log.warn("off", "the cache server at %s is not used for now: %s", self._endpoint.url, off)
        elif now >= self._setup_until or self._is_refused:
            self._log.warn(
                "off", "no cache server at %s (%s): serving without, until it comes", self._endpoint.url, off
            )

    @property
    def _is_watched(self) -> bool:
        return time.monotonic() < self._watched_until

    def _interval_seconds(self) -> float:
        if not (self.is_on and self._heard <= self._agreed):
            return _PROBE_SECONDS
        return _CLOSE_BEAT_SECONDS if self._is_watched else _BEAT_SECONDS
