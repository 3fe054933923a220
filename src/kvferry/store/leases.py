"""Jobs under way: who works on which entries, and until when. Knows entries by identity; not where their bytes are.

Callers serialise.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvferry.blocks import Job, JobKind, Part
from kvferry.store.base import PollResult
from kvferry.store.index import Entry, EntryId, EntryState

_MOST_ANSWERS: Final = 4096


@dataclass(slots=True, eq=False)
class Lease:
    """A job that ranks work on.

    deadline: when the lease lapses. ready_by: when the wait for lower tiers ends. ranks: those that have not said done.
    ok: whether all that have said so were. awaited: the entries that tiers still fill.
    """

    job: Job
    owner: str
    deadline: float
    ready_by: float
    entries: list[Entry]
    ranks: set[int]
    ok: bool = True
    awaited: set[Entry] = field(default_factory=set)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)


class LeaseTable:
    """Leases by job id.

    boot_id: of the store, in hexadecimal. Job ids begin at a number made of it, so that what a rank says of a job of a
    store that is gone means none of this one's.
    """

    def __init__(self, boot_id: str, lease_seconds: float, ready_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._ready_seconds = ready_seconds
        self._job_ids = itertools.count(int(boot_id[:10], 16) << 16)
        self._leases: dict[int, Lease] = {}
        """In the order of their deadlines, as all leases are equally long."""
        self._waiting: dict[int, Lease] = {}
        """Those that lower tiers have not answered, in the order of their `ready_by`."""
        self._answers: dict[str, dict[int, bool]] = {}
        """Of each owner's jobs that waited for lower tiers: what these have said and the owner does not know yet."""

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter([*self._leases.values()])

    def open(
        self, kind: JobKind, entries: Sequence[tuple[int, Entry]], num_ranks: int, owner: str, now: float
    ) -> Lease:
        """A new lease on entries, each with the number of its chunk, for a job of so many ranks."""
        parts = tuple(Part(chunk, entry.id[1], entry.slots) for chunk, entry in entries)
        awaited = {entry for _, entry in entries if entry.state is EntryState.PROMOTING}
        lease = Lease(
            Job(next(self._job_ids), kind, parts, ready=not awaited),
            owner,
            now + self._lease_seconds,
            now + self._ready_seconds,
            [entry for _, entry in entries],
            set(range(num_ranks)),
            awaited=awaited,
        )
        self._leases[lease.job.job_id] = lease
        if awaited:
            self._waiting[lease.job.job_id] = lease
        return lease

    def find(self, job_id: int) -> Lease | None:
        """The lease of a job that is under way."""
        return self._leases.get(job_id)

    def end(self, lease: Lease) -> None:
        """The job is over."""
        self._leases.pop(lease.job.job_id, None)
        self._waiting.pop(lease.job.job_id, None)
        self._answers.get(lease.owner, {}).pop(lease.job.job_id, None)

    def answer(self, lease: Lease, *, ok: bool) -> None:
        """Lower tiers have filled all slots of a job, or will not. Owners that never ask are not told of everything."""
        self._waiting.pop(lease.job.job_id, None)
        answers = self._answers.setdefault(lease.owner, {})
        answers[lease.job.job_id] = ok
        if len(answers) > _MOST_ANSWERS:
            del answers[next(iter(answers))]

    def has_answers(self, owner: str) -> bool:
        """Whether `take_answers` has something to say."""
        return bool(self._answers.get(owner))

    def take_answers(self, owner: str) -> PollResult:
        """What the owner does not know yet."""
        answers = self._answers.pop(owner, {})
        ready = tuple(job_id for job_id, ok in answers.items() if ok)
        return PollResult(ready, tuple(job_id for job_id, ok in answers.items() if not ok))

    def forget(self, owner: str) -> None:
        """The owner will not ask any more."""
        self._answers.pop(owner, None)

    def waiting_for(self, entry: Entry) -> list[Lease]:
        """Leases that wait for a tier to fill this entry."""
        return [lease for lease in self._waiting.values() if entry in lease.awaited]

    def overdue(self, now: float) -> list[Lease]:
        """Leases whose tiers have not answered in time."""
        return [*itertools.takewhile(lambda lease: lease.ready_by <= now, self._waiting.values())]

    def expired(self, now: float) -> list[Lease]:
        """Leases whose deadline has come."""
        return [*itertools.takewhile(lambda lease: lease.deadline <= now, self._leases.values())]

    def next_ready_by(self, owner: str) -> float | None:
        """When the owner's first wait for lower tiers ends; None: it does not wait."""
        return next((lease.ready_by for lease in self._waiting.values() if lease.owner == owner), None)

    def pins(self) -> Counter[EntryId]:
        """How many live leases each entry has."""
        return Counter(entry.id for lease in self._leases.values() for entry in lease.entries)
