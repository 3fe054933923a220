"""Loads by runs, on a device whose streams go on in any order that events permit."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest

from kvferry.testing.late_device import LateDevice, Stream
from kvferry.transfer import runs
from kvferry.transfer.host import move
from kvferry.transfer.plan import Plan
from kvferry.transfer.runs import RunLoads

EDGE_BYTES = 512
"""The driver takes no copy from one such piece of the arena to another."""


class Pages:
    """Stands for `PageKernel`."""

    can = True

    def can_move(self, plan: Plan) -> bool:
        return self.can

    @contextmanager
    def listed(self, plan: Plan, stream: Stream) -> Iterator[Callable[[int, int], None]]:
        yield lambda first, end: stream.enqueue(partial(move, plan.only(slice(first, end))))


class Rig:
    """Pages of several sizes: in runs of four in the arena, anywhere in the pool. Pieces hold a few of them."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch, longest_bytes: int = 256) -> None:
        monkeypatch.setattr(runs, "PIECE_BYTES", 640)
        monkeypatch.setattr(runs, "_LONGEST_PAGE_BYTES", longest_bytes)
        self.choose = random.Random(seed)
        self.device = LateDevice(self.choose)
        self.wire, self.stream = self.device.stream(), self.device.stream()
        self.arena, self.pool = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, np.uint8)
        self.buffers: list[np.ndarray] = []
        self.sent: list[int] = []
        self.arrived: list[bool] = []
        self.pages = Pages()
        self.loads = RunLoads(self.wire, self.allocate, self.pages, self.cut, self.send)

    def allocate(self, num_bytes: int) -> int:
        self.buffers.append(np.zeros(num_bytes, np.uint8))
        return self.buffers[-1].ctypes.data

    def cut(self, plan: Plan) -> Plan:
        return plan.cut_at_edges(plan.sources, self.arena.ctypes.data, EDGE_BYTES)

    def send(self, plan: Plan, stream: Stream) -> None:
        assert stream is self.wire
        assert np.array_equal(plan.sizes, self.cut(plan).sizes)
        self.sent.append(len(plan.sizes))
        stream.enqueue(partial(move, plan))

    def plan(self, num_pages: int, run: int = 4) -> Plan:
        sizes = np.array([self.choose.choice([16, 64, 256]) for _ in range(num_pages)], np.uint64)
        gaps = np.cumsum([16 * (index % run == 0) for index in range(num_pages)]).astype(np.uint64)
        slots = self.choose.sample(range(len(self.pool) // 256), num_pages)
        return Plan(
            np.uint64(self.arena.ctypes.data) + gaps + np.cumsum(sizes) - sizes,
            np.uint64(self.pool.ctypes.data) + 256 * np.array(slots, np.uint64),
            sizes,
        )

    def look_later(self, plan: Plan, arena: np.ndarray) -> None:
        """When the stream comes to it: is the pool's what the arena's was?"""
        self.stream.enqueue(lambda: self.arrived.append(self._has_arrived(plan, arena)))

    def _has_arrived(self, plan: Plan, arena: np.ndarray) -> bool:
        sources = (plan.sources - np.uint64(self.arena.ctypes.data)).tolist()
        places = (plan.destinations - np.uint64(self.pool.ctypes.data)).tolist()
        return all(
            np.array_equal(arena[at : at + size], self.pool[place : place + size])
            for at, place, size in zip(sources, places, plan.sizes.tolist(), strict=True)
        )


def test_pages_arrive_whatever_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(80):
        rig = Rig(seed, monkeypatch, longest_bytes=112 if seed % 3 else 256)  # so some pages are placed as several
        rng = np.random.default_rng(seed)
        for _ in range(4):
            rig.stream.synchronize()
            rig.arena[:] = rng.integers(1, 256, len(rig.arena), dtype=np.uint8)
            rig.stream.enqueue(partial(rig.pool.fill, 0))  # as a pass does that has the blocks before
            for _ in range(2):
                plan = rig.plan(rig.choose.randrange(8, 60))
                assert rig.loads.copy(plan, rig.stream)
                rig.look_later(plan, rig.arena.copy())
                rig.device.run(rig.choose.random())
        rig.stream.synchronize()
        assert rig.arrived == [True] * 8
        assert len(rig.buffers) == 1


def test_a_second_thread_waits_for_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads ahead are begun by the engine's own thread, others by one beside it."""
    rig = Rig(0, monkeypatch)
    rig.arena[:] = np.random.default_rng(0).integers(1, 256, len(rig.arena), dtype=np.uint8)
    both = rig.plan(120)
    second = threading.Thread(target=rig.loads.copy, args=(both.only(slice(60, 120)), rig.stream))
    send = rig.loads._send

    def send_while_another_comes(*of: Any) -> None:
        send(*of)
        if second.ident is None:
            second.start()
            second.join(0.1)

    rig.loads._send = send_while_another_comes
    rig.loads.copy(both.only(slice(60)), rig.stream)
    second.join()
    rig.device.prefer(rig.wire)
    rig.stream.synchronize()
    assert rig._has_arrived(both, rig.arena)


def test_runs_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(0, monkeypatch)
    rig.loads.copy(rig.plan(60), rig.stream)
    assert sum(rig.sent) < 40


@pytest.mark.parametrize("num_pages", [44, 50], ids=["an even number of pieces", "an odd one"])
def test_the_wire_is_idle_for_a_moment_between_two_loads(num_pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(0, monkeypatch)
    rig.device.prefer(rig.wire)
    seen: list[bool] = []
    rig.loads.copy(rig.plan(num_pages), rig.stream)
    last = rig.loads._seen
    send = rig.loads._send

    def send_and_look(plan: Plan, wire: Stream) -> None:
        wire.enqueue(lambda: seen.append(last.query()))
        send(plan, wire)

    rig.loads._send = send_and_look
    rig.loads.copy(rig.plan(50), rig.stream)
    rig.stream.synchronize()
    assert seen
    assert all(seen)


@pytest.mark.parametrize("why", ["no pages", "no runs", "no words"])
def test_other_pages_are_left_to_other_ways(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(0, monkeypatch)
    plan = rig.plan(0 if why == "no pages" else 40, run=1 if why == "no runs" else 4)
    rig.pages.can = why != "no words"
    assert not rig.loads.copy(plan, rig.stream)
    assert not (rig.sent or rig.buffers or rig.wire.work or rig.stream.work)


def test_what_breaks_off_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(0, monkeypatch)
    send, num_left = rig.loads._send, [2]

    def breaking(*of: Any) -> None:
        num_left[0] -= 1
        if num_left[0] < 0:
            raise RuntimeError("out of order")
        send(*of)

    rig.loads._send = breaking
    for _ in range(2):
        assert not rig.loads.copy(rig.plan(50), rig.stream)
    rig.stream.synchronize()
    assert len(rig.sent) == 2
    assert [record.message for record in caplog.records] == [
        "pages are copied one by one, which is slower: RuntimeError('out of order')"
    ]
