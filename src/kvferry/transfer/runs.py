"""Copies of many pages as few long ones: an arena's runs go through a buffer on the device, whose pages a kernel moves.

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
from functools import partial
from typing import Any, Final, Protocol

import numpy as np

from kvferry.observability.log import OnceLog
from kvferry.transfer.plan import Direction, Plan

logger = logging.getLogger(__name__)

PIECE_BYTES: Final = {Direction.TO_POOL: 32 << 20, Direction.FROM_POOL: 8 << 20}
"""What is sent at once; a buffer has two. Long pieces cost the host less, and it is loads that somebody waits for."""
_LONGEST_PAGE_BYTES: Final = 1 << 20
"""Longer ones are as good as runs. A piece may exceed its size by less than one page."""
_NUM_TURNS: Final = 2


class PageMover(Protocol):
    """What moves pages on the device (`kernels.PageKernel`)."""

    def can_move(self, plan: Plan) -> bool: ...

    def listed(self, plan: Plan, stream: Any) -> AbstractContextManager[Callable[[int, int], None]]: ...


class RunCopies:
    """One direction's copies between the device and pinned memory. Thread-safe.

    wire: the stream that the copy engine's work goes to. allocate: from a number of bytes, the address of a buffer on
    the device. send: enqueues a plan in a direction on a stream.
    """

    def __init__(
        self,
        direction: Direction,
        wire: Any,
        allocate: Callable[[int], int],
        pages: PageMover,
        send: Callable[[Plan, Direction, Any], None],
    ) -> None:
        self._direction = direction
        self._wire = wire
        self._allocate = allocate
        self._pages = pages
        self._send = send
        self._buffer: int | None = None
        self._free: list[Any] = []
        """Events: the half of the buffer is free again."""
        self._works = True
        self._log = OnceLog(logger)
        self._lock = threading.Lock()

    def copy(self, plan: Plan, stream: Any) -> bool:
        """Whether these copies are made this way, and are enqueued: after what `stream` was given so far, as far as the
        pool is concerned, and before what it is given from now on."""
        if not (self._works and self._is_worth_it(plan) and self._pages.can_move(plan)):
            return False
        try:
            with self._lock:
                self._copy(plan, stream)
        except Exception as error:  # noqa: BLE001 - compilers and allocators raise whatever they like, and there are other ways
            self._works = False
            self._log.warn("runs", "pages are copied one by one, which is slower: %r", error)
            self._wire.synchronize()  # The arena is the caller's again with the last of what else it enqueues.
            return False
        return True

    def _is_worth_it(self, plan: Plan) -> bool:
        num_pages = len(plan.sizes)
        if num_pages < _NUM_TURNS or int(plan.sizes.max()) > _LONGEST_PAGE_BYTES:
            return False
        arena = plan.sources if self._direction is Direction.TO_POOL else plan.destinations
        num_runs = 1 + np.count_nonzero(arena[1:] != arena[:-1] + plan.sizes[:-1])
        return int(num_runs) * 2 <= num_pages

    def _copy(self, plan: Plan, stream: Any) -> None:
        piece_bytes = PIECE_BYTES[self._direction]
        half_bytes = piece_bytes + _LONGEST_PAGE_BYTES
        if self._buffer is None:
            self._buffer = self._allocate(_NUM_TURNS * half_bytes)
        starts = (np.cumsum(plan.sizes) - plan.sizes).astype(np.int64)
        pieces = starts // piece_bytes
        heads = np.searchsorted(pieces, np.arange(pieces[-1] + 2))
        turns = pieces % _NUM_TURNS
        places = (self._buffer + turns * half_bytes + starts - starts[heads[pieces]]).astype(np.uint64)
        if self._direction is Direction.TO_POOL:
            sent, moved = Plan(plan.sources, places, plan.sizes), Plan(places, plan.destinations, plan.sizes)
        else:
            sent, moved = Plan(places, plan.destinations, plan.sizes), Plan(plan.sources, places, plan.sizes)
        for event in self._free if self._direction is Direction.TO_POOL else ():
            self._wire.wait_event(event)  # all that was sent before is placed: the moment in which the engine is idle
        with self._pages.listed(moved, stream) as move:
            for piece, (first, end) in enumerate(itertools.pairwise(heads.tolist())):
                runs = sent.only(slice(first, end)).joined()
                begin = self._fetch if self._direction is Direction.TO_POOL else self._put
                begin(piece % _NUM_TURNS, runs, partial(move, first, end), stream)
        if self._direction is Direction.FROM_POOL:
            stream.wait_event(self._free[(len(heads) - 2) % _NUM_TURNS])

    def _fetch(self, turn: int, runs: Plan, move: Callable[[], None], stream: Any) -> None:
        """From the arena to half of the buffer, then to the pool."""
        if len(self._free) > turn:
            self._wire.wait_event(self._free[turn])
        self._send(runs, self._direction, self._wire)
        stream.wait_event(self._wire.record_event())
        move()
        self._free[turn : turn + 1] = [stream.record_event()]

    def _put(self, turn: int, runs: Plan, move: Callable[[], None], stream: Any) -> None:
        """From the pool to half of the buffer, then to the arena."""
        if len(self._free) > turn:
            stream.wait_event(self._free[turn])
        move()
        self._wire.wait_event(stream.record_event())
        self._send(runs, self._direction, self._wire)
        self._free[turn : turn + 1] = [self._wire.record_event()]
