"""Moves pages by the device's own processors, between a pool and memory of the device where they lie packed.

The device makes their addresses itself, from blocks and regions: a host that lists pages of 4 or 8 KiB falls behind the
wire. Needs Triton; without it, or where it fails, everything goes to the copy engines.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch

from kvferry.transfer.plan import Direction, Numbers, Pages

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.getLogger(__name__)

WORD_BYTES: Final = 16
"""What one thread moves at a time; pages that are no multiple of it are left to the copy engines."""
_WORDS: Final = 1024
"""Eight bytes each: what a program moves at a time, up to eight times of one page, which is a tile."""
_NUM_WARPS: Final = 4
_NUM_PROGRAMS: Final = 128
_RING_NUMBERS: Final = 1 << 20
"""Of all steps under way, which need three for each of their blocks: 131,072 tokens in blocks of 16, if 256 MiB are one
region of them. Who sends more waits."""

if triton is not None:
    # Numbers are of every kind, and lie anywhere: none is worth a kernel of its own, compiled while somebody waits.
    @triton.jit(do_not_specialize=["numbers", "packed", "first", "end"])  # type: ignore[untyped-decorator]
    def _move(numbers, packed, first, end, IS_LOAD: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        num_rows = tl.load(numbers)
        num_regions = tl.load(numbers + 1)
        num_tiles = tl.load(numbers + 2)
        row_bytes = tl.load(numbers + 3)
        of_rows = numbers + 4
        of_regions = of_rows + 3 * num_rows
        item = first * num_regions * num_tiles + tl.program_id(0)
        while item < end * num_regions * num_tiles:
            tile = item % num_tiles
            region = item // num_tiles % num_regions
            row = item // num_tiles // num_regions
            block = tl.load(of_rows + row)
            head = tl.load(of_rows + num_rows + row)
            length = tl.load(of_rows + 2 * num_rows + row)
            base = tl.load(of_regions + region)
            stride = tl.load(of_regions + num_regions + region)
            page_bytes = tl.load(of_regions + 2 * num_regions + region)
            before = tl.load(of_regions + 3 * num_regions + region)
            in_pool = base + block * stride
            aside = packed + head * row_bytes + length * before + (row - head) * page_bytes
            # Said of the pointer: what is said of the number is forgotten, and words of 8 bytes are moved.
            in_pool = tl.multiple_of(in_pool.to(tl.pointer_type(tl.int64)), 16)
            aside = tl.multiple_of(aside.to(tl.pointer_type(tl.int64)), 16)
            if IS_LOAD:
                of, to = aside, in_pool
            else:
                of, to = in_pool, aside
            num_words = tl.multiple_of(page_bytes // 8, 2)
            for start in range(tile * 8 * WORDS, tl.minimum(num_words, (tile + 1) * 8 * WORDS), WORDS):
                at = start + tl.arange(0, WORDS)
                inside = at < num_words
                tl.store(to + at, tl.load(of + at, mask=inside), mask=inside)
            item += tl.num_programs(0)


class PageKernel:
    """Enqueues the kernel on one stream. Not thread-safe."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._ring: _NumberRing | None = None
        if triton is not None:
            try:
                self._ring = _NumberRing(stream)
            except RuntimeError as error:  # no memory
                logger.warning("pages are copied one by one, which is slower: %s", error)

    def warm(self, way: Direction) -> bool:
        """Compile the kernel before somebody waits: it takes some tenths of a second where Triton has not kept it.
        False: there is none, or no memory for it."""
        if self._ring is None:
            return False
        with torch.cuda.stream(torch.cuda.Stream(self._stream.device)):  # type: ignore[no-untyped-call]
            none = torch.zeros(4, dtype=torch.int64, device=self._stream.device)
            _launch(none, none.data_ptr(), 0, 0, way)
        return True

    def can_move(self, pages: Pages) -> bool:
        """Whether these pages are of whole words, and not too many."""
        sides = (pages.strides.bases, pages.strides.stride_bytes, pages.strides.page_bytes)
        is_short = pages.rows.ids.size + pages.page_bytes.size < _RING_NUMBERS // 5
        return is_short and not any(int(np.bitwise_or.reduce(side[pages.regions])) % WORD_BYTES for side in sides)

    @contextmanager
    def moving(self, pages: Pages, heads: Numbers, lengths: Numbers) -> Iterator[Callable[[int, int, int], None]]:
        """What moves the pages of the rows from the first number up to the second, as often as it is called within:
        between the pool and where `pages.runs` has them, for these stretches and if those of row 0 were at the address
        given third. Within, the stream is the current one."""
        ring, numbers = self._ring, _numbers(pages, heads, lengths)
        assert ring is not None, "`warm` returned true"
        sent: list[torch.Tensor] = []

        def move(first: int, end: int, packed: int) -> None:
            if not sent:  # Not sooner: a load's first bytes would wait for them.
                sent.append(ring.send(numbers))
            _launch(sent[0], packed, first, end, pages.direction)

        # Engines run passes in inference mode, and copies from threads that are not in it: both use the same memory.
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            try:
                yield move
            finally:
                if sent:
                    ring.are_in_use_until_now()


