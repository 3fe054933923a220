"""Copies of pages by the device's own processors: within the device, or from and to pinned host memory directly.

A copy engine needs about a microsecond a page, so below some page size it falls behind the wire. Where that is, and how
many programs keep the wire full, differs from device to device: `Tuning` says it, measured once a device and kept in a
file. Needs Triton; without it, or where it fails, everything goes to the copy engines.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from kvferry.observability.log import OnceLog
from kvferry.transfer.plan import Plan

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

logger = logging.getLogger(__name__)

WORD_BYTES: Final = 16
"""What one thread moves at a time; pages that are no multiple of it are left to the copy engines."""
_WORDS: Final = 1024
"""Eight bytes each: what a program moves at a time."""
_NUM_WARPS: Final = 4
_NUM_PROGRAMS: Final = 128
"""Within the device, where they take microseconds."""

if triton is not None:
    # Numbers of copies are of every kind: none is worth a kernel of its own, compiled while somebody waits.
    @triton.jit(do_not_specialize=["first", "end"])  # type: ignore[untyped-decorator]
    def _move(destinations, sources, sizes, first, end, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        copy = first + tl.program_id(0)
        while copy < end:
            destination = tl.multiple_of(tl.load(destinations + copy), 16)
            source = tl.multiple_of(tl.load(sources + copy), 16)
            num_words = tl.multiple_of(tl.load(sizes + copy) // 8, 2)
            to = destination.to(tl.pointer_type(tl.int64))
            of = source.to(tl.pointer_type(tl.int64))
            for start in range(0, num_words, WORDS):
                at = start + tl.arange(0, WORDS)
                inside = at < num_words
                tl.store(to + at, tl.load(of + at, mask=inside), mask=inside)
            copy += tl.num_programs(0)


@dataclass(frozen=True, slots=True)
class Tuning:
    """kernel_below_bytes: pages smaller than this, on average, are copied by the kernel. num_programs: that it runs."""

    kernel_below_bytes: int = 48 << 10
    num_programs: int = 64


class PageKernel:
    """Enqueues the kernel on one device. Thread-safe."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._works = triton is not None
        self._log = OnceLog(logger)
        self._lock = threading.Lock()
        self._lists: list[_AddressList] = []

    def copy(self, plan: Plan, stream: Any, tuning: Tuning) -> bool:
        """Whether these copies between the device and pinned memory are the kernel's, and are enqueued."""
        num_copies = len(plan.sizes)
        if not (self.can_move(plan) and num_copies and plan.num_bytes < num_copies * tuning.kernel_below_bytes):
            return False
        try:
            with self.listed(plan, stream, tuning.num_programs) as move:
                move(0, num_copies)
        except Exception as error:  # noqa: BLE001 - compilers raise whatever they like, and copy engines can do it too
            self._works = False
            self._log.warn("kernel", "small pages are copied by the copy engines, which is slower: %r", error)
            return False
        return True

    def warm(self) -> None:
        """Compile the kernel before somebody waits: it takes some tenths of a second where Triton has not kept it."""
        if self._works:
            with torch.cuda.stream(torch.cuda.Stream(self._device)):  # type: ignore[no-untyped-call]
                none = torch.zeros(1, dtype=torch.int64, device=self._device)
                _move[(1,)](none, none, none, 0, 0, WORDS=_WORDS, num_warps=_NUM_WARPS)

    def can_move(self, plan: Plan) -> bool:
        """Whether there is a kernel, and these copies are of whole words."""
        sides = (plan.sources, plan.destinations, plan.sizes)
        return self._works and not any(int(np.bitwise_or.reduce(side)) % WORD_BYTES for side in sides)

    @contextmanager
    def listed(
        self, plan: Plan, stream: Any, num_programs: int = _NUM_PROGRAMS
    ) -> Iterator[Callable[[int, int], None]]:
        """What enqueues the copies from the first number up to the second on `stream`, as often as it is called within.
        Within, `stream` is the current one."""
        # Engines run passes in inference mode, and copies from threads that are not in it: both use the same lists.
        with torch.inference_mode():
            num_copies = len(plan.sizes)
            with self._lock:
                addresses = next((each for each in self._lists if each.is_free(num_copies)), None)
                if addresses is not None:
                    self._lists.remove(addresses)
            if addresses is None:
                addresses = _AddressList(self._device, num_copies)
                after_allocating(stream)
            lists: list[torch.Tensor] = []

            def move(first: int, end: int) -> None:
                if not lists:  # Not sooner: a load's first bytes would wait for them.
                    lists.extend(addresses.send(plan))
                grid = (min(num_programs, end - first),)
                _move[grid](*lists, first, end, WORDS=_WORDS, num_warps=_NUM_WARPS)

            with torch.cuda.stream(stream):
                try:
                    yield move
                finally:
                    addresses.busy_until(stream)
                    with self._lock:
                        self._lists.append(addresses)


def after_allocating(stream: Any) -> None:
    """To be called when memory that torch has just allocated is about to be used on `stream`: work that the engine has
    enqueued on the current stream, and that is still to run, may use the same memory, which it freed."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))


class _AddressList:
    """A plan's arrays on the device, and pinned memory to send them from."""

    def __init__(self, device: torch.device, num_copies: int) -> None:
        self._capacity = max(1 << 12, 1 << (num_copies - 1).bit_length())
        self._host = torch.empty(3, self._capacity, dtype=torch.int64, pin_memory=True)
        self._device = torch.empty(3, self._capacity, dtype=torch.int64, device=device)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def is_free(self, num_copies: int) -> bool:
        return num_copies <= self._capacity and bool(self._event.query())  # type: ignore[no-untyped-call]

    def send(self, plan: Plan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """On the current stream."""
        rows = []
        for row, side in enumerate((plan.destinations, plan.sources, plan.sizes)):
            self._host[row, : len(side)].numpy()[:] = side.view(np.int64)
            rows.append(self._device[row, : len(side)].copy_(self._host[row, : len(side)], non_blocking=True))
        return rows[0], rows[1], rows[2]

    def busy_until(self, stream: Any) -> None:
        """What `stream` was given so far uses the arrays."""
        self._event.record(stream)
