"""A job whose copies take several ways ends when all have ended, on streams that go on in any order that events permit.

The copier is `CudaCopier` without its device: what it would enqueue there moves bytes of the host.
"""

from __future__ import annotations

import gc
import random
import threading
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvferry.testing.late_device import LateDevice, LateMover, Stream
from kvferry.transfer import cuda, kernels, runs
from kvferry.transfer.cuda import CudaCopier, PinnedPieces
from kvferry.transfer.host import move
from kvferry.transfer.plan import Direction, Pages, PartBlocks, Plan, Strides, block_rows

NUM_BLOCKS, NUM_SLOTS, BLOCKS_PER_PART = 90, 24, 4
PAGE_BYTES = np.array([16, 64, 48])
PINNED_BYTES = 400
"""Of a piece of the arena that is registered or not."""
PART_BYTES = BLOCKS_PER_PART * int(PAGE_BYTES.sum())


class Scene:
    """Three jobs' worth of copies, in runs or not, of registered memory or not. One of the sends on the wire may break
    off, after some of its copies were enqueued."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.device = LateDevice(self.choose)
        self.way = self.choose.choice(list(Direction))
        self.arena, self.pool = (
            np.zeros(NUM_SLOTS * PART_BYTES, np.uint8),
            np.zeros(NUM_BLOCKS * int(PAGE_BYTES.sum()), np.uint8),
        )
        bases = self.pool.ctypes.data + NUM_BLOCKS * (np.cumsum(PAGE_BYTES) - PAGE_BYTES)
        self.strides = Strides(self.arena.ctypes.data, BLOCKS_PER_PART, bases, PAGE_BYTES, PAGE_BYTES)
        self.source, self.destination = (
            (self.arena, self.pool) if self.way is Direction.TO_POOL else (self.pool, self.arena)
        )
        self.source[:] = np.random.default_rng(seed).integers(1, 256, self.source.size, dtype=np.uint8)
        self.num_sends_left, self.num_refused = self.choose.randrange(40), 0
        self.buffers: list[np.ndarray] = []
        self.copier = copier = object.__new__(CudaCopier)
        copier.streams = {way: self.device.stream() for way in Direction}
        copier._wires = {way: self.device.stream() for way in Direction}
        copier._pieces = self.pieces()
        copier._runtime = SimpleNamespace(copy=self.send, use_device=lambda: None)
        copier._make_stages = lambda: None
        copier._lock, copier._copy_staged, self.num_staged = threading.Lock(), self.copy_staged, 0
        copier._allocate = self.allocate
        copier._runs = {way: copier._run_copies(way, LateMover(stream)) for way, stream in copier.streams.items()}
        copier._warm()
        self.jobs = [self.pages(at) for at in range(3)]

    def pieces(self) -> PinnedPieces:
        """All or most are registered, and nobody registers the rest."""
        pieces = object.__new__(PinnedPieces)
        pieces._base, share = self.arena.ctypes.data, self.choose.choice([1, 0.9])
        pieces._pinned = np.array([self.choose.random() < share for _ in range(-(-self.arena.size // PINNED_BYTES))])
        pieces._wanted, pieces._changed = [], threading.Condition()
        return pieces

    def may_be_sent(self, plan: Plan) -> bool:
        """The driver refuses what is not registered, or crosses from one piece to another."""
        starts = (plan.in_arena(self.way) - np.uint64(self.arena.ctypes.data)).astype(np.int64)
        first, last = starts // PINNED_BYTES, (starts + plan.sizes.astype(np.int64) - 1) // PINNED_BYTES
        return bool((first == last).all() and self.copier._pieces._pinned[first].all())

    def copy_staged(self, plan: Plan, _way: Direction, stream: Stream) -> None:
        self.num_staged += 1
        stream.enqueue(partial(move, plan))

    def allocate(self, num_bytes: int) -> int:
        self.buffers.append(np.zeros(num_bytes, np.uint8))
        return self.buffers[-1].ctypes.data

    def send(self, plan: Plan, way: Direction, stream: Stream) -> None:
        self.num_refused += not self.may_be_sent(plan)
        if stream is self.copier._wires[way]:
            self.num_sends_left -= 1
            if self.num_sends_left == 0:
                stream.enqueue(partial(move, plan.only(slice(self.choose.randrange(len(plan.sizes) + 1)))))
                raise RuntimeError("out of order")
        stream.enqueue(partial(move, plan))

    def pages(self, at: int) -> Pages:
        blocks = self.choose.sample(range(30 * at, 30 * at + 30), 7 * BLOCKS_PER_PART)
        parts = [
            PartBlocks((8 * at + nth) * PART_BYTES, 0, blocks[nth * BLOCKS_PER_PART :][:BLOCKS_PER_PART])
            for nth in self.choose.sample(range(7), 7)
        ]
        pages = Pages(block_rows(parts), self.strides, self.way, slice(self.choose.randrange(2), 3))
        is_in_runs = self.choose.random() < 0.5
        return pages if is_in_runs else pages.only(pages.rows.places % 2 == 0)

    def has_arrived(self, pages: Pages) -> bool:
        plan = pages.plan()
        of = (plan.sources - np.uint64(self.source.ctypes.data)).tolist()
        to = (plan.destinations - np.uint64(self.destination.ctypes.data)).tolist()
        return all(
            np.array_equal(self.source[at : at + size], self.destination[place : place + size])
            for at, place, size in zip(of, to, plan.sizes.tolist(), strict=True)
        )


def test_copies_end_where_the_last_call_says_whatever_way_each_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PIECE_BYTES", 640)
    monkeypatch.setattr(cuda, "PIECE_BYTES", PINNED_BYTES)
    ends = {"wire": 0, "broken": 0, "staged": 0}
    for seed in range(200):
        scene = Scene(seed)
        last: Any = None
        for pages in scene.jobs:
            last = scene.copier.copy(pages)
            scene.device.run(scene.choose.random())
        last.synchronize()
        assert all(map(scene.has_arrived, scene.jobs)), seed
        assert not scene.num_refused, seed
        ends["wire"] += last is scene.copier._wires[scene.way]
        ends["staged"] += scene.num_staged
        ends["broken"] += scene.copier._runs[scene.way]._buffer is None
    assert all(ends.values()), "each was met"


def without_memory(*_: Any) -> Any:
    raise RuntimeError("out of memory")


def test_where_the_kernel_has_no_memory_pages_are_copied_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "triton", object())
    monkeypatch.setattr(kernels, "_NumberRing", without_memory)
    scene = Scene(0)
    assert not kernels.PageKernel(scene.copier.streams[scene.way]).warm(scene.way)
    assert [record.message for record in caplog.records] == [
        "pages are copied one by one, which is slower: out of memory"
    ]


def test_until_there_is_a_buffer_pages_are_copied_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Scene, "allocate", without_memory)
    scene = Scene(0)
    for pages in scene.jobs:
        scene.copier.copy(pages).synchronize()
        assert scene.has_arrived(pages)
    assert not scene.copier._wires[scene.way].work
    assert [record.message for record in caplog.records] == [
        "pages are copied one by one, which is slower: RuntimeError('out of memory')"
    ]


def test_what_is_closed_gives_its_memory_back_at_once() -> None:
    copier = Scene(0).copier
    copier._warming, copier._pieces = SimpleNamespace(join=lambda: None), SimpleNamespace(close=lambda: None)
    copier._all_streams, copier._stages, copier._buffers = (), [], []
    movers = [weakref.ref(runs._mover) for runs in copier._runs.values()]
    gc.disable()  # Nobody but the collector would find what knows itself.
    try:
        copier.close()
        assert not any(mover() for mover in movers)
    finally:
        gc.enable()
