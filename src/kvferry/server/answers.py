"""Answers clients' questions out of a store. Knows sessions and geometries; no socket and no engine.

Called from one thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Final

from kvferry.blocks import Geometry, Job
from kvferry.config import StoreOptions
from kvferry.errors import ConfigError, InvariantError
from kvferry.observability.log import OnceLog
from kvferry.observability.metrics import Meter
from kvferry.server.protocol import (
    VERSION,
    Agreed,
    Answer,
    AskGeometry,
    AskMatch,
    AskStats,
    Beat,
    BeginLoad,
    BeginStore,
    Begun,
    Broken,
    Bye,
    Cancel,
    Check,
    Done,
    Found,
    Hello,
    JobDone,
    Polled,
    Question,
    Refused,
    Register,
    Stranger,
    Values,
    Welcome,
    split_keys,
)
from kvferry.server.sessions import MOST_SESSIONS, Session, Sessions
from kvferry.store.keys import root_key
from kvferry.store.store import Store

logger = logging.getLogger(__name__)

_CLOCKS_DIFFER_SECONDS: Final = 3600.0
"""Clocks of one machine agree to the microsecond. A greeting may have waited for a server that was stopped."""
_MOST_REGISTERED: Final = 256
"""Ranks that one session may register."""


class Answerer:
    """The sessions of one server and what they may ask of `store`, which was made with `options`.

    is_private: the store is one engine's, which may use it in this process as well and takes its ranks with it; else
    chunks have the size that the options say, and engines come and go.
    """

    def __init__(
        self,
        store: Store,
        options: StoreOptions,
        *,
        is_private: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.meter = Meter()
        self.sessions = Sessions()
        self._store = store
        self._options = options
        self._is_private = is_private
        self._clock = clock
        self._geometries: dict[bytes, Geometry] = {}
        self._log = OnceLog(logger)

    def answer(self, client_id: bytes, question: Question) -> Answer:
        """What to answer. Never raises."""
        session = self.sessions.find(client_id)
        try:
            if isinstance(question, Hello):
                return self._greet(client_id, session, question)
            if session is None:
                self.meter.add("server_strangers")
                return Stranger()
            return self._answer(session, question)
        except (ConfigError, ValueError) as error:
            self.meter.add("server_refused")
            return Refused(str(error))
        except InvariantError as error:
            return Broken(str(error))
        except Exception as error:  # noqa: BLE001 - the message boundary
            self.meter.add("server_errors")
            self._log.warn(type(question), "%s could not be answered: %r", type(question).__name__, error)
            return Refused(repr(error))

    def take_polled(self) -> Iterator[tuple[Session, Polled]]:
        """What lower tiers have answered to loads of live sessions."""
        now = self._clock()
        for session in self.sessions:
            if session.awaits_until > now:
                polled = self._store.poll(0.0, owner=session.owner)
                if polled.ready or polled.failed:
                    yield session, Polled(polled.ready, polled.failed)

    @property
    def awaits_tiers(self) -> bool:
        """Whether `take_polled` may soon have something."""
        now = self._clock()
        return any(session.awaits_until > now for session in self.sessions)

    def end(self, session: Session, why: str) -> None:
        """The client is gone: what it leased returns, what it registered is forgotten."""
        logger.info("client %s (process %d) %s", session.name, session.pid, why)
        self.sessions.end(session)
        self._store.release(session.owner)
        registered = {rank: root for of in self.sessions for rank, root in of.registered.items()}
        if not self._is_private:
            for engine in {engine for engine, _ in session.registered} - {engine for engine, _ in registered}:
                self._store.unregister(engine)
        self._geometries = {root: self._geometries[root] for root in registered.values()}

    def _greet(self, client_id: bytes, session: Session | None, hello: Hello) -> Answer:
        if hello.version != VERSION:
            return Refused(f"this is version {VERSION} of the protocol, not {hello.version}")
        if abs(hello.now - self._clock()) > _CLOCKS_DIFFER_SECONDS:
            return Refused("the client's clock is that of another machine, with which no memory can be shared")
        if session is not None:
            self.end(session, "begins anew")
        if len(self.sessions) >= MOST_SESSIONS:
            return Refused(f"there are {MOST_SESSIONS} clients already")
        self.sessions.begin(client_id, hello)
        return Welcome(self._store.arena())

    def _answer(self, session: Session, question: Question) -> Answer:
        store = self._store
        match question:
            case AskMatch(root, keys):
                return Found.of(store.match(self._geometry(root), split_keys(keys)))
            case Beat():
                return Done()
            case JobDone(job_id, rank, ok):
                store.done(job_id, rank, ok)
            case BeginLoad(root, keys, first_chunk):
                geometry = self._geometry(root)
                return self._begun(
                    session, store.begin_load(geometry, split_keys(keys), first_chunk, owner=session.owner)
                )
            case BeginStore(root, keys, first_chunk):
                geometry = self._geometry(root)
                return Begun(store.begin_store(geometry, split_keys(keys), first_chunk, owner=session.owner))
            case Cancel(job_id):
                store.cancel(job_id)
            case Register(engine, rank, geometry):
                self._register(session, engine, rank, geometry)
            case AskGeometry(engine):
                return Agreed(store.geometry(engine))
            case AskStats():
                return Values({**store.stats(), **self.meter.snapshot(), "server_clients": len(self.sessions)})
            case Check():
                store.check()
            case Bye():
                self.end(session, "leaves")
        return Done()

    def _geometry(self, root: bytes) -> Geometry:
        geometry = self._geometries.get(root)
        if geometry is None:
            raise ConfigError("no live client has registered this geometry")
        return geometry

    def _begun(self, session: Session, job: Job | None) -> Begun:
        if job is not None and not job.ready:
            session.awaits_until = self._clock() + 2 * self._options.load_deadline_seconds
        return Begun(job)

    def _register(self, session: Session, engine: str, rank: int, geometry: Geometry) -> None:
        chunk_tokens = self._options.chunk_tokens
        if geometry.chunk_tokens != chunk_tokens and not self._is_private:
            raise ConfigError(
                f"engine {engine} has chunks of {geometry.chunk_tokens} tokens, and this server has chunks of "
                f"{chunk_tokens}: set chunk_tokens={chunk_tokens}"
            )
        if len(session.registered) >= _MOST_REGISTERED:
            raise ConfigError(f"one client registers at most {_MOST_REGISTERED} ranks")
        self._store.register(engine, rank, geometry)
        root = root_key(geometry)
        session.registered[engine, rank] = root
        self._geometries[root] = geometry
