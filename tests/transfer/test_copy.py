"""Copies through real tensors, in host memory and, where there is one, on a CUDA device."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest
import torch

from kvferry.transfer.copy import CopyEngine, self_test
from kvferry.transfer.layout import Layout, PoolSpec, read_layout
from kvferry.transfer.plan import Direction, PartBlocks

SPEC = PoolSpec(num_layers=3, num_heads=2, head_dim=16, tokens_per_block=8, dtype="float32")
PAGE = 2 * 16 * 8
BLOCKS_PER_PART = 4
NUM_BLOCKS = 24

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a CUDA build of torch"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def layout(device: str) -> Layout:
    pool = torch.randn(NUM_BLOCKS, SPEC.num_layers + 1, 2, PAGE, device=device)[:, : SPEC.num_layers]
    layout = read_layout(pool, SPEC)
    assert isinstance(layout, Layout)
    return layout


@pytest.fixture
def arena(layout: Layout) -> bytearray:
    return bytearray(5 * BLOCKS_PER_PART * layout.block_bytes)


@pytest.fixture
def engine(layout: Layout, arena: bytearray) -> Iterator[CopyEngine]:
    engine = CopyEngine(layout, memoryview(arena))
    yield engine
    engine.close()


def parts_at(layout: Layout, slots: list[int], ids: list[int]) -> list[PartBlocks]:
    part_bytes = BLOCKS_PER_PART * layout.block_bytes
    return [
        PartBlocks(slot * part_bytes, 0, ids[i * BLOCKS_PER_PART : (i + 1) * BLOCKS_PER_PART])
        for i, slot in enumerate(slots)
    ]


def test_bytes_leave_and_come_back_into_other_blocks(layout: Layout, arena: bytearray, engine: CopyEngine) -> None:
    pool, before = layout.pool, layout.pool.clone()
    saved, loaded = [3, 9, 4, 5, 0, 1, 2, 23], [8, 7, 22, 6, 10, 11, 12, 13]
    engine.submit(Direction.FROM_POOL, parts_at(layout, [4, 1], saved), None).wait()
    part_bytes = BLOCKS_PER_PART * layout.block_bytes
    assert bytes(arena[4 * part_bytes : 5 * part_bytes]) == before[saved[:4]].cpu().numpy().tobytes()
    assert bytes(arena[part_bytes : 2 * part_bytes]) == before[saved[4:]].cpu().numpy().tobytes()
    assert not any(arena[2 * part_bytes : 4 * part_bytes])

    engine.submit(Direction.TO_POOL, parts_at(layout, [4, 1], loaded), None).wait()
    assert torch.equal(pool[loaded], before[saved])
    untouched = [block for block in range(NUM_BLOCKS) if block not in loaded]
    assert torch.equal(pool[untouched], before[untouched])


def test_a_load_may_begin_inside_a_part(layout: Layout, arena: bytearray, engine: CopyEngine) -> None:
    pool = layout.pool
    engine.submit(Direction.FROM_POOL, parts_at(layout, [2], [0, 1, 2, 3]), None).wait()
    offset = 2 * BLOCKS_PER_PART * layout.block_bytes
    engine.submit(Direction.TO_POOL, [PartBlocks(offset, 2, [20])], None).wait()
    assert torch.equal(pool[20], pool[2])


def test_copies_of_many_bytes_are_shared_between_threads() -> None:
    spec = PoolSpec(num_layers=2, num_heads=4, head_dim=64, tokens_per_block=32, dtype="bfloat16")
    pool = torch.randn(200, 2, 2, 4 * 64 * 32).bfloat16()
    layout = read_layout(pool, spec)
    assert isinstance(layout, Layout)
    arena = bytearray(200 * layout.block_bytes)
    engine = CopyEngine(layout, memoryview(arena))
    ids = torch.randperm(200).tolist()
    before = pool.clone()
    engine.submit(Direction.FROM_POOL, [PartBlocks(0, 0, ids)], None).wait()
    pool.zero_()
    engine.submit(Direction.TO_POOL, [PartBlocks(0, 0, ids)], None).wait()
    engine.close()
    assert torch.equal(pool, before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvferry-copy")]


@pytest.mark.parametrize(
    "part", [PartBlocks(-1, 0, [1]), PartBlocks(0, 19, [1, 2]), PartBlocks(0, 0, [NUM_BLOCKS]), PartBlocks(0, 0, [-1])]
)
def test_nothing_outside_arena_or_pool_is_touched(layout: Layout, engine: CopyEngine, part: PartBlocks) -> None:
    with pytest.raises(IndexError):
        engine.submit(Direction.TO_POOL, [part], None)


def test_the_self_test_passes_and_leaves_the_pool_as_it_was(layout: Layout) -> None:
    before = layout.pool.clone()
    assert self_test(layout)
    assert torch.equal(layout.pool, before)


def test_the_self_test_notices_wrong_strides() -> None:
    """As if the layout had been guessed: the stride of blocks without their gap."""
    pool = torch.randn(NUM_BLOCKS, SPEC.num_layers + 1, 2, PAGE)
    right = read_layout(pool[:, : SPEC.num_layers], SPEC)
    assert isinstance(right, Layout)
    wrong = dataclasses.replace(right, block_stride_bytes=right.block_bytes)
    before = pool.clone()
    assert not self_test(wrong)
    assert torch.equal(pool, before)
