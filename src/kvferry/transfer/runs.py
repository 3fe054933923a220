"""Loads of many pages as few long copies: an arena's runs go to a buffer on the device, and a kernel places the pages.

An arena keeps the pages of one layer and chunk side by side; a pool has them anywhere. Told of single pages, a copy
engine needs a microsecond of the host's time for each, and for as long as it has work, copies of 64 KiB and more that
others want, such as a pass's inputs, do not begin. So it is told of runs, and between two calls here it is idle for a
moment, in which others' copies begin.

Knows addresses and streams; no block, no part and no store.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final, Protocol

import numpy as np

from kvferry.observability.log import OnceLog
from kvferry.transfer.plan import Plan

logger = logging.getLogger(__name__)

PIECE_BYTES: Final = 64 << 20
"""What is sent at once, into one half of the buffer. A kernel that places pages waits for one of a pass's to end, up
to two milliseconds, whatever the priority of its stream, and the wire waits for the half. An H200 that computes gets
13, 22, 33 or 39 GB/s in pieces of 16, 32, 64 or 128 MiB, and nearly 50 in any while it does not."""
_LONGEST_PAGE_BYTES: Final = 256 << 10
"""Longer ones are placed as several. A piece may exceed its size by less than this."""


class PageMover(Protocol):
    """What moves pages on the device (`kernels.PageKernel`)."""

    def can_move(self, plan: Plan) -> bool: ...

    def listed(self, plan: Plan, stream: Any) -> AbstractContextManager[Callable[[int, int], None]]: ...


class RunLoads:
    """Copies from pinned memory to one device. Thread-safe.

    wire: the stream that the copy engine's work goes to. allocate: from a number of bytes, the address of a buffer on
    the device. pages: moves them there. cut: divides copies that the driver would refuse as a whole. send: enqueues
    copies on a stream.
    """

    def __init__(
        self,
        wire: Any,
        allocate: Callable[[int], int],
        pages: PageMover,
        cut: Callable[[Plan], Plan],
        send: Callable[[Plan, Any], None],
    ) -> None:
        self._wire = wire
        self._allocate, self._pages = allocate, pages
        self._cut, self._send = cut, send
        self._buffer: int | None = None
        self._placed: list[Any] = [None, None]
        """Events by half of the buffer: it is free again. None: it was never used."""
        self._seen: Any = None
        """An event of the other stream: the last piece was sent."""
        self._works = True
        self._log = OnceLog(logger)
        self._lock = threading.Lock()

    def copy(self, plan: Plan, stream: Any) -> bool:
        """Whether these copies are made this way, and are enqueued: after what `stream` was given so far, as far as
        their destinations are concerned, and before what it is given from now on."""
        if not (self._works and len(plan.sizes)):
            return False
        if int(plan.sizes.max()) > _LONGEST_PAGE_BYTES:
            plan = plan.cut_at_edges(plan.sources, 0, _LONGEST_PAGE_BYTES)
        if not (_has_runs(plan) and self._pages.can_move(plan)):
            return False
        try:
            with self._lock:
                self._copy(plan, stream)
        except Exception as error:  # noqa: BLE001 - compilers and allocators raise what they like, and there are other ways
            self._works = False
            self._log.warn("runs", "pages are copied one by one, which is slower: %r", error)
            return False
        return True

    def _copy(self, plan: Plan, stream: Any) -> None:
        half_bytes = PIECE_BYTES + _LONGEST_PAGE_BYTES
        if self._buffer is None:
            self._buffer = self._allocate(2 * half_bytes)
        starts = (np.cumsum(plan.sizes) - plan.sizes).astype(np.int64)
        pieces = starts // PIECE_BYTES
        heads = np.searchsorted(pieces, np.arange(pieces[-1] + 2))
        within = starts - starts[heads[pieces]]
        places = (self._buffer + pieces % 2 * half_bytes + within).astype(np.uint64)
        runs = self._cut(Plan(plan.sources, places, plan.sizes).joined())  # The halves do not touch: none is of both.
        run_starts = (np.cumsum(runs.sizes) - runs.sizes).astype(np.int64)
        run_heads = [*np.searchsorted(run_starts, starts[heads[:-1]]).tolist(), len(run_starts)]
        if self._seen is not None:
            self._wire.wait_event(self._seen)  # The moment in which the copy engine has nothing to do.
        with self._pages.listed(Plan(places, plan.destinations, plan.sizes), stream) as place:
            bounds = zip(itertools.pairwise(run_heads), itertools.pairwise(heads.tolist()), strict=True)
            for piece, (of_runs, of_pages) in enumerate(bounds):
                half = piece % 2
                if self._placed[half] is not None:
                    self._wire.wait_event(self._placed[half])
                self._send(runs.only(slice(*of_runs)), self._wire)
                stream.wait_event(self._wire.record_event())
                self._seen = stream.record_event()
                place(*of_pages)
                self._placed[half] = stream.record_event()


def _has_runs(plan: Plan) -> bool:
    """Whether at least every second page follows the one before it in the arena."""
    num_runs = 1 + np.count_nonzero(plan.sources[1:] != plan.sources[:-1] + plan.sizes[:-1])
    return int(num_runs) * 2 <= len(plan.sizes)
