"""Copies in the order of a device's work, on a device that the test holds back."""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch

from kvferry.testing.late_device import LateCopier, LateDevice, Stream
from kvferry.testing.late_device import mark as mark_late
from kvferry.transfer import copy as copy_module
from kvferry.transfer.copy import Copier, CopyEngine
from kvferry.transfer.layout import Layout, read_regions
from kvferry.transfer.plan import Direction, Pages, PartBlocks

NUM_LAYERS, NUM_BLOCKS, BLOCKS_PER_PART, PAGE_BYTES = 5, 16, 4, 64
IDS = [3, 9, 4, 12]


class Scene:
    """A pool of zeros on a late device, an arena full of other bytes, and a step for each layer of a copy."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(copy_module, "mark", mark_late)
        monkeypatch.setattr(copy_module, "_STEP_BYTES", 1)
        monkeypatch.setattr(copy_module, "_RUN_BYTES", 1)
        self.device = LateDevice(random.Random(seed))
        self.main = self.device.stream()
        self.pool = torch.zeros(NUM_LAYERS, NUM_BLOCKS, PAGE_BYTES, dtype=torch.uint8)
        layout = read_regions([(pages, (layer,)) for layer, pages in enumerate(self.pool)], 1, "test")
        assert isinstance(layout, Layout)
        rng = np.random.default_rng(seed)
        self.arena = rng.integers(1, 256, BLOCKS_PER_PART * layout.block_bytes, dtype=np.uint8)
        self.copier = Copier(layout.device, memoryview(self.arena))
        self.engine = CopyEngine(layout, self.copier, BLOCKS_PER_PART)
        self.parts = [PartBlocks(0, 0, IDS)]

    def in_arena(self, layer: int) -> torch.Tensor:
        return torch.from_numpy(self.arena.copy()).view(NUM_LAYERS, BLOCKS_PER_PART, PAGE_BYTES)[layer]


def test_a_save_ends_when_every_byte_is_in_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(50):
        scene = Scene(seed, monkeypatch)
        scene.copier.cuda = LateCopier(scene.device)  # type: ignore[assignment]
        scene.main.enqueue(partial(scene.pool.copy_, torch.randint_like(scene.pool, 1, 255)))
        scene.engine.submit(Direction.FROM_POOL, scene.parts, mark_late(scene.main)).wait()
        assert all(torch.equal(scene.pool[layer, IDS], scene.in_arena(layer)) for layer in range(NUM_LAYERS))
        scene.copier.close()


def test_a_layer_can_be_used_once_it_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    was_early = False
    for seed in range(50):
        scene = Scene(seed, monkeypatch)
        scene.copier.cuda = LateCopier(scene.device)  # type: ignore[assignment]
        copy = scene.engine.submit(Direction.TO_POOL, scene.parts, mark_late(scene.main))
        last, rest = copy.steps[-1][1], []
        seen: dict[int, torch.Tensor] = {}

        def look(layer: int, seen: dict[int, torch.Tensor] = seen, scene: Scene = scene) -> None:
            seen[layer] = scene.pool[layer, IDS].clone()

        for layer in range(NUM_LAYERS):
            copy.wait_for_layer(layer, scene.main)
            scene.main.enqueue(partial(look, layer))
            scene.main.enqueue(partial(lambda rest=rest, last=last: rest.append(last.query())))
        scene.main.synchronize()
        assert all(torch.equal(seen[layer], scene.in_arena(layer)) for layer in range(NUM_LAYERS))
        was_early |= not rest[0]
        scene.copier.close()
    assert was_early, "the first layers are used while the last are under way"


@pytest.mark.parametrize(
    ("step_bytes", "run_bytes", "steps"),
    [
        (1, 1, [1, 1, 1, 1, 1]),
        (1 << 20, 1, [5]),
        (8 * 4 * PAGE_BYTES, 1, [1, 4]),
        (1, 4 * PAGE_BYTES + 1, [2, 3]),
        (1, 1 << 20, [5]),
    ],
    ids=["small steps", "large ones", "a small one before larger ones", "short runs", "runs that are never long"],
)
def test_steps_are_of_all_regions_once(
    step_bytes: int, run_bytes: int, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A region of this copy, and of a part, is four pages."""

    class Noting(LateCopier):
        def copy(self, pages: Pages) -> Stream:
            regions.append(range(NUM_LAYERS)[pages.regions])
            return super().copy(pages)

    scene, regions = Scene(0, monkeypatch), list[range]()
    monkeypatch.setattr(copy_module, "_STEP_BYTES", step_bytes)
    monkeypatch.setattr(copy_module, "_RUN_BYTES", run_bytes)
    scene.copier.cuda = Noting(scene.device)  # type: ignore[assignment]
    scene.engine.submit(Direction.TO_POOL, scene.parts).wait()
    assert [len(of_step) for of_step in regions] == steps
    assert [region for of_step in regions for region in of_step] == [*range(NUM_LAYERS)]
    scene.copier.close()


@pytest.mark.parametrize("way", Direction)
def test_a_submission_that_breaks_off_leaves_nothing_under_way(way: Direction, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaking(LateCopier):
        num_left = 3

        def copy(self, pages: Pages) -> Stream:
            self.num_left -= 1
            if self.num_left < 0:
                raise RuntimeError("out of order")
            return super().copy(pages)

    for seed in range(20):
        scene = Scene(seed, monkeypatch)
        scene.copier.cuda = Breaking(scene.device)  # type: ignore[assignment]
        held_back: Stream = scene.main
        with pytest.raises(RuntimeError, match="out of order"):
            scene.engine.submit(way, scene.parts, mark_late(held_back))
        assert not any(stream.work for stream in scene.device._streams)
        scene.copier.close()
