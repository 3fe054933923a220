"""Serves a store to other processes on a socket that only its owner's user can open. Knows no engine and no tensor."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import msgspec
import zmq

from kvferry.errors import ConfigError, StoreError
from kvferry.observability.log import OnceLog
from kvferry.server.protocol import (
    UNANSWERED,
    VERSION,
    Answer,
    Done,
    Hello,
    JobDone,
    Question,
    Refused,
    Register,
    Welcome,
    decode_question,
    encode,
)
from kvferry.store.base import BlockStore

logger = logging.getLogger(__name__)


class StoreServer:
    """One thread that answers for `store` on the Unix socket `path`, which it makes, in a folder that only its user can
    enter. The store stays the caller's; None: there is none, which every client is told at once.

    StoreError: the socket cannot be made.
    """

    def __init__(self, store: BlockStore | None, path: Path) -> None:
        self._store = store
        self._path = path
        self._log = OnceLog(logger)
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            self._socket.bind(f"ipc://{path}")
            path.chmod(0o600)
        except (OSError, zmq.ZMQError) as error:
            self._release()
            raise StoreError(f"no socket can be made at {path}: {error}") from error
        self._thread = threading.Thread(target=self._serve, name="kvferry-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer nothing any more and remove the socket. To be called before the store is closed, once."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._release()
        self._path.unlink(missing_ok=True)

    def _release(self) -> None:
        self._socket.close()
        self._context.term()
        os.close(self._stop)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stop, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._socket in ready:
                self._take()
            elif self._stop in ready:  # only once all that had come is taken
                return

    def _take(self) -> None:
        frames = self._socket.recv_multipart()
        try:
            number, question = decode_question(frames[-1])
        except msgspec.MsgspecError as error:
            self._log.warn("undecodable", "a message that is not of this protocol is ignored: %s", error)
            return
        try:
            answer = self._answer(question)
        except ConfigError as error:
            answer = Refused(str(error))
        except Exception as error:  # noqa: BLE001 - the message boundary
            self._log.warn(type(question), "%s could not be answered: %r", type(question).__name__, error)
            answer = Refused(repr(error))
        if number != UNANSWERED:
            self._socket.send_multipart([frames[0], encode((number, answer))])

    def _answer(self, question: Question) -> Answer:
        if self._store is None:
            return Refused("there is no store")
        match question:
            case Hello(version) if version != VERSION:
                return Refused(f"this is version {VERSION} of the protocol, not {version}")
            case Hello():
                return Welcome(self._store.arena())
            case Register(engine, rank, geometry):
                self._store.register(engine, rank, geometry)
                return Done()
            case JobDone(job_id, rank, ok):
                self._store.done(job_id, rank, ok)
                return Done()
