"""Work given to an idle tier is taken up at once, whichever of its threads wakes."""

from __future__ import annotations

import threading
from pathlib import Path

from kvferry.blocks import Tier
from kvferry.store.disk import DiskStore
from kvferry.store.tier import ByteTier


def test_an_idle_tier_takes_up_every_write_and_read(tmp_path: Path) -> None:
    tier = ByteTier(DiskStore(str(tmp_path), 10**6), Tier.DISK, num_threads=2)
    try:
        for number in range(100):
            name, value = bytes([number]) * 36, bytes([number]) * 100
            written, read = threading.Event(), threading.Event()
            assert tier.put(name, memoryview(value), lambda ok, done=written: done.set() if ok else None)
            assert written.wait(10), f"write {number} was not taken up"
            into = bytearray(100)
            tier.get(name, memoryview(into), lambda ok, done=read: done.set() if ok else None, timeout_seconds=60)
            assert read.wait(10), f"read {number} was not taken up"
            assert into == value
    finally:
        tier.close(10)
