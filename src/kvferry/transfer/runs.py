"""Copies of many pages as few long ones: between a pool and a buffer on the device a kernel moves pages, between the
buffer and the arena a copy engine moves runs of them.

An arena keeps the pages of one layer and chunk side by side; a pool has them anywhere. Told of single pages, a copy
engine needs a microsecond of the host's time for each, and for as long as it has work, copies of 64 KiB and more that
others want the same way, such as a pass's inputs, do not begin. So it is told of runs, and between two calls that load
it is idle for a moment, in which others' copies begin.

Knows addresses and streams; no block, no part and no store.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, Protocol

import numpy as np

from kvferry.observability.log import OnceLog
from kvferry.transfer.plan import Direction, Plan

logger = logging.getLogger(__name__)

PIECE_BYTES: Final = 64 << 20
"""What is sent at once, through one half of the buffer. A kernel that moves pages waits for one of a pass's to end, up
to two milliseconds, whatever the priority of its stream, and the wire waits for the half. An H200 that computes gets
13, 22, 33 or 39 GB/s in pieces of 16, 32, 64 or 128 MiB, and nearly 50 in any while it does not."""
_LONGEST_PAGE_BYTES: Final = 256 << 10
"""Longer ones are moved as several. A piece may exceed its size by less than this."""
_SHORTEST_RUN_BYTES: Final = 192 << 10
"""On average: where they are shorter pages are so small that who lists them falls behind the wire."""


class PageMover(Protocol):
    """What moves pages on the device (`kernels.PageKernel`)."""

    def can_move(self, plan: Plan) -> bool: ...

    def listed(self, plan: Plan, stream: Any) -> AbstractContextManager[Callable[[int, int], None]]: ...


class RunCopies:
    """Copies one way between pinned memory and one device. Thread-safe.

    wire: the stream that the copy engine's work goes to. allocate: from a number of bytes, the address of a buffer on
    the device. pages: moves them there. cut: divides copies that the driver would refuse as a whole. send: enqueues
    copies on a stream.
    """

    def __init__(
        self,
        direction: Direction,
        wire: Any,
        allocate: Callable[[int], int],
        pages: PageMover,
        cut: Callable[[Plan], Plan],
        send: Callable[[Plan, Any], None],
    ) -> None:
        self._direction, self._is_load = direction, direction is Direction.TO_POOL
        self._wire = wire
        self._allocate, self._pages = allocate, pages
        self._cut, self._send = cut, send
        self._buffer: int | None = None
        self._num_pieces = 0
        """So far; they take turns with the halves of the buffer."""
        self._left: list[Any] = [None, None]
        """Events by half of the buffer: it is free again. None: it was never used."""
        self._seen: Any = None
        """An event of the stream that a piece goes to second: the last one has left the first."""
        self._works = True
        self._log = OnceLog(logger)
        self._lock = threading.Lock()

    def copy(self, plan: Plan, stream: Any) -> Any:
        """The stream with whose work so far these copies end, if they are made this way, else None. They come after
        what `stream` was given so far, as far as the pool is concerned."""
        if not (self._works and len(plan.sizes)):
            return None
        if not self._is_load and plan.num_bytes >= len(plan.sizes) * _LONGEST_PAGE_BYTES:
            return None  # As they are, they are long enough, and hardly anybody waits for the wire that way.
        if int(plan.sizes.max()) > _LONGEST_PAGE_BYTES:
            plan = plan.cut_at_edges(plan.sources, 0, _LONGEST_PAGE_BYTES)
        if not (self._has_runs(plan) and self._pages.can_move(plan)):
            return None
        with self._lock:
            try:
                return self._copy(plan, stream) if self._works else None
            except Exception as error:  # noqa: BLE001 - compilers and allocators raise what they like
                self._works = False
                way = self._direction.value
                self._log.warn("runs", "%s: pages are copied one by one, which is slower: %r", way, error)
                return None

    def _copy(self, plan: Plan, stream: Any) -> Any:
        half_bytes = PIECE_BYTES + _LONGEST_PAGE_BYTES
        if self._buffer is None:
            self._buffer = self._allocate(2 * half_bytes)
        starts = (np.cumsum(plan.sizes) - plan.sizes).astype(np.int64)
        pieces = self._num_pieces + starts // PIECE_BYTES
        heads = np.searchsorted(pieces, np.arange(self._num_pieces, pieces[-1] + 2))
        within = starts - starts[heads[pieces - self._num_pieces]]
        places = (self._buffer + pieces % 2 * half_bytes + within).astype(np.uint64)
        before, after = Plan(plan.sources, places, plan.sizes), Plan(places, plan.destinations, plan.sizes)
        wired, moved = (before, after) if self._is_load else (after, before)
        runs = self._cut(wired.joined())  # The halves do not touch: none is of both.
        run_starts = (np.cumsum(runs.sizes) - runs.sizes).astype(np.int64)
        run_heads = [*np.searchsorted(run_starts, starts[heads[:-1]]).tolist(), len(run_starts)]
        first, second = (self._wire, stream) if self._is_load else (stream, self._wire)
        if self._seen is not None:
            first.wait_event(self._seen)  # Of a load: the moment in which the copy engine has nothing to do.
        with self._pages.listed(moved, stream) as move:
            bounds = zip(itertools.pairwise(run_heads), itertools.pairwise(heads.tolist()), strict=True)
            for of_runs, of_pages in bounds:
                half, self._num_pieces = self._num_pieces % 2, self._num_pieces + 1
                send, place = partial(self._send, runs.only(slice(*of_runs)), self._wire), partial(move, *of_pages)
                if self._left[half] is not None:
                    first.wait_event(self._left[half])
                (send if self._is_load else place)()
                second.wait_event(first.record_event())
                self._seen = second.record_event()
                (place if self._is_load else send)()
                self._left[half] = second.record_event()
        return second

    def _has_runs(self, plan: Plan) -> bool:
        """Whether pages follow each other in the arena: at least every second one the one before it."""
        in_arena = plan.in_arena(self._direction)
        num_runs = 1 + np.count_nonzero(in_arena[1:] != in_arena[:-1] + plan.sizes[:-1])
        return bool(num_runs * 2 <= len(plan.sizes) and num_runs * _SHORTEST_RUN_BYTES <= plan.num_bytes)
