"""A job whose copies take several ways ends when all have ended, on streams that go on in any order that events permit.

The copier is `CudaCopier` without its device: what it would enqueue there moves bytes of the host.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvferry.testing.late_device import LateDevice, Stream
from kvferry.transfer import runs
from kvferry.transfer.cuda import CudaCopier
from kvferry.transfer.host import move
from kvferry.transfer.kernels import Tuning
from kvferry.transfer.plan import Addresses, Direction, Plan

BYTES, PAGES = 1 << 16, 30


class Kernel:
    """Stands for `PageKernel`, which is asked to move pages on the device alone."""

    def can_move(self, plan: Plan) -> bool:
        return True

    def copy(self, *_: object) -> bool:
        return False

    @contextmanager
    def listed(self, plan: Plan, stream: Stream) -> Iterator[Callable[[int, int], None]]:
        yield lambda first, end: stream.enqueue(partial(move, plan.only(slice(first, end))))


class Scene:
    """Three jobs' worth of copies, in runs or not, of registered memory or not. One of the sends on the wire may break
    off, after some of its copies were enqueued."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.device = LateDevice(self.choose)
        self.way = self.choose.choice(list(Direction))
        self.arena, self.pool = (np.zeros(BYTES, np.uint8) for _ in range(2))
        self.source, self.destination = (
            (self.arena, self.pool) if self.way is Direction.TO_POOL else (self.pool, self.arena)
        )
        self.source[:] = np.random.default_rng(seed).integers(1, 256, BYTES, dtype=np.uint8)
        self.num_sends_left = self.choose.randrange(40)
        self.buffers: list[np.ndarray] = []
        self.copier = copier = object.__new__(CudaCopier)
        copier.streams = {way: self.device.stream() for way in Direction}
        copier._wires = {way: self.device.stream() for way in Direction}
        copier._pieces = SimpleNamespace(cut=lambda plan, _addresses: plan, split=self.split)
        copier._runtime = SimpleNamespace(copy=self.send)
        copier._kernel = Kernel()
        copier._tuning, copier._tune_once = Tuning(), lambda: None
        copier._allocate = self.allocate
        copier._runs = {way: copier._run_copies(way) for way in Direction}
        self.plans = [self.plan(at) for at in range(3)]

    def split(self, addresses: Addresses) -> np.ndarray:
        return np.ones(len(addresses), np.bool_)

    def allocate(self, num_bytes: int) -> int:
        self.buffers.append(np.zeros(num_bytes, np.uint8))
        return self.buffers[-1].ctypes.data

    def send(self, plan: Plan, way: Direction, stream: Stream) -> None:
        if stream is self.copier._wires[way]:
            self.num_sends_left -= 1
            if self.num_sends_left == 0:
                stream.enqueue(partial(move, plan.only(slice(self.choose.randrange(len(plan.sizes) + 1)))))
                raise RuntimeError("out of order")
        stream.enqueue(partial(move, plan))

    def plan(self, at: int) -> Plan:
        sizes = np.array([self.choose.choice([16, 64, 256]) for _ in range(PAGES)], np.uint64)
        run = self.choose.choice([4, 1])
        gaps = np.cumsum([16 * (index % run == 0) for index in range(PAGES)]).astype(np.uint64)
        slots = np.array(self.choose.sample(range(64 * at, 64 * at + 2 * PAGES), PAGES), np.uint64)
        arena = np.uint64(self.arena.ctypes.data + 64 * 256 * at) + gaps + np.cumsum(sizes) - sizes
        pool = np.uint64(self.pool.ctypes.data) + np.uint64(256) * slots
        return Plan(*((arena, pool) if self.way is Direction.TO_POOL else (pool, arena)), sizes)

    def has_arrived(self, plan: Plan) -> bool:
        of = (plan.sources - np.uint64(self.source.ctypes.data)).tolist()
        to = (plan.destinations - np.uint64(self.destination.ctypes.data)).tolist()
        return all(
            np.array_equal(self.source[at : at + size], self.destination[place : place + size])
            for at, place, size in zip(of, to, plan.sizes.tolist(), strict=True)
        )


def test_copies_end_where_the_last_call_says_whatever_way_each_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PIECE_BYTES", 640)
    monkeypatch.setattr(runs, "_SHORTEST_RUN_BYTES", 64)
    monkeypatch.setattr(runs, "_LONGEST_PAGE_BYTES", 256)
    ends = {"wire": 0, "broken": 0}
    for seed in range(200):
        scene = Scene(seed)
        last: Any = None
        for plan in scene.plans:
            last = scene.copier.copy(plan, scene.way)
            scene.device.run(scene.choose.random())
        last.synchronize()
        assert all(map(scene.has_arrived, scene.plans)), seed
        ends["wire"] += last is scene.copier._wires[scene.way]
        ends["broken"] += not scene.copier._runs[scene.way]._works
    assert all(ends.values()), "each was met"
