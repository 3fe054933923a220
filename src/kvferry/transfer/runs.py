"""Copies of many pages as few long ones: between a pool and a buffer on the device a kernel moves pages, between the
buffer and the arena a copy engine moves runs of them.

An arena keeps the pages of a chunk side by side; a pool has them anywhere. Told of single pages, a copy engine needs a
microsecond of the host's time for each, and for as long as it has work, copies of 64 KiB and more that others want the
same way, such as a pass's inputs, do not begin. So it is told of runs, and between two calls that load it is idle for a
moment, in which others' copies begin.

Knows addresses and streams; no store.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, Protocol

import numpy as np

from kvferry.observability.log import OnceLog
from kvferry.transfer.plan import Direction, Numbers, Pages, Plan

logger = logging.getLogger(__name__)

PIECE_BYTES: Final = 64 << 20
"""What is sent at once, through one half of the buffer. A kernel that moves pages waits for one of a pass's to end, up
to two milliseconds, whatever the priority of its stream, and the wire waits for the half. An H200 that computes gets
13, 22, 33 or 39 GB/s in pieces of 16, 32, 64 or 128 MiB, and nearly 50 in any while it does not."""
_LONG_PAGE_BYTES: Final = 256 << 10


class PageMover(Protocol):
    """What moves pages on the device, on the stream of its direction (`kernels.PageKernel`)."""

    def warm(self, way: Direction) -> bool: ...

    def can_move(self, pages: Pages) -> bool: ...

    def moving(
        self, pages: Pages, heads: Numbers, lengths: Numbers
    ) -> AbstractContextManager[Callable[[int, int, int], None]]: ...


class RunCopies:
    """Copies one way between pinned memory and one device. Thread-safe.

    wire: the stream that the copy engine's work goes to. allocate: from a number of bytes, the address of a buffer on
    the device. mover: moves pages there. cut: divides copies that the driver would refuse as a whole. send: enqueues
    copies on a stream.
    """

    def __init__(
        self,
        direction: Direction,
        wire: Any,
        allocate: Callable[[int], int],
        mover: PageMover,
        cut: Callable[[Plan], Plan],
        send: Callable[[Plan, Any], None],
    ) -> None:
        self._direction, self._is_load = direction, direction is Direction.TO_POOL
        self._wire = wire
        self._allocate, self._mover = allocate, mover
        self._cut, self._send = cut, send
        self._buffer: int | None = None
        """None: there is none yet, or this way has failed."""
        self._num_pieces = 0
        """So far; they take turns with the halves of the buffer."""
        self._left: list[Any] = [None, None]
        """Events by half of the buffer: it is free again. None: it was never used."""
        self._seen: Any = None
        """An event of the stream that a piece goes to second: the last one has left the first."""
        self._log = OnceLog(logger)
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Make what these copies need, before there are passes that would be held up; until then none is made so."""
        if self._mover.warm(self._direction):
            self._buffer = self._allocate(2 * PIECE_BYTES)

    def copy(self, pages: Pages, stream: Any) -> Any:
        """The stream with whose work so far these copies end, if they are made this way, else None. They come after
        what `stream` was given so far, as far as the pool is concerned."""
        row_bytes = pages.row_bytes
        if self._buffer is None or not (pages.rows.ids.size and row_bytes <= PIECE_BYTES):
            return None
        if not self._mover.can_move(pages):
            return None
        are_long = row_bytes >= pages.page_bytes.size * _LONG_PAGE_BYTES
        if are_long and not self._is_load:
            return None  # As they are, they are long enough, and hardly anybody waits for the wire that way.
        heads, lengths = pages.rows.stretches(PIECE_BYTES // row_bytes)
        num_runs = np.where(lengths == pages.strides.blocks_per_part, 1, pages.page_bytes.size).sum()
        if not are_long and num_runs * 2 > pages.rows.ids.size * pages.page_bytes.size:
            return None
        with self._lock:
            try:
                return self._copy(self._buffer, pages, heads, lengths, stream) if self._buffer is not None else None
            except Exception as error:  # noqa: BLE001 - compilers and allocators raise what they like
                self._buffer = None
                way = self._direction.value
                self._log.warn("runs", "%s: pages are copied one by one, which is slower: %r", way, error)
                return None

    def _copy(self, buffer: int, pages: Pages, heads: Numbers, lengths: Numbers, stream: Any) -> Any:
        first, second = (self._wire, stream) if self._is_load else (stream, self._wire)
        if self._seen is not None:
            first.wait_event(self._seen)  # Of a load: the moment in which the copy engine has nothing to do.
        row_bytes, ends = pages.row_bytes, heads + lengths
        with self._mover.moving(pages, heads, lengths) as move:
            start = 0
            while start < heads.size:
                head = int(heads[start])
                stop = int(np.searchsorted(ends, head + PIECE_BYTES // row_bytes, side="right"))
                half, self._num_pieces = self._num_pieces % 2, self._num_pieces + 1
                packed = buffer + half * PIECE_BYTES
                runs = self._cut(pages.runs(heads[start:stop], lengths[start:stop], packed))
                send = partial(self._send, runs, self._wire)
                place = partial(move, head, int(ends[stop - 1]), packed - head * row_bytes)
                if self._left[half] is not None:
                    first.wait_event(self._left[half])
                (send if self._is_load else place)()
                second.wait_event(first.record_event())
                self._seen = second.record_event()
                (place if self._is_load else send)()
                self._left[half] = second.record_event()
                start = stop
        return second