def _numbers(pages: Pages, heads: Numbers, lengths: Numbers) -> Numbers:
    """What the kernel is told once for all it is to move."""
    strides, which, page_bytes = pages.strides, pages.regions, pages.page_bytes
    num_tiles = -(-int(page_bytes.max()) // (8 * 8 * _WORDS))
    return np.concatenate(
        [
            [pages.rows.ids.size, page_bytes.size, num_tiles, pages.row_bytes],
            *(pages.rows.ids, np.repeat(heads, lengths), np.repeat(lengths, lengths)),
            *(strides.bases[which], strides.stride_bytes[which], page_bytes, np.cumsum(page_bytes) - page_bytes),
        ]
    )


def _launch(numbers: torch.Tensor, packed: int, first: int, end: int, way: Direction) -> None:
    is_load = way is Direction.TO_POOL
    _move[(_NUM_PROGRAMS,)](numbers, packed, first, end, IS_LOAD=is_load, WORDS=_WORDS, num_warps=_NUM_WARPS)


def after_allocating(stream: Any) -> None:
    """To be called when memory that torch has just allocated is about to be used on `stream`: work that the engine has
    enqueued on the current stream, and that is still to run, may use the same memory, which it freed."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))


class _NumberRing:
    """Numbers on their way to a stream's work: memory on the device, and as much that is pinned to send them from.

    Made once, before there are passes: what is enqueued after memory was pinned or made on the device waits for all
    that was enqueued before, on whatever stream, so that a copy would take as long as a pass.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._host = torch.empty(_RING_NUMBERS, dtype=torch.int64, pin_memory=True)
        self._device = torch.empty(_RING_NUMBERS, dtype=torch.int64, device=stream.device)
        after_allocating(stream)
        self._start = self._end = 0
        """Of what was sent last."""
        self._in_use: deque[tuple[int, int, Any]] = deque()
        """Ranges, the oldest first, and events after which nobody reads them."""

    def send(self, numbers: Numbers) -> torch.Tensor:
        """On the stream, which is the current one. Waits while there is no room."""
        self._start = self._end if self._end + numbers.size <= _RING_NUMBERS else 0
        self._end = self._start + numbers.size
        while any(start < self._end and self._start < end for start, end, _ in self._in_use):
            self._in_use.popleft()[-1].synchronize()
        host, device = self._host[self._start : self._end], self._device[self._start : self._end]
        host.numpy()[:] = numbers
        return device.copy_(host, non_blocking=True)

    def are_in_use_until_now(self) -> None:
        """By what the stream was given since they were sent."""
        while self._in_use and self._in_use[0][-1].query():
            self._in_use.popleft()
        self._in_use.append((self._start, self._end, self._stream.record_event()))
