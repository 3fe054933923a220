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
from kvferry.server import protocol
from kvferry.server.sessions import MOST_SESSIONS, Session, Sessions
from kvferry.store.keys import root_key
from kvferry.store.managed import ManagedStore

logger = logging.getLogger(__name__)

_CLOCKS_DIFFER_SECONDS: Final = 3600.0
"""Clocks of one machine agree to the microsecond. A greeting may have waited for a server that was stopped."""
_IDLE_SECONDS: Final = 2.0
_CHECK_SECONDS: Final = 60.0
_CHECK_SHARE: Final = 200
"""At most so often, and at most one part in so many of the time."""
_MOST_REGISTERED: Final = 256
"""Ranks that one session may register."""
_MOST_PARTS: Final = 1024
"""Ranks of an engine, and groups. Whatever a client sends, it is not to keep the server busy for long."""


class Answerer:
    """The sessions of one server and what they may ask of `store`, which was made with `options`.

    is_private: the store is one engine's, which may use it in this process as well and takes its ranks with it; else
    chunks have the size that the options say, and engines come and go.
    """

    def __init__(
        self,
        store: ManagedStore,
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
        self._asked_at = self._check_at = clock()
        self._has_changed = False
        self._log = OnceLog(logger)

    def answer(self, client_id: bytes, question: protocol.Question) -> protocol.Answer:
        """What to answer. Never raises."""
        session = self.sessions.find(client_id)
        try:
            if isinstance(question, protocol.Hello):
                return self._greet(client_id, session, question)
            if session is None:
                self.meter.add("server_strangers")
                return protocol.Stranger()
            if not isinstance(question, protocol.Beat | protocol.AskStats):
                self._asked_at, self._has_changed = self._clock(), True
            return self._answer(session, question)
        except (ConfigError, ValueError) as error:
            self.meter.add("server_refused")
            return protocol.Refused(str(error))
        except InvariantError as error:
            return protocol.Broken(str(error))
        except Exception as error:  # noqa: BLE001 - the message boundary
            self.meter.add("server_errors")
            self._log.warn(type(question), "%s could not be answered: %r", type(question).__name__, error)
            return protocol.Refused(repr(error))

    def take_polled(self) -> Iterator[tuple[Session, protocol.Polled]]:
        """What lower tiers have answered to loads of live sessions."""
        now = self._clock()
        for session in self.sessions:
            if session.awaits_until > now:
                polled = self._store.poll(0.0, owner=session.owner)
                if polled.ready or polled.failed:
                    yield session, protocol.Polled(polled.ready, polled.failed)

    @property
    def awaits_tiers(self) -> bool:
        """Whether `take_polled` may soon have something."""
        now = self._clock()
        return any(session.awaits_until > now for session in self.sessions)

    def check_when_idle(self) -> None:
        """Look now and then, when nobody asks, whether the store's books are right. It takes 30 microseconds a part."""
        now = self._clock()
        if self._has_changed and now >= max(self._asked_at + _IDLE_SECONDS, self._check_at):
            self._has_changed = False
            try:
                self._store.check()
            except InvariantError as error:
                self.meter.add("server_broken_invariants")
                logger.error("the store's books are wrong: %s", error)
            took_seconds = self._clock() - now
            self._check_at = now + max(_CHECK_SECONDS, took_seconds * _CHECK_SHARE)

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

    def _greet(self, client_id: bytes, session: Session | None, hello: protocol.Hello) -> protocol.Answer:
        if hello.version != protocol.VERSION:
            return protocol.Refused(f"this is version {protocol.VERSION} of the protocol, not {hello.version}")
        if abs(hello.now - self._clock()) > _CLOCKS_DIFFER_SECONDS:
            return protocol.Refused("the client's clock is that of another machine, with which no memory can be shared")
        if session is not None:
            self.end(session, "begins anew")
        if len(self.sessions) >= MOST_SESSIONS:
            return protocol.Refused(f"there are {MOST_SESSIONS} clients already")
        self.sessions.begin(client_id, hello)
        return protocol.Welcome(self._store.arena())

    def _answer(self, session: Session, question: protocol.Question) -> protocol.Answer:
        """What engines ask."""
        store, owner = self._store, session.owner
        match question:
            case protocol.AskMatch(root, keys):
                return protocol.Found(store.match(self._geometry(root), protocol.split_keys(keys)))
            case protocol.AskPlaces(root, keys):
                return protocol.Places(store.locate(self._geometry(root), protocol.split_keys(keys)))
            case protocol.JobDone(job_id, rank, ok):
                store.done(job_id, rank, ok)
            case protocol.BeginLoad(root, keys, first_chunk, salt):
                geometry, of_chunks = self._geometry(root), protocol.split_keys(keys)
                return self._begun(session, store.begin_load(geometry, of_chunks, first_chunk, owner=owner, salt=salt))
            case protocol.BeginStore(root, keys, first_chunk, salt):
                geometry, of_chunks = self._geometry(root), protocol.split_keys(keys)
                return protocol.Begun(store.begin_store(geometry, of_chunks, first_chunk, owner=owner, salt=salt))
            case protocol.Cancel(job_id):
                store.cancel(job_id)
            case protocol.Register(engine, rank, geometry):
                self._register(session, engine, rank, geometry)
            case protocol.AskGeometry(engine):
                return protocol.Agreed(store.geometry(engine))
            case protocol.Bye():
                self.end(session, "leaves")
            case _:
                return self._manage(question)
        return protocol.Done()

    def _manage(self, question: protocol.Question) -> protocol.Answer:
        """What people ask."""
        store = self._store
        match question:
            case protocol.AskStats():
                return protocol.Values({**store.stats(), **self.meter.snapshot(), "server_clients": len(self.sessions)})
            case protocol.AskModels():
                names = {root: session.name for session in self.sessions for root in session.registered.values()}
                return protocol.Models(
                    [protocol.Model(name, root, self._geometries[root]) for root, name in names.items()]
                )
            case protocol.AskUsage():
                return protocol.Used(store.usage())
            case protocol.AskClients():
                return protocol.Clients([_client_of(session) for session in self.sessions])
            case protocol.Clear(selection):
                return protocol.Counted(store.clear(selection))
            case protocol.Keep(selection, ttl_seconds):
                return protocol.Counted(store.keep(selection, ttl_seconds))
            case protocol.Unkeep(selection):
                return protocol.Counted(store.unkeep(selection))
            case protocol.Bring(root, keys, salt):
                return protocol.Brought(store.prefetch(self._geometry(root), protocol.split_keys(keys), salt=salt))
            case protocol.Check():
                store.check()
        return protocol.Done()

    def _geometry(self, root: bytes) -> Geometry:
        geometry = self._geometries.get(root)
        if geometry is None:
            raise ConfigError("no live client has registered this geometry")
        return geometry

    def _begun(self, session: Session, job: Job | None) -> protocol.Begun:
        if job is not None and not job.ready:
            session.awaits_until = self._clock() + 2 * self._options.load_deadline_seconds
        return protocol.Begun(job)

    def _register(self, session: Session, engine: str, rank: int, geometry: Geometry) -> None:
        chunk_tokens = self._options.chunk_tokens
        if geometry.chunk_tokens != chunk_tokens and not self._is_private:
            raise ConfigError(
                f"engine {engine} has chunks of {geometry.chunk_tokens} tokens, and this server has chunks of "
                f"{chunk_tokens}: set chunk_tokens={chunk_tokens}"
            )
        if len(session.registered) >= _MOST_REGISTERED:
            raise ConfigError(f"one client registers at most {_MOST_REGISTERED} ranks")
        most_bytes = self._store.arena().num_bytes
        if max(geometry.num_ranks, len(geometry.groups)) > _MOST_PARTS or any(
            group.part_bytes > most_bytes for group in geometry.groups
        ):
            raise ConfigError(f"a chunk of engine {engine} does not fit the arena of {most_bytes} bytes")
        self._store.register(engine, rank, geometry)
        root = root_key(geometry)
        session.registered[engine, rank] = root
        self._geometries[root] = geometry


def _client_of(session: Session) -> protocol.Client:
    """What people are told of a session."""
    ranks = [f"{engine}/{rank}" for engine, rank in session.registered]
    return protocol.Client(session.name, session.pid, ranks, session.silent_seconds)
