"""Copies by runs, on a device whose streams go on in any order that events permit."""

from __future__ import annotations

import itertools
import random
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest

from kvferry.testing.late_device import LateDevice, LateMover, Stream
from kvferry.transfer import runs
from kvferry.transfer.host import move
from kvferry.transfer.plan import Direction, Pages, PartBlocks, Plan, Strides, block_rows
from kvferry.transfer.runs import RunCopies

PAGE_BYTES = np.array([16, 64, 48])
BLOCKS_PER_PART, NUM_BLOCKS, NUM_SLOTS = 4, 200, 60
PART_BYTES = BLOCKS_PER_PART * int(PAGE_BYTES.sum())


class Rig:
    """Three regions, whose pages lie anywhere in the pool. A piece holds a part of all of them, or several of one."""

    def __init__(
        self,
        seed: int,
        monkeypatch: pytest.MonkeyPatch,
        way: Direction = Direction.TO_POOL,
        piece_bytes: int = 640,
    ) -> None:
        # A part of all regions is 512 bytes: longer than a piece, exactly as long, or shorter.
        monkeypatch.setattr(runs, "PIECE_BYTES", piece_bytes)
        self.edge_bytes = 512  # The driver takes no copy from one such piece of the arena to another.
        self.choose = random.Random(seed)
        self.device = LateDevice(self.choose)
        self.wire, self.stream = self.device.stream(), self.device.stream()
        self.arena = np.zeros(NUM_SLOTS * PART_BYTES + 100, np.uint8)
        self.pool = np.zeros(NUM_BLOCKS * int(PAGE_BYTES.sum()), np.uint8)
        bases = self.pool.ctypes.data + NUM_BLOCKS * (np.cumsum(PAGE_BYTES) - PAGE_BYTES)
        self.strides = Strides(self.arena.ctypes.data + 100, BLOCKS_PER_PART, bases, PAGE_BYTES, PAGE_BYTES)
        self.buffers: list[np.ndarray] = []
        self.sent: list[int] = []
        self.arrived: list[bool] = []
        self.mover = LateMover(self.stream)
        self.way, self.is_load = way, way is Direction.TO_POOL
        self.copies = RunCopies(way, self.wire, self.allocate, self.mover, self.cut, self.send)
        self.copies.warm()

    def allocate(self, num_bytes: int) -> int:
        self.buffers.append(np.zeros(num_bytes, np.uint8))
        return self.buffers[-1].ctypes.data

    def cut(self, plan: Plan) -> Plan:
        return plan.cut_at_edges(plan.in_arena(self.way), self.arena.ctypes.data, self.edge_bytes)

    def send(self, plan: Plan, stream: Stream) -> None:
        assert stream is self.wire
        assert np.array_equal(plan.sizes, self.cut(plan).sizes)
        self.sent.append(len(plan.sizes))
        stream.enqueue(partial(move, plan))

    def pages(self, num_parts: int, *, are_whole: bool = False, regions: slice | None = None) -> Pages:
        """Of blocks that no other call has until the next that starts anew."""
        slots, blocks = (
            self.choose.sample(range(NUM_SLOTS), num_parts),
            self.choose.sample(range(NUM_BLOCKS), NUM_BLOCKS),
        )
        parts = []
        for slot in slots:
            first = 0 if are_whole or self.choose.random() < 0.7 else self.choose.randrange(BLOCKS_PER_PART - 1)
            num_blocks = BLOCKS_PER_PART - first
            parts.append(PartBlocks(slot * PART_BYTES, first, blocks[:num_blocks]))
            del blocks[:num_blocks]
        if regions is None:
            start = self.choose.randrange(3)
            regions = slice(start, self.choose.randrange(start, 3) + 1)
        return Pages(block_rows(parts), self.strides, self.way, regions)

    def halves(self, pages: Pages) -> list[Pages]:
        is_first = np.arange(pages.rows.ids.size) < pages.rows.ids.size // 2
        return [pages.only(is_first), pages.only(~is_first)]

    @property
    def sides(self) -> tuple[np.ndarray, np.ndarray]:
        """Where bytes come from, and where they go."""
        return (self.arena, self.pool) if self.is_load else (self.pool, self.arena)

    def look_later(self, pages: Pages, stream: Stream, expected: np.ndarray) -> None:
        """When the stream comes to it: has what was copied come from a side that was as expected?"""
        stream.enqueue(lambda: self.arrived.append(self.has_arrived(pages, expected)))

    def has_arrived(self, pages: Pages, expected: np.ndarray) -> bool:
        source, destination = self.sides
        plan = pages.plan()
        of = (plan.sources - np.uint64(source.ctypes.data)).tolist()
        to = (plan.destinations - np.uint64(destination.ctypes.data)).tolist()
        return all(
            np.array_equal(expected[at : at + size], destination[place : place + size])
            for at, place, size in zip(of, to, plan.sizes.tolist(), strict=True)
        )


