"""Copies the bytes of jobs between the engine's pool and the arena, and tells the store how each job ended.

Loads of a pass, and what must be saved within it, run in the calling thread, which runs the forward pass; loads of
requests that are not in the batch are begun in one thread and waited for in another, so that copies follow each other
without a gap, and saves of blocks that outlive the pass run in a third, so that no load waits behind saves.

Knows jobs, slots and blocks; never a request, a token or a key.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from kvferry.blocks import Slot
from kvferry.config import StoreOptions
from kvferry.observability.metrics import Meter
from kvferry.offload.background import Background, Readiness, Task
from kvferry.offload.metadata import CopyJob, LoadEnd, PartCopy
from kvferry.offload.stores import RankStore
from kvferry.store.arena import COMMITTED, Arena, SlotLock
from kvferry.transfer.copy import Copier, Copy, CopyEngine, mark
from kvferry.transfer.layout import Layout
from kvferry.transfer.plan import Direction, PartBlocks

logger = logging.getLogger(__name__)

_MOST_LOAD_ENDS = 1024
"""Of those that nobody asks for, the last are kept."""

_MOST_BEGUN = 8
"""Loads beside the passes under way at once: copies follow each other, and their locks take few descriptors."""
_MOST_BEGUN_BYTES = 1 << 30
"""While there are no more the calling thread begins loads itself: it takes some milliseconds, and the driver takes them
all before the device has copied any."""

_SAMPLING_SECONDS = 0.002
"""After a pass the engine samples, and its tokens leave the device on the wire that saves would fill: they let them go
first, as vLLM's OffloadingConnector does, which saves with the next step."""


class PassEnd:
    """When saves of one pass may begin. event: marks the pass's last work (`transfer.copy.mark`); None: it has ended,
    and there is no wire. For one thread."""

    def __init__(self, event: Any) -> None:
        self._event = event
        self._until = 0.0

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
            self._event, self._until = None, time.monotonic() + _SAMPLING_SECONDS
        time.sleep(max(0.0, self._until - time.monotonic()))


