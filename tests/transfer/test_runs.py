"""Copies by runs, on a device whose streams go on in any order that events permit."""

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
from kvferry.transfer.plan import Direction, Plan
from kvferry.transfer.runs import RunCopies

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

    def __init__(
        self,
        seed: int,
        monkeypatch: pytest.MonkeyPatch,
        way: Direction = Direction.TO_POOL,
        longest_bytes: int = 256,
    ) -> None:
        monkeypatch.setattr(runs, "PIECE_BYTES", 640)
        monkeypatch.setattr(runs, "_SHORTEST_RUN_BYTES", 64)
        monkeypatch.setattr(runs, "_LONGEST_PAGE_BYTES", longest_bytes)
        self.choose = random.Random(seed)
        self.device = LateDevice(self.choose)
        self.wire, self.stream = self.device.stream(), self.device.stream()
        self.arena, self.pool = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, np.uint8)
        self.buffers: list[np.ndarray] = []
        self.sent: list[int] = []
        self.arrived: list[bool] = []
        self.pages = Pages()
        self.is_load = way is Direction.TO_POOL
        self.copies = RunCopies(way, self.wire, self.allocate, self.pages, self.cut, self.send)

    def allocate(self, num_bytes: int) -> int:
        self.buffers.append(np.zeros(num_bytes, np.uint8))
        return self.buffers[-1].ctypes.data

    def cut(self, plan: Plan) -> Plan:
        in_arena = plan.sources if self.is_load else plan.destinations
        return plan.cut_at_edges(in_arena, self.arena.ctypes.data, EDGE_BYTES)

    def send(self, plan: Plan, stream: Stream) -> None:
        assert stream is self.wire
        assert np.array_equal(plan.sizes, self.cut(plan).sizes)
        self.sent.append(len(plan.sizes))
        stream.enqueue(partial(move, plan))

    def plan(self, num_pages: int, run: int = 4) -> Plan:
        sizes = np.array([self.choose.choice([16, 64, 256]) for _ in range(num_pages)], np.uint64)
        gaps = np.cumsum([16 * (index % run == 0) for index in range(num_pages)]).astype(np.uint64)
        slots = self.choose.sample(range(len(self.pool) // 256), num_pages)
        arena = np.uint64(self.arena.ctypes.data) + gaps + np.cumsum(sizes) - sizes
        pool = np.uint64(self.pool.ctypes.data) + 256 * np.array(slots, np.uint64)
        return Plan(*((arena, pool) if self.is_load else (pool, arena)), sizes)

    @property
    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """Where bytes come from, and where they go."""
        return (self.arena, self.pool) if self.is_load else (self.pool, self.arena)

    def look_later(self, plan: Plan, stream: Stream, expected: np.ndarray) -> None:
        """When the stream comes to it: has what was copied come from a side that was as expected?"""
        stream.enqueue(lambda: self.arrived.append(self.has_arrived(plan, expected)))

    def has_arrived(self, plan: Plan, expected: np.ndarray) -> bool:
        source, destination = self.sides
        of = (plan.sources - np.uint64(source.ctypes.data)).tolist()
        to = (plan.destinations - np.uint64(destination.ctypes.data)).tolist()
        return all(
            np.array_equal(expected[at : at + size], destination[place : place + size])
            for at, place, size in zip(of, to, plan.sizes.tolist(), strict=True)
        )


def test_pages_arrive_whatever_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(80):
        # Shorter than some pages: these are placed as several.
        rig = Rig(seed, monkeypatch, longest_bytes=112 if seed % 3 else 256)
        rng = np.random.default_rng(seed)
        for _ in range(4):
            rig.stream.synchronize()
            rig.arena[:] = rng.integers(1, 256, len(rig.arena), dtype=np.uint8)
            rig.stream.enqueue(partial(rig.pool.fill, 0))  # as a pass does that has the blocks before
            for _ in range(2):
                plan = rig.plan(rig.choose.randrange(8, 60))
                assert rig.copies.copy(plan, rig.stream) is rig.stream
                rig.look_later(plan, rig.stream, rig.arena.copy())
                rig.device.run(rig.choose.random())
        rig.stream.synchronize()
        assert rig.arrived == [True] * 8
        assert len(rig.buffers) == 1


def test_pages_are_saved_whatever_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(80):
        rig = Rig(seed, monkeypatch, Direction.FROM_POOL, longest_bytes=176 if seed % 3 else 256)
        rng = np.random.default_rng(seed)
        for _ in range(4):
            rig.wire.synchronize()
            rig.arena[:] = 0
            written = rng.integers(1, 256, len(rig.pool), dtype=np.uint8)
            rig.stream.enqueue(partial(np.copyto, rig.pool, written))  # by the pass before
            plan = rig.plan(120)
            for share in (plan.only(slice(60)), plan.only(slice(60, 120))):
                assert rig.copies.copy(share, rig.stream) is rig.wire
                rig.look_later(share, rig.wire, written)
                rig.device.run(rig.choose.random())
        rig.wire.synchronize()
        assert rig.arrived == [True] * 8
        assert len(rig.buffers) == 1


def test_a_second_thread_waits_for_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads ahead are begun by the engine's own thread, others by one beside it."""
    rig = Rig(0, monkeypatch)
    rig.arena[:] = np.random.default_rng(0).integers(1, 256, len(rig.arena), dtype=np.uint8)
    both = rig.plan(120)
    second = threading.Thread(target=rig.copies.copy, args=(both.only(slice(60, 120)), rig.stream))
    send = rig.copies._send

    def send_while_another_comes(*of: Any) -> None:
        send(*of)
        if second.ident is None:
            second.start()
            second.join(0.1)

    rig.copies._send = send_while_another_comes
    rig.copies.copy(both.only(slice(60)), rig.stream)
    second.join()
    rig.device.prefer(rig.wire)
    rig.stream.synchronize()
    assert rig.has_arrived(both, rig.arena)


@pytest.mark.parametrize("way", Direction)
def test_runs_are_sent(way: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(0, monkeypatch, way)
    rig.copies.copy(rig.plan(60), rig.stream)
    assert sum(rig.sent) < 40


@pytest.mark.parametrize("num_pages", [44, 50], ids=["an even number of pieces", "an odd one"])
def test_the_wire_is_idle_for_a_moment_between_two_loads(num_pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(0, monkeypatch)
    rig.device.prefer(rig.wire)
    seen: list[bool] = []
    rig.copies.copy(rig.plan(num_pages), rig.stream)
    last = rig.copies._seen
    send = rig.copies._send

    def send_and_look(plan: Plan, wire: Stream) -> None:
        wire.enqueue(lambda: seen.append(last.query()))
        send(plan, wire)

    rig.copies._send = send_and_look
    rig.copies.copy(rig.plan(50), rig.stream)
    rig.stream.synchronize()
    assert seen
    assert all(seen)


def test_long_pages_are_saved_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for way, is_made in ((Direction.TO_POOL, True), (Direction.FROM_POOL, False)):
        rig = Rig(0, monkeypatch, way, longest_bytes=64)
        plan = rig.plan(60)
        plan = plan.only(plan.sizes >= 64)
        assert (rig.copies.copy(plan, rig.stream) is not None) == is_made


@pytest.mark.parametrize("way", Direction)
@pytest.mark.parametrize("why", ["no pages", "no runs", "no words", "short runs"])
def test_other_pages_are_left_to_other_ways(why: str, way: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(0, monkeypatch, way)
    if why == "short runs":
        monkeypatch.setattr(runs, "_SHORTEST_RUN_BYTES", 640)
    plan = rig.plan(0 if why == "no pages" else 40, run=1 if why == "no runs" else 4)
    rig.pages.can = why != "no words"
    assert not rig.copies.copy(plan, rig.stream)
    assert not (rig.sent or rig.buffers or rig.wire.work or rig.stream.work)


def test_what_breaks_off_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(0, monkeypatch)
    send, num_left = rig.copies._send, [2]

    def breaking(*of: Any) -> None:
        num_left[0] -= 1
        if num_left[0] < 0:
            raise RuntimeError("out of order")
        send(*of)

    rig.copies._send = breaking
    for _ in range(2):
        assert not rig.copies.copy(rig.plan(50), rig.stream)
    rig.stream.synchronize()
    assert len(rig.sent) == 2
    assert [record.message for record in caplog.records] == [
        "to_pool: pages are copied one by one, which is slower: RuntimeError('out of order')"
    ]