def test_pages_arrive_whatever_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(80):
        rig = Rig(seed, monkeypatch, piece_bytes=[420, 512, 640, 1100][seed % 4])
        rng = np.random.default_rng(seed)
        for _ in range(4):
            rig.stream.synchronize()
            rig.arena[:] = rng.integers(1, 256, len(rig.arena), dtype=np.uint8)
            rig.stream.enqueue(partial(rig.pool.fill, 0))  # as a pass does that has the blocks before
            for _ in range(2):
                pages = rig.pages(rig.choose.randrange(2, 16))
                assert rig.copies.copy(pages, rig.stream) is rig.stream
                rig.look_later(pages, rig.stream, rig.arena.copy())
                rig.device.run(rig.choose.random())
        rig.stream.synchronize()
        assert rig.arrived == [True] * 8
        assert len(rig.buffers) == 1


def test_pages_are_saved_whatever_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(80):
        rig = Rig(seed, monkeypatch, Direction.FROM_POOL, piece_bytes=[512, 640, 1100][seed % 3])
        rng = np.random.default_rng(seed)
        for _ in range(4):
            rig.wire.synchronize()
            rig.arena[:] = 0
            written = rng.integers(1, 256, len(rig.pool), dtype=np.uint8)
            rig.stream.enqueue(partial(np.copyto, rig.pool, written))  # by the pass before
            for share in rig.halves(rig.pages(30)):
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
    both = rig.pages(30)
    first_half, second_half = rig.halves(both)
    second = threading.Thread(target=rig.copies.copy, args=(second_half, rig.stream))
    send = rig.copies._send

    def send_while_another_comes(*of: Any) -> None:
        send(*of)
        if second.ident is None:
            second.start()
            second.join(0.1)

    rig.copies._send = send_while_another_comes
    rig.copies.copy(first_half, rig.stream)
    second.join()
    rig.device.prefer(rig.wire)
    rig.stream.synchronize()
    assert rig.has_arrived(both, rig.arena)


@pytest.mark.parametrize("way", Direction)
def test_runs_are_sent(way: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(0, monkeypatch, way)
    rig.edge_bytes = 1 << 20
    rig.copies.copy(rig.pages(10, are_whole=True, regions=slice(0, 3)), rig.stream)
    assert rig.sent == [1] * 10, "a part"


@pytest.mark.parametrize("num_parts", [10, 11], ids=["an even number of pieces", "an odd one"])
def test_the_wire_is_idle_for_a_moment_between_two_loads(num_parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(0, monkeypatch)
    rig.device.prefer(rig.wire)
    seen: list[bool] = []
    rig.copies.copy(rig.pages(num_parts, regions=slice(0, 3)), rig.stream)
    last = rig.copies._seen
    send = rig.copies._send

    def send_and_look(plan: Plan, wire: Stream) -> None:
        wire.enqueue(lambda: seen.append(last.query()))
        send(plan, wire)

    rig.copies._send = send_and_look
    rig.copies.copy(rig.pages(12), rig.stream)
    rig.stream.synchronize()
    assert seen
    assert all(seen)


@pytest.mark.parametrize("are_lone", [False, True], ids=["in runs", "lone"])
def test_long_pages_are_saved_as_they_are_and_loaded_in_pieces(are_lone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While they are loaded others wait for the wire, which is idle for a moment between pieces."""
    monkeypatch.setattr(runs, "_LONG_PAGE_BYTES", 64)
    for way, region in itertools.product(Direction, (1, 2)):
        rig, is_long = Rig(0, monkeypatch, way), region == 1
        pages = rig.pages(8, are_whole=True, regions=slice(region, region + 1))
        if are_lone:
            pages = pages.only(pages.rows.places == 0)
        is_made = rig.copies.copy(pages, rig.stream) is not None
        assert is_made == (way is Direction.TO_POOL if is_long else not are_lone)


@pytest.mark.parametrize("way", Direction)
@pytest.mark.parametrize("why", ["no pages", "no runs", "no words", "no room"])
def test_other_pages_are_left_to_other_ways(why: str, way: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(0, monkeypatch, way)
    if why == "no room":
        monkeypatch.setattr(runs, "PIECE_BYTES", int(PAGE_BYTES.sum()) - 1)
    pages = rig.pages(0 if why == "no pages" else 10, regions=slice(0, 3))
    if why == "no runs":
        pages = pages.only(pages.rows.places % 2 == 0)
    rig.mover.can = why != "no words"
    assert not rig.copies.copy(pages, rig.stream)
    assert not (rig.sent or rig.wire.work or rig.stream.work)


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
        assert not rig.copies.copy(rig.pages(12, regions=slice(0, 3)), rig.stream)
    rig.stream.synchronize()
    assert len(rig.sent) == 2
    assert [record.message for record in caplog.records] == [
        "to_pool: pages are copied one by one, which is slower: RuntimeError('out of order')"
    ]
