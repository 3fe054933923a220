"""A store in another process of this machine. Knows no engine and no tensor.

Whatever goes wrong is a miss within a deadline. While a server is off (`Attendance`) it is not asked at all, and
nothing here waits for the thread that looks for it.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Final

import zmq

from kvferry.blocks import Geometry, Job, Tier
from kvferry.config import StoreOptions
from kvferry.errors import ConfigError, InvariantError, StoreError
from kvferry.observability.metrics import Meter
from kvferry.server import protocol
from kvferry.server.attendance import Attendance
from kvferry.server.endpoint import Endpoint
from kvferry.server.link import Link
from kvferry.store.arena import Arena
from kvferry.store.base import ArenaInfo, Match, PollResult
from kvferry.store.keys import root_key

logger = logging.getLogger(__name__)

_MOST_FAILURES: Final[Mapping[type[protocol.Question], int]] = {protocol.AskMatch: 3}
"""In a row, else 2; then the server is not asked until it answers the thread that looks for it. A request that waits
longest asks once for a match and twice for a job."""
_MOST_AWAITED: Final = 1024
_LINGER_SECONDS: Final = 0.2
_LOCK_SECONDS: Final = 0.005
_SLICE_SECONDS: Final = 0.02
_PROOF_SECONDS: Final = 0.2
_CHECK_SECONDS: Final = 30.0


class StoreClient:
    """A `BlockStore` at `url`, whenever a server is there. Thread-safe.

    options: the deadlines. name: what the server calls this client. maps_arena: for a worker, which copies.
    ConfigError: `url` is none, or keys cannot be read.
    """

    def __init__(self, url: str, options: StoreOptions, *, name: str = "", maps_arena: bool = False) -> None:
        self.meter = Meter()
        self._options = options
        self._maps_arena = maps_arena
        endpoint = Endpoint.parse(url)
        client_id = secrets.token_bytes(16)
        self._context = zmq.Context(io_threads=1)
        try:
            self._questions = Link(
                self._context, endpoint, protocol.QUESTIONS_LINK + client_id, options, self._take_unasked
            )
            self._attendance_link = Link(self._context, endpoint, protocol.ATTENDANCE_LINK + client_id, options)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self._lock = threading.Lock()
        """Of the link for questions. Held while waiting only by who asks, and by the proof while the server is off."""
        self._failures: Counter[type[protocol.Question]] = Counter()
        """Questions of a kind that were not answered, in a row."""
        self._root: tuple[Geometry | None, bytes] = (None, b"")
        self._awaited: dict[int, float] = {}
        """Loads that wait for lower tiers, and until when."""
        self._polled: deque[protocol.Polled] = deque(maxlen=_MOST_AWAITED)
        self._arena_info: ArenaInfo | None = None
        self._taken_arena: Arena | None = None
        self._other_arena: Arena | None = None
        self._arena_lock = threading.Lock()
        self._attendance = Attendance(self._attendance_link, endpoint, self, name, options.connect_deadline_seconds)

    # -- setting up --------------------------------------------------------------------------------------------------

    def register(self, engine: str, rank: int, geometry: Geometry) -> None:
        """See `BlockStore.register`. With every server to come, too: what that one refuses is logged."""
        self._attendance.register(engine, rank, geometry)

    def geometry(self, engine: str) -> Geometry | None:
        """See `BlockStore.geometry`. As last heard, and only the first question waits."""
        return self._attendance.geometry(engine)

    def arena(self) -> ArenaInfo:
        """See `BlockStore.arena`. StoreError: no server has come so far."""
        if not self._attendance.await_on() and self._arena_info is None:
            raise StoreError("no cache server has come so far")
        assert self._arena_info is not None
        return self._arena_info

    # -- during passes -----------------------------------------------------------------------------------------------

    def match(self, geometry: Geometry, keys: Sequence[bytes]) -> Match:
        """See `BlockStore.match`."""
        question = protocol.AskMatch(self._root_of(geometry), protocol.join_keys(keys))
        answer = self._ask(question, self._options.match_deadline_seconds)
        return answer.match if isinstance(answer, protocol.Found) else Match(0)

    def locate(self, geometry: Geometry, keys: Sequence[bytes]) -> Sequence[Tier | None]:
        """See `BlockStore.locate`."""
        question = protocol.AskPlaces(self._root_of(geometry), protocol.join_keys(keys))
        answer = self._ask(question, self._options.match_deadline_seconds)
        return answer.tiers if isinstance(answer, protocol.Places) else []

    def begin_load(
        self, geometry: Geometry, keys: Sequence[bytes], first_chunk: int, *, salt: str | None = None
    ) -> Job | None:
        """See `BlockStore.begin_load`."""
        job = self._begin(protocol.BeginLoad(self._root_of(geometry), protocol.join_keys(keys), first_chunk, salt))
        if job is not None and not job.ready:
            while len(self._awaited) >= _MOST_AWAITED:  # Whoever loads beside the passes never polls.
                del self._awaited[next(iter(self._awaited))]
            self._awaited[job.job_id] = time.monotonic() + 2 * self._options.load_deadline_seconds
        return job

    def begin_store(
        self, geometry: Geometry, keys: Sequence[bytes], first_chunk: int, *, salt: str | None = None
    ) -> Job | None:
        """See `BlockStore.begin_store`."""
        return self._begin(protocol.BeginStore(self._root_of(geometry), protocol.join_keys(keys), first_chunk, salt))

    def done(self, job_id: int, rank: int, ok: bool) -> None:
        """See `BlockStore.done`. Said and not waited for: what is lost leaves the job to its lease's end."""
        self._tell(protocol.JobDone(job_id, rank, ok))

    def cancel(self, job_id: int) -> None:
        """See `BlockStore.cancel`. Said and not waited for."""
        self._awaited.pop(job_id, None)
        self._tell(protocol.Cancel(job_id))

    def poll(self, timeout_seconds: float = 0.0) -> PollResult:
        """See `BlockStore.poll`. A load whose server is off has failed."""
        deadline = time.monotonic() + timeout_seconds
        while self._awaited:
            remaining_seconds = deadline - time.monotonic()
            with self._lock:
                self._questions.listen(max(0.0, min(remaining_seconds, _SLICE_SECONDS)))
            answers = [self._polled.popleft() for _ in range(len(self._polled))]
            ready = [job_id for answer in answers for job_id in answer.ready]
            failed = [job_id for answer in answers for job_id in answer.failed]
            now = time.monotonic()
            is_on = self._attendance.watch() if timeout_seconds > 0 else self._attendance.is_on
            for job_id, until in [*self._awaited.items()]:
                if job_id in ready or job_id in failed:
                    del self._awaited[job_id]
                elif now >= until or not is_on:
                    del self._awaited[job_id]
                    failed.append(job_id)
            if ready or failed or remaining_seconds <= 0:
                return PollResult(tuple(ready), tuple(failed))
        return PollResult()

    def is_alive(self) -> bool:
        """Whether the server is on. For one who waits for what only it can bring, and asks again and again."""
        return self._attendance.watch()

    # -- the arena, for a worker -------------------------------------------------------------------------------------

    @property
    def has_other_arena(self) -> bool:
        """Whether there is a mapping that nobody has taken. `take_arena` closes the last one: let go of it before."""
        return self._other_arena is not None

    def take_arena(self) -> Arena:
        """The newest mapping. The client closes it in the end, or when another is taken."""
        with self._arena_lock:
            last, self._taken_arena, self._other_arena = self._taken_arena, self._other_arena, None
        if last is not None:
            last.close()
        assert self._taken_arena is not None, "there was another"
        return self._taken_arena

    # -- the rest ----------------------------------------------------------------------------------------------------

    def stats(self) -> Mapping[str, float]:
        """See `BlockStore.stats`. The client's own counters alone while the server is off."""
        answer = self._ask(protocol.AskStats(), self._options.job_deadline_seconds)
        return {**(answer.values if isinstance(answer, protocol.Values) else {}), **self.meter.snapshot()}

    def check(self) -> None:
        """See `BlockStore.check`. Of a server that is off nothing is known."""
        answer = self._ask(protocol.Check(), _CHECK_SECONDS)
        if isinstance(answer, protocol.Broken):
            raise InvariantError(answer.reason)

    def close(self) -> None:
        """End the session: what it leased returns. The server goes on. Further calls are errors."""
        self._attendance.close()
        self._attendance_link.close()
        with self._lock:
            self._questions.tell(protocol.Bye())
            self._questions.close(_LINGER_SECONDS)
            self._context.term()
        for arena in (self._taken_arena, self._other_arena):
            if arena is not None:
                arena.close()

    def _root_of(self, geometry: Geometry) -> bytes:
        known, root = self._root
        if geometry is not known:
            root = root_key(geometry)
            self._root = geometry, root
        return root

    def _begin(self, question: protocol.BeginLoad | protocol.BeginStore) -> Job | None:
        answer = self._ask(question, self._options.job_deadline_seconds)
        return answer.job if isinstance(answer, protocol.Begun) else None

    def _ask(self, question: protocol.Question, timeout_seconds: float) -> protocol.Answer | None:
        """The answer, or None: the server is off, or did not answer in time."""
        if not self._attendance.is_on or not self._lock.acquire(timeout=timeout_seconds):
            return None
        try:
            answer = self._questions.ask(question, timeout_seconds)
        finally:
            self._lock.release()
        kind = type(question)
        if answer is not None and not isinstance(answer, protocol.Stranger):
            self._failures[kind] = 0
            return answer
        self.meter.add("client_unanswered")
        self._failures[kind] += 1
        if self._failures[kind] >= _MOST_FAILURES.get(kind, 2) or answer is not None:
            self._failures.clear()
            self._attendance.trip(ends=answer is not None)
        return None

    def _tell(self, question: protocol.Question) -> None:
        self._questions.tell(question)
        if self._lock.acquire(timeout=_LOCK_SECONDS):
            self._questions.flush()
            self._lock.release()

    def _take_unasked(self, answer: protocol.Answer) -> None:
        match answer:
            case protocol.Polled():
                self._polled.append(answer)
            case protocol.Begun(job) if job is not None:  # It came too late: nobody is going to copy anything.
                self._questions.tell(protocol.Cancel(job.job_id))

    # -- in the attendance's thread ----------------------------------------------------------------------------------

    def welcomed(self, welcome: protocol.Welcome) -> None:
        """See `Attended`. With a server that was not there before, all that was said is void."""
        if welcome.arena == self._arena_info:
            return
        if self._maps_arena:
            arena = Arena.attach(welcome.arena)
            with self._arena_lock:
                missed, self._other_arena = self._other_arena, arena
            if missed is not None:
                missed.close()
        self._questions.forget()
        self._arena_info = welcome.arena

    def prove(self) -> bool:
        """See `Attended`."""
        with self._lock:
            self._questions.await_connected(_PROOF_SECONDS)
            return self._questions.ask(protocol.Beat(), _PROOF_SECONDS) is not None

    def listen(self) -> None:
        """See `Attended`."""
        if self._lock.acquire(blocking=False):
            self._questions.listen()
            self._lock.release()
