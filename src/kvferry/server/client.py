"""A store in another process of this machine, as a worker's rank sees it. Knows no engine and no tensor."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from pathlib import Path

import msgspec
import zmq

from kvferry.blocks import Geometry
from kvferry.errors import ConfigError, StoreError
from kvferry.observability.log import OnceLog
from kvferry.server.protocol import (
    UNANSWERED,
    VERSION,
    Answer,
    Hello,
    JobDone,
    Question,
    Refused,
    Register,
    Welcome,
    decode_answer,
    encode,
)
from kvferry.store.base import ArenaInfo

logger = logging.getLogger(__name__)

_LINGER_MILLISECONDS = 1000
"""How long closing waits until the last messages have left."""


class StoreClient:
    """What a rank needs of a `BlockStore`, over the Unix socket `path`. Thread-safe.

    setup_seconds: how long the server may take to come up, and to answer what is asked before the first pass. What is
    said during passes is sent and not waited for. StoreError: it did not come up, or speaks another version.
    """

    def __init__(self, path: Path, setup_seconds: float = 30.0) -> None:
        self._setup_seconds = setup_seconds
        self._numbers = itertools.count(UNANSWERED + 1)
        self._log = OnceLog(logger)
        self._lock = threading.Lock()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = _LINGER_MILLISECONDS
        self._socket.connect(f"ipc://{path}")
        try:
            self._arena = self._greet()
        except BaseException:
            self._socket.linger = 0
            self.close()
            raise

    def arena(self) -> ArenaInfo:
        """See `BlockStore.arena`: as it was when this client was made."""
        return self._arena

    def register(self, engine: str, rank: int, geometry: Geometry) -> None:
        """See `BlockStore.register`. StoreError: no answer in time."""
        answer = self._ask(Register(engine, rank, geometry))
        if isinstance(answer, Refused):
            raise ConfigError(answer.reason)

    def done(self, job_id: int, rank: int, ok: bool) -> None:
        """See `BlockStore.done`. Sent, not waited for: a message that is lost leaves the job to its lease's end."""
        with self._lock:
            try:
                self._socket.send(encode((UNANSWERED, JobDone(job_id, rank, ok))), zmq.DONTWAIT)
            except zmq.ZMQError as error:
                self._log.warn("done", "the store cannot be told that a job is done: %s", error)

    def close(self) -> None:
        """Let the last messages leave. Further calls are errors."""
        with self._lock:
            self._socket.close()
            self._context.term()

    def _greet(self) -> ArenaInfo:
        welcome = self._ask(Hello(VERSION))
        if not isinstance(welcome, Welcome):
            raise StoreError(f"the engine's store does not serve: {welcome}")
        return welcome.arena

    def _ask(self, question: Question) -> Answer:
        """The answer. Late answers of earlier questions are dropped."""
        deadline = time.monotonic() + self._setup_seconds
        with self._lock:
            number = next(self._numbers)
            self._socket.send(encode((number, question)))
            while (remaining_seconds := deadline - time.monotonic()) > 0:
                if not self._socket.poll(int(remaining_seconds * 1000) + 1):
                    break
                try:
                    answered, answer = decode_answer(self._socket.recv())
                except msgspec.MsgspecError as error:
                    raise StoreError(f"the store answers in another protocol: {error}") from error
                if answered == number:
                    return answer
        raise StoreError(f"no answer from the store to {type(question).__name__} within {self._setup_seconds} s")
