"""A `ByteStore` with faults at command, around any other. Knows nothing of the one inside."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from copy import copy

from kvferry.store.base import ByteStore, PartName


class FaultyByteStore:
    """Passes everything on to `inner`, except as its attributes say; tests set them at any time.

    latency_seconds: before each put and get. put_error, get_error: raised instead. short_reads: gets fill half of the
    view and answer False. gate: while clear, puts and gets wait for it. num_puts, num_gets: calls begun.
    """

    def __init__(self, inner: ByteStore) -> None:
        self.inner = inner
        self.latency_seconds = 0.0
        self.put_error: OSError | None = None
        self.get_error: OSError | None = None
        self.short_reads = False
        self.gate = threading.Event()
        self.gate.set()
        self.num_puts = 0
        self.num_gets = 0

    def put(self, name: PartName, view: memoryview) -> None:
        self.num_puts += 1
        self._wait()
        if self.put_error is not None:
            raise copy(self.put_error)  # Whoever was raised keeps its frames, and so views of the arena.
        self.inner.put(name, view)

    def get_into(self, name: PartName, view: memoryview) -> bool:
        self.num_gets += 1
        self._wait()
        if self.get_error is not None:
            raise copy(self.get_error)
        if self.short_reads:
            self.inner.get_into(name, memoryview(bytearray(len(view))))
            view[: len(view) // 2] = bytes(len(view) // 2)
            return False
        return self.inner.get_into(name, view)

    def contains(self, names: Sequence[PartName]) -> list[bool]:
        return self.inner.contains(names)

    def delete(self, names: Sequence[PartName]) -> None:
        self.inner.delete(names)

    def touch(self, names: Sequence[PartName]) -> None:
        self.inner.touch(names)

    def close(self) -> None:
        self.inner.close()

    def _wait(self) -> None:
        if self.latency_seconds:
            time.sleep(self.latency_seconds)
        self.gate.wait()
