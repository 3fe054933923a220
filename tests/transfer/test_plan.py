"""Plans against a model that moves one byte at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.transfer.plan import Direction, PartBlocks, Plan, Strides, block_rows, plan_copies

BLOCKS_PER_PART = 4
NUM_BLOCKS = 16
NUM_SLOTS = 6

Scene = tuple[list[PartBlocks], Strides, range]


@st.composite
def scenes(draw: Callable[..., object]) -> Scene:
    num_layers = draw(st.integers(1, 3))
    layer_bytes = draw(st.integers(1, 5))
    block_bytes = num_layers * layer_bytes
    gap = draw(st.integers(0, 3))
    strides = Strides(
        arena_base=1000,
        pool_base=10_000,
        block_stride_bytes=block_bytes + gap,
        num_layers=num_layers,
        layer_bytes=layer_bytes,
    )
    slots = draw(st.lists(st.integers(0, NUM_SLOTS - 1), unique=True, max_size=NUM_SLOTS))
    ids = draw(st.permutations(range(NUM_BLOCKS)) | st.just(list(range(NUM_BLOCKS))))
    parts = []
    for slot in slots:
        first = draw(st.integers(0, BLOCKS_PER_PART - 1))
        count = min(draw(st.integers(0, BLOCKS_PER_PART - first)), len(ids))
        parts.append(PartBlocks(slot * BLOCKS_PER_PART * block_bytes, first, ids[:count]))
        ids = ids[count:]
    first_layer = draw(st.integers(0, num_layers - 1))
    return parts, strides, range(first_layer, draw(st.integers(first_layer + 1, num_layers)))


def naive(scene: Scene, direction: Direction) -> set[tuple[int, int]]:
    """(source, destination) of every byte."""
    parts, strides, layers = scene
    block_bytes = strides.num_layers * strides.layer_bytes
    moves = set()
    for part in parts:
        for i, block in enumerate(part.block_ids):
            for byte in range(layers.start * strides.layer_bytes, layers.stop * strides.layer_bytes):
                arena = strides.arena_base + part.offset + (part.first_block + i) * block_bytes + byte
                pool = strides.pool_base + block * strides.block_stride_bytes + byte
                moves.add((arena, pool) if direction is Direction.TO_POOL else (pool, arena))
    return moves


def plan_of(parts: Sequence[PartBlocks], strides: Strides, direction: Direction, layers: range | None = None) -> Plan:
    return plan_copies(block_rows(parts, strides.num_layers * strides.layer_bytes), strides, direction, layers)


def bytes_of(plan: Plan) -> list[tuple[int, int]]:
    triples = zip(plan.sources.tolist(), plan.destinations.tolist(), plan.sizes.tolist(), strict=True)
    return [(source + i, destination + i) for source, destination, size in triples for i in range(size)]


@given(scene=scenes(), direction=st.sampled_from(Direction), num_shares=st.integers(1, 5))
def test_a_plan_moves_each_byte_once_and_shares_are_the_plan(
    scene: Scene, direction: Direction, num_shares: int
) -> None:
    plan = plan_of(*scene[:2], direction, scene[2])
    moved = bytes_of(plan)
    assert len(moved) == len(set(moved)) == plan.num_bytes
    assert set(moved) == naive(scene, direction)

    shares = plan.split(num_shares)
    assert [move for share in shares for move in bytes_of(share)] == moved
    assert len(shares) <= num_shares
    assert max(share.num_bytes for share in shares) <= -(-plan.num_bytes // num_shares)
    for share in shares:
        assert (share.sizes > 0).all()


@given(scene=scenes(), direction=st.sampled_from(Direction))
def test_no_two_copies_could_have_been_one(scene: Scene, direction: Direction) -> None:
    plan = plan_of(*scene[:2], direction, scene[2])
    joins_source = plan.sources[1:] == plan.sources[:-1] + plan.sizes[:-1]
    joins_destination = plan.destinations[1:] == plan.destinations[:-1] + plan.sizes[:-1]
    assert not (joins_source & joins_destination).any()


def test_neighbouring_blocks_and_slots_are_one_copy() -> None:
    strides = Strides(arena_base=0, pool_base=1 << 20, block_stride_bytes=60, num_layers=3, layer_bytes=20)
    parts = [PartBlocks(240 * i, 0, range(4 * i, 4 * i + 4)) for i in range(3)]
    plan = plan_of(parts, strides, Direction.FROM_POOL)
    assert plan.sizes.tolist() == [720]
    assert len(plan_of(parts, strides, Direction.FROM_POOL, range(1)).sizes) == 12


def test_addresses_above_the_signed_range_of_32_bits_stay_exact() -> None:
    strides = Strides(
        arena_base=0x7F00_0000_0000, pool_base=0x7E00_0000_0000, block_stride_bytes=1 << 30, num_layers=1, layer_bytes=8
    )
    plan = plan_of([PartBlocks(1 << 40, 0, [3])], strides, Direction.TO_POOL)
    assert plan.sources.dtype == np.uint64
    assert plan.sources.tolist() == [0x7F00_0000_0000 + (1 << 40)]
    assert plan.destinations.tolist() == [0x7E00_0000_0000 + 3 * (1 << 30)]


def test_a_block_that_does_not_exist_is_never_an_address() -> None:
    strides = Strides(arena_base=0, pool_base=0, block_stride_bytes=8, num_layers=1, layer_bytes=8)
    with pytest.raises(AssertionError):
        plan_of([PartBlocks(0, 0, [1, -1])], strides, Direction.TO_POOL)
