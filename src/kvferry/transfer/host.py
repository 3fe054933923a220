"""Copies between pools in host memory and an arena: threads run `memmove` over shares of a plan.

It is the fastest of what was measured on two cores: 83 MB in 56 scattered blocks at 1.1x one plain memcpy, 64 KiB
blocks at 0.8x; torch's index copies reach 0.2x. Knows addresses; no block, no part and no store.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from kvferry.transfer.plan import Plan

_MOST_THREADS: Final = 4
_SMALLEST_SHARE_BYTES: Final = 256 * 1024


class HostCopier:
    """A few threads. Thread-safe."""

    def __init__(self) -> None:
        self._num_threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="kvferry-copy")

    def copy(self, plan: Plan) -> list[Future[None]]:
        """Begin; the shares of the plan under way."""
        num_shares = max(1, min(self._num_threads, plan.num_bytes // _SMALLEST_SHARE_BYTES))
        under_way = []
        for share in plan.split(num_shares):
            try:
                under_way.append(self._threads.submit(move, share))
            except RuntimeError:  # the interpreter ends: executors close before an engine that still runs is ended
                move(share)
        return under_way

    def close(self) -> None:
        """Wait for what was begun. Calling it again does nothing."""
        self._threads.shutdown()


def move(plan: Plan) -> None:
    """Copy between host addresses, in this thread; memmove through ctypes lets go of the interpreter lock."""
    memmove = ctypes.memmove
    for destination, source, size in zip(
        plan.destinations.tolist(), plan.sources.tolist(), plan.sizes.tolist(), strict=True
    ):
        memmove(destination, source, size)
