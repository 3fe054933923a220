"""Copies the bytes of jobs between the engine's pool and the arena, and tells the store how each job ended.

Knows jobs, slots and blocks; never a request, a token or a key. Called from the thread that runs the forward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from kvferry.observability.metrics import Meter
from kvferry.offload.metadata import CopyJob
from kvferry.store.arena import Arena
from kvferry.store.base import BlockStore
from kvferry.transfer.copy import Copy, CopyEngine
from kvferry.transfer.plan import Direction, PartBlocks

logger = logging.getLogger(__name__)


class Mover:
    """One rank's copies. `engines[group]` copies between that group's pool and the arena.

    Every job that is given here ends with one `done`: ok only if all its bytes were copied while all its slots were
    still its own.
    """

    def __init__(self, store: BlockStore, arena: Arena, engines: Sequence[CopyEngine], rank: int) -> None:
        self.meter = Meter()
        self._store = store
        self._arena = arena
        self._engines = engines
        self._rank = rank
        self._loading: dict[int, tuple[CopyJob, list[Copy] | None]] = {}

    def begin_load(self, job: CopyJob, stream: Any) -> None:
        """Start copying into the pool; `end_loads` waits for it."""
        self._loading[job.job_id] = job, self._submit(Direction.TO_POOL, job, stream)

    def end_loads(self) -> list[int]:
        """Wait for all loads begun; returns the ids of those whose blocks hold garbage."""
        loading, self._loading = self._loading, {}
        return [job.job_id for job, copies in loading.values() if not self._end(job, copies)]

    def save(self, jobs: Sequence[CopyJob], stream: Any) -> None:
        """Copy out of the pool, after the work that `stream` was given; returns when all is copied."""
        begun = [(job, self._submit(Direction.FROM_POOL, job, stream)) for job in jobs]
        for job, copies in begun:
            self._end(job, copies)

    def give_up(self, job: CopyJob) -> None:
        """End a job without copying: its blocks hold nothing worth keeping, or nobody waits for them any more."""
        self._store.done(job.job_id, self._rank, ok=False)

    def close(self) -> None:
        """End loads under way, then the copying threads."""
        self.end_loads()
        for engine in self._engines:
            engine.close()

    def _submit(self, direction: Direction, job: CopyJob, stream: Any) -> list[Copy] | None:
        """The job's copies under way; None: they cannot be made."""
        if not self._holds(job):
            return None
        copies = []
        try:
            for group, engine in enumerate(self._engines):
                parts = [
                    PartBlocks(part.slots[self._rank].offset, part.first_block, part.block_ids)
                    for part in job.parts
                    if part.group == group
                ]
                copies.append(engine.submit(direction, parts, stream))
        except Exception:  # the job's boundary: whatever went wrong, the job has failed and the pass goes on
            self.meter.add("jobs_failed")
            logger.warning("a copy could not be made; its tokens are computed instead", exc_info=True)
            self._finish(copies)
            return None
        return copies

    def _end(self, job: CopyJob, copies: list[Copy] | None) -> bool:
        """Wait for a job's copies and tell the store. A slot that changed meanwhile makes them worthless."""
        copied = copies is not None and self._finish(copies) and self._holds(job)
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

    def _holds(self, job: CopyJob) -> bool:
        held = all(self._arena.holds(part.slots[self._rank]) for part in job.parts)
        if not held:
            self.meter.add("jobs_with_lost_slots")
        return held