class Mover:
    """One rank's copies between the arena and its pools, one a group.

    arena: this process's mapping of the store's. passing_groups: those whose blocks the engine takes back while their
    request runs, so that they are saved within the pass. From `options` it takes what they say of chunks and waits.

    Every job that is given here ends with one `done`: ok only if all its bytes were copied while all its slots were
    still its own, which they are from its first copy to its last (`Arena.begin_reading`, `begin_writing`).
    """

    def __init__(
        self,
        store: RankStore,
        arena: Arena,
        layouts: Sequence[Layout],
        options: StoreOptions,
        rank: int,
        passing_groups: frozenset[int] = frozenset(),
    ) -> None:
        self.meter = Meter()
        self._store = store
        self._arena = arena
        self._copier = Copier(layouts[0].device, arena.buffer)
        self._engines = [CopyEngine(of, self._copier, of.blocks_per_part(options.chunk_tokens)) for of in layouts]
        self._rank = rank
        self._passing_groups = passing_groups
        self._ready_seconds = options.load_deadline_seconds
        self._loads = Background(f"kvferry-loads-{rank}")
        self._ends = Background(f"kvferry-ends-{rank}")
        """Where loads that have begun are waited for."""
        self._begun: dict[int, int] = {}
        """By job id, bytes of loads beside the passes that have begun."""
        self._room = threading.Condition()
        """For them."""
        self._saves = Background(f"kvferry-saves-{rank}")
        self._groups = frozenset(range(len(layouts)))
        self._loading: dict[int, tuple[CopyJob, list[Copy] | None]] = {}
        self._ahead: list[Copy] = []
        self._load_ends: deque[LoadEnd] = deque(maxlen=_MOST_LOAD_ENDS)
        self._locks: dict[int, SlotLock] = {}
        """By job id, from a job's first copy to its last."""

    # -- within the pass ---------------------------------------------------------------------------------------------

    def begin_load(self, job: CopyJob, stream: Any) -> None:
        """Start copying into the pool, after the work that `stream` was given so far."""
        self._loading[job.job_id] = job, self._submit(Direction.TO_POOL, job, self._groups, mark(stream))

    def wait_for_layer(self, layer: int, stream: Any) -> None:
        """What `stream` is given from now on comes after this layer's loads, unless they failed."""
        for _, copies in self._loading.values():
            for copy in copies or ():
                with contextlib.suppress(Exception):  # `end_loads` meets it again
                    copy.wait_for_layer(layer, stream)

    def end_loads(self) -> list[int]:
        """Wait for all loads begun; returns the ids of those whose blocks hold garbage."""
        loading, self._loading = self._loading, {}
        return [job.job_id for job, copies in loading.values() if not self._end(job, copies)]

    # -- beside the passes; `take_ended` reports each job once -------------------------------------------------------

    def load_beside(self, job: CopyJob, after: Any) -> None:
        """Copy into the pool once the slots are filled, after the work that `after` marks (`transfer.copy.mark`).

        What only has to be enqueued, and is not much, is enqueued here: while a pass is being launched, a thread would
        wait for its turn with the interpreter at each of its calls.
        """
        since = time.monotonic()
        if job.ready and self._is_pinned(job) and self._has_room(job, waits=False):
            self._end_later(job, self._submit(Direction.TO_POOL, job, self._groups, after), since)
            return
        task = Task(job.job_id, lambda wanted: self._load(job, after, since, wanted=wanted))
        if job.ready:
            self._loads.submit(task)
        else:
            self._loads.wait_for(task, lambda: self._readiness(job), self._ready_seconds)

    def _is_pinned(self, job: CopyJob) -> bool:
        """Whether a device copies all of a load without its host's help."""
        cuda = self._copier.cuda
        slots = (self._slot(part) for part in job.parts)
        return cuda is not None and cuda.are_pinned([(slot.offset, slot.num_bytes) for slot in slots])

    def load_ahead(self, job: CopyJob, after: Any) -> bool:
        """Like `load_beside`, for blocks that count as filled at once: every later pass is to be ordered by
        `order_after_loads`, and waits on the device while its kernels are being launched. False, and nothing has begun:
        copies are not in the order of a device's work here, or the load cannot be made."""
        if self._copier.cuda is None or not job.ready:
            return False
        since = time.monotonic()
        copies = self._submit(Direction.TO_POOL, job, self._groups, after)
        if copies is None:
            return False
        self._ahead += copies
        self._end_later(job, copies, since)
        return True

    def order_after_loads(self, stream: Any) -> None:
        """What `stream` is given from now on comes after all that is loaded ahead."""
        self._ahead = [copy for copy in self._ahead if copy.precede(stream)]

    def order_layer_after_loads(self, layer: int, stream: Any) -> None:
        """The same of one layer."""
        for copy in self._ahead:
            copy.wait_for_layer(layer, stream)

    @property
    def is_ahead(self) -> bool:
        """Whether what was loaded ahead may still be under way."""
        return bool(self._ahead)

    def save(self, jobs: Sequence[CopyJob], stream: Any) -> None:
        """Copy out of the pool, after the work that `stream` was given so far. What passing groups have is copied when
        this returns; the blocks of the others must stay as they are until `take_ended` reports the job."""
        written = mark(stream)
        end = PassEnd(written)
        begun = [
            (job, self._submit(Direction.FROM_POOL, job, self._passing_groups, written) if self._passing_groups else [])
            for job in jobs
        ]
        for job, copies in begun:
            task = Task(job.job_id, partial(self._save, job, written, end))
            self._saves.submit(task, wanted=copies is not None and self._finish(copies))

    def cancel(self, job_id: int) -> None:
        """A load beside the passes is not needed: it ends at once, unless its copies have begun."""
        self._loads.cancel(job_id)

    def flush(self, job_ids: Collection[int]) -> None:
        """Return when these jobs beside the passes have ended: their blocks are about to be given to others."""
        self._loads.flush(job_ids)
        self._ends.flush(job_ids)
        self._saves.flush(job_ids)

    def wait_for_end(self, seconds: float) -> None:
        """Return when a load beside the passes has ended, or a save if there are no loads, or after so long."""
        threads = (self._ends, self._loads, self._saves)
        next((thread for thread in threads if thread.is_busy), self._saves).wait_for_end(seconds)

    def take_ended(self) -> dict[int, bool]:
        """Ids of jobs beside the passes that ended since the last call, and whether every byte was copied."""
        return self._loads.take_ended() | self._ends.take_ended() | self._saves.take_ended()

    def take_load_ends(self) -> list[LoadEnd]:
        """How loads beside the passes ended since the last call."""
        return [self._load_ends.popleft() for _ in range(len(self._load_ends))]

    def close(self) -> None:
        """End loads under way, then what runs beside the passes, then the copying threads."""
        self.end_loads()
        self._loads.close()
        self._ends.close()
        self._saves.close()
        self._copier.close()

    def _load(self, job: CopyJob, after: Any, since: float, *, wanted: bool) -> None:
        """The body of a load's task."""
        wanted = wanted and self._has_room(job, waits=True)
        copies = self._submit(Direction.TO_POOL, job, self._groups, after) if wanted else None
        self._end_later(job, copies, since)

    def _has_room(self, job: CopyJob, *, waits: bool) -> bool:
        """Whether a load may begin now, which then counts as begun. waits: it may once there are few enough others."""
        num_bytes = sum(self._slot(part).num_bytes for part in job.parts)
        with self._room:
            if waits:
                self._room.wait_for(lambda: len(self._begun) < _MOST_BEGUN)
            elif len(self._begun) >= _MOST_BEGUN or sum(self._begun.values()) + num_bytes > _MOST_BEGUN_BYTES:
                return False
            self._begun[job.job_id] = num_bytes
            return True

    def _end_later(self, job: CopyJob, copies: list[Copy] | None, since: float) -> None:
        self._ends.submit(Task(job.job_id, lambda _: self._end_load(job, copies, since)))

    def _end_load(self, job: CopyJob, copies: list[Copy] | None, since: float) -> bool:
        ok = self._end(job, copies)
        with self._room:
            self._begun.pop(job.job_id, None)
            self._room.notify()
        self._load_ends.append(LoadEnd(job.job_id, time.monotonic() - since, ok))
        return ok

    def _save(self, job: CopyJob, written: Any, end: PassEnd, wanted: bool) -> bool:
        """The body of a save's task."""
        copies = None
        if wanted:
            end.wait()
            copies = self._submit(Direction.FROM_POOL, job, self._groups - self._passing_groups, written)
        return self._end(job, copies)

    def _readiness(self, job: CopyJob) -> Readiness:
        """What the headers of this rank's slots say of the lower tiers' work."""
        for part in job.parts:
            state = self._arena.state_of(self._slot(part))
            if state is None:
                return Readiness.NEVER
            if state != COMMITTED:
                return Readiness.NOT_YET if self._store.is_alive() else Readiness.NEVER
        return Readiness.READY

    # -- copies ------------------------------------------------------------------------------------------------------

    def _submit(self, direction: Direction, job: CopyJob, groups: frozenset[int], after: Any) -> list[Copy] | None:
        """The copies of a job's parts of these groups under way; None: they cannot be made."""
        copies = []
        try:
            if not self._lock_slots(direction, job):
                return None
            for group in sorted(groups):
                parts = [
                    PartBlocks(self._slot(part).offset, part.first_block, part.block_ids)
                    for part in self._mine(direction, job)
                    if part.group == group
                ]
                copies.append(self._engines[group].submit(direction, parts, after))
        except Exception:  # the job's boundary: whatever went wrong, the job has failed and the pass goes on
            self.meter.add("jobs_failed")
            logger.warning("a copy could not be made; its tokens are computed instead", exc_info=True)
            self._finish(copies)
            return None
        return copies

    def _end(self, job: CopyJob, copies: list[Copy] | None) -> bool:
        """Wait for a job's copies and tell the store."""
        copied = copies is not None and self._finish(copies)
        lock = self._locks.pop(job.job_id, None)
        if lock is not None:
            lock.end()
        self._store.done(job.job_id, self._rank, copied)
        return copied

    def _finish(self, copies: list[Copy]) -> bool:
        """Wait for every copy, also after one failed: blocks and slots are theirs until then."""
        ok = True
        for copy in copies:
            try:
                copy.wait()
            except Exception:  # the job's boundary
                self.meter.add("jobs_failed")
                logger.warning("a copy failed; its tokens are computed instead", exc_info=True)
                ok = False
        return ok

    def _slot(self, part: PartCopy) -> Slot:
        """This rank's, or the only one, which is shared."""
        return part.slots[self._rank if len(part.slots) > 1 else 0]

    def _mine(self, direction: Direction, job: CopyJob) -> Iterator[PartCopy]:
        """The parts that this rank copies: of shared ones the first rank saves the bytes of all."""
        return (part for part in job.parts if direction is Direction.TO_POOL or self._rank < len(part.slots))

    def _lock_slots(self, direction: Direction, job: CopyJob) -> bool:
        """Whether a job's slots are still its own; then they stay so until its last copy has ended."""
        if job.job_id in self._locks:
            return True
        slots = [self._slot(part) for part in self._mine(direction, job)]
        lock = self._arena.begin_reading(slots) if direction is Direction.TO_POOL else self._arena.begin_writing(slots)
        if lock is None:
            self.meter.add("jobs_with_lost_slots")
            return False
        self._locks[job.job_id] = lock
        return True


class ArenaFollower:
    """What worker halves have in common: a mover, once there are layouts and an arena, and always of the newest one."""

    _store: RankStore | None
    _layouts: Sequence[Layout]
    _mover: Mover | None

    def _make_mover(self, store: RankStore, arena: Arena) -> Mover:
        raise NotImplementedError

    def _take_in(self, ended: Mapping[int, bool]) -> None:
        """Jobs beside the passes that ended, and whether well."""
        raise NotImplementedError

    def _follow_arena(self) -> None:
        """Copy to and from the newest arena: a cache server may have come, or have been started anew. Jobs that were
        begun in another end as failed, as their slots are not in this one."""
        if self._store is None or not (self._layouts and self._store.has_other_arena):
            return
        if self._mover is not None:
            self._mover.close()
            self._take_in(self._mover.take_ended())
            self._mover = None
        self._mover = self._make_mover(self._store, self._store.take_arena())
