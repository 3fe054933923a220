"""Plans against a model that moves one byte at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.testing.late_device import beside
from kvferry.transfer.plan import Direction, Pages, PartBlocks, Plan, Strides, block_rows

BLOCKS_PER_PART = 4
NUM_BLOCKS = 16
NUM_SLOTS = 6

Scene = tuple[list[PartBlocks], Strides, slice]


@st.composite
def scenes(draw: Callable[..., object]) -> Scene:
    num_regions = draw(st.integers(1, 3))
    page_bytes = np.array(draw(st.lists(st.integers(1, 5), min_size=num_regions, max_size=num_regions)))
    gap = draw(st.integers(0, 3))
    strides = Strides(
        arena_base=1000,
        blocks_per_part=BLOCKS_PER_PART,
        bases=10_000 * np.arange(1, num_regions + 1),
        stride_bytes=page_bytes + gap,
        page_bytes=page_bytes,
    )
    part_bytes = BLOCKS_PER_PART * int(page_bytes.sum())
    slots = draw(st.lists(st.integers(0, NUM_SLOTS - 1), unique=True, max_size=NUM_SLOTS))
    ids = draw(st.permutations(range(NUM_BLOCKS)) | st.just(list(range(NUM_BLOCKS))))
    parts = []
    for slot in slots:
        first = draw(st.integers(0, BLOCKS_PER_PART - 1))
        count = min(draw(st.integers(0, BLOCKS_PER_PART - first)), len(ids))
        parts.append(PartBlocks(slot * part_bytes, first, ids[:count]))
        ids = ids[count:]
    first_region = draw(st.integers(0, num_regions - 1))
    return parts, strides, slice(first_region, draw(st.integers(first_region + 1, num_regions)))


def naive(scene: Scene, direction: Direction) -> set[tuple[int, int]]:
    """(source, destination) of every byte."""
    parts, strides, regions = scene
    moves = set()
    for part in parts:
        for i, block in enumerate(part.block_ids):
            for region in range(regions.start, regions.stop):
                page = int(strides.page_bytes[region])
                before = BLOCKS_PER_PART * int(strides.page_bytes[:region].sum())
                for byte in range(page):
                    arena = strides.arena_base + part.offset + before + (part.first_block + i) * page + byte
                    pool = int(strides.bases[region]) + block * int(strides.stride_bytes[region]) + byte
                    moves.add((arena, pool) if direction is Direction.TO_POOL else (pool, arena))
    return moves


def plan_of(parts: Sequence[PartBlocks], strides: Strides, direction: Direction, regions: slice = slice(None)) -> Plan:
    return Pages(block_rows(parts), strides, direction, regions).plan()


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


@given(scene=scenes(), direction=st.sampled_from(Direction), origin=st.integers(0, 1000), distance=st.integers(1, 40))
def test_no_copy_crosses_an_edge(scene: Scene, direction: Direction, origin: int, distance: int) -> None:
    plan = plan_of(*scene[:2], direction, scene[2])
    cut = plan.cut_at_edges(plan.sources, origin, distance)
    assert bytes_of(cut) == bytes_of(plan)
    first, last = cut.sources - np.uint64(origin), cut.sources + cut.sizes - np.uint64(origin + 1)
    assert (first // np.uint64(distance) == last // np.uint64(distance)).all()


@given(scene=scenes(), direction=st.sampled_from(Direction), most=st.integers(1, 5))
def test_runs_and_single_pages_beside_them_move_what_the_plan_moves(
    scene: Scene, direction: Direction, most: int
) -> None:
    """Both meet in packed memory, where each byte has one place."""
    pages = Pages(block_rows(scene[0]), scene[1], direction, scene[2])
    heads, lengths = pages.rows.stretches(most)
    assert lengths.sum() == pages.rows.ids.size
    assert ((lengths > 0) & (lengths <= most)).all()
    runs = bytes_of(pages.runs(heads, lengths, 500_000))
    singles = [move for plan in beside(pages, heads, lengths, 500_000) for move in bytes_of(plan)]
    first, second = (dict(runs), dict(singles)) if direction is Direction.TO_POOL else (dict(singles), dict(runs))
    assert len(first) == len(second) == len(runs)
    assert sorted(first.values()) == [*range(500_000, 500_000 + len(runs))]
    assert {(source, second[place]) for source, place in first.items()} == naive(scene, direction)


@given(scene=scenes(), direction=st.sampled_from(Direction))
def test_a_row_s_pages_lie_between_the_ends_of_its_span(scene: Scene, direction: Direction) -> None:
    pages = Pages(block_rows(scene[0]), scene[1], direction, scene[2])
    for row, (first, last) in enumerate(zip(*map(np.ndarray.tolist, pages.spans()), strict=True)):
        plan = pages.only(np.arange(pages.rows.ids.size) == row).plan()
        starts = plan.in_arena(direction)
        assert (int(starts.min()), int((starts + plan.sizes).max()) - 1) == (first, last)


def test_whole_parts_are_one_run_of_all_their_regions() -> None:
    strides = Strides(0, 4, np.array([1000, 2000, 3000]), np.array([8, 8, 8]), np.array([8, 8, 8]))
    for first_block, sizes in ((0, [64, 64]), (1, [24, 24, 24, 24])):
        parts = [PartBlocks(at, first_block, range(4 - first_block)) for at in (96, 0)]
        pages = Pages(block_rows(parts), strides, Direction.TO_POOL, slice(1, 3))
        assert pages.runs(*pages.rows.stretches(100), packed=0).sizes.tolist() == sizes


def one_region(base: int, stride_bytes: int, page_bytes: int, arena_base: int = 0, blocks_per_part: int = 4) -> Strides:
    return Strides(arena_base, blocks_per_part, np.array([base]), np.array([stride_bytes]), np.array([page_bytes]))


def test_neighbouring_blocks_and_slots_are_one_copy() -> None:
    strides = one_region(base=1 << 20, stride_bytes=60, page_bytes=60)
    parts = [PartBlocks(240 * i, 0, range(4 * i, 4 * i + 4)) for i in range(3)]
    assert plan_of(parts, strides, Direction.FROM_POOL).sizes.tolist() == [720]


def test_addresses_above_the_signed_range_of_32_bits_stay_exact() -> None:
    strides = one_region(0x7E00_0000_0000, stride_bytes=1 << 30, page_bytes=8, arena_base=0x7F00_0000_0000)
    plan = plan_of([PartBlocks(1 << 40, 0, [3])], strides, Direction.TO_POOL)
    assert plan.sources.dtype == np.uint64
    assert plan.sources.tolist() == [0x7F00_0000_0000 + (1 << 40)]
    assert plan.destinations.tolist() == [0x7E00_0000_0000 + 3 * (1 << 30)]


def test_a_block_that_does_not_exist_is_never_an_address() -> None:
    with pytest.raises(AssertionError):
        plan_of([PartBlocks(0, 0, [1, -1])], one_region(base=0, stride_bytes=8, page_bytes=8), Direction.TO_POOL)
