"""Copies by runs, on a device whose streams go on in any order that events permit."""

from __future__ import annotations

import random
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


class Pages:
    """Stands for `PageKernel`."""

    can = True

    def can_move(self, plan: Plan) -> bool:
        return self.can

    @contextmanager
    def listed(self, plan: Plan, stream: Stream) -> Iterator[Callable[[int, int], None]]:
        yield lambda first, end: stream.enqueue(partial(move, plan.only(slice(first, end))))


class Rig:
    """Pages of several sizes: in the arena's runs of four, anywhere in the pool. Pieces hold a few of them."""

    def __init__(self, seed: int, direction: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runs, "PIECE_BYTES", dict.fromkeys(Direction, 640))
        monkeypatch.setattr(runs, "_LONGEST_PAGE_BYTES", 256)
        self.choose, self.direction = random.Random(seed), direction
        self.device = LateDevice(self.choose)
        self.wire, self.stream = self.device.stream(), self.device.stream()
        self.arena, self.pool = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, np.uint8)
        self.buffers: list[np.ndarray] = []
        self.sent: list[int] = []
        self.arrived: list[bool] = []
        self.pages = Pages()
        self.copies = RunCopies(direction, self.wire, self.allocate, self.pages, self.send)

    def allocate(self, num_bytes: int) -> int:
        self.buffers.append(np.zeros(num_bytes, np.uint8))
        return self.buffers[-1].ctypes.data

    def send(self, plan: Plan, direction: Direction, stream: Stream) -> None:
        assert (direction, stream) == (self.direction, self.wire)
        self.sent.append(len(plan.sizes))
        stream.enqueue(partial(move, plan))

    def plan(self, num_pages: int, run: int = 4) -> Plan:
        sizes = np.array([self.choose.choice([16, 64, 256]) for _ in range(num_pages)], np.uint64)
        gaps = np.cumsum([16 * (index % run == 0) for index in range(num_pages)]).astype(np.uint64)
        arena = np.uint64(self.arena.ctypes.data) + gaps + np.cumsum(sizes) - sizes
        slots = self.choose.sample(range(len(self.pool) // 256), num_pages)
        pool = np.uint64(self.pool.ctypes.data) + 256 * np.array(slots, np.uint64)
        return Plan(arena, pool, sizes) if self.direction is Direction.TO_POOL else Plan(pool, arena, sizes)

    def look_later(self, plan: Plan, source: np.ndarray) -> None:
        """When the stream comes to it."""
        self.stream.enqueue(lambda: self.arrived.append(self.have_arrived(plan, source)))

    def have_arrived(self, plan: Plan, source: np.ndarray) -> bool:
        """source: what the side that was copied from had."""
        of, to = (self.arena, self.pool) if self.direction is Direction.TO_POOL else (self.pool, self.arena)
        pages = zip(plan.sources.tolist(), plan.destinations.tolist(), plan.sizes.tolist(), strict=True)
        return all(
            np.array_equal(
                source[at - of.ctypes.data : at - of.ctypes.data + size],
                to[there - to.ctypes.data : there - to.ctypes.data + size],
            )
            for at, there, size in pages
        )


@pytest.mark.parametrize("direction", Direction)
def test_pages_arrive_whatever_goes_first(direction: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(60):
        rig = Rig(seed, direction, monkeypatch)
        rng = np.random.default_rng(seed)
        for _ in range(4):
            plan, new = rig.plan(rig.choose.randrange(8, 60)), rng.integers(1, 256, len(rig.pool), dtype=np.uint8)
            if direction is Direction.FROM_POOL:
                rig.stream.enqueue(partial(np.copyto, rig.pool, new))  # as a pass before the copy does
            else:
                rig.stream.synchronize()
                rig.arena[:] = new
            assert rig.copies.copy(plan, rig.stream)
            rig.look_later(plan, new)
            rig.device.run(rig.choose.random())
        rig.stream.synchronize()
        assert rig.arrived == [True] * 4
        assert len(rig.buffers) == 1
        assert sum(rig.sent) < 4 * 60 / 2, "runs are sent, not pages"


def test_the_wire_is_idle_for_a_moment_between_two_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(0, Direction.TO_POOL, monkeypatch)
    rig.device.prefer(rig.wire)
    placed: list[bool] = []
    rig.copies.copy(rig.plan(50), rig.stream)
    free = list(rig.copies._free)
    send = rig.copies._send

    def send_and_look(plan: Plan, direction: Direction, wire: Stream) -> None:
        wire.enqueue(lambda: placed.append(all(event.query() for event in free)))
        send(plan, direction, wire)

    rig.copies._send = send_and_look
    rig.copies.copy(rig.plan(50), rig.stream)
    rig.stream.synchronize()
    assert placed
    assert all(placed)


@pytest.mark.parametrize("why", ["no runs", "long pages", "no words"])
def test_other_pages_are_left_to_other_ways(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(0, Direction.TO_POOL, monkeypatch)
    plan = rig.plan(40, run=1 if why == "no runs" else 4)
    if why == "long pages":
        monkeypatch.setattr(runs, "_LONGEST_PAGE_BYTES", 128)
    rig.pages.can = why != "no words"
    assert not rig.copies.copy(plan, rig.stream)
    assert not (rig.sent or rig.buffers or rig.wire.work or rig.stream.work)


@pytest.mark.parametrize("direction", Direction)
def test_what_breaks_off_leaves_the_arena_alone_and_is_not_tried_again(
    direction: Direction, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(0, direction, monkeypatch)
    send, num_left = rig.copies._send, [2]

    def breaking(*of: Any) -> None:
        num_left[0] -= 1
        if num_left[0] < 0:
            raise RuntimeError("out of order")
        send(*of)

    rig.copies._send = breaking
    for _ in range(2):
        assert not rig.copies.copy(rig.plan(50), rig.stream)
        assert not rig.wire.work
    assert len(rig.sent) == 2
    assert [record.message for record in caplog.records] == [
        "pages are copied one by one, which is slower: RuntimeError('out of order')"
    ]
