"""Free slots: sizes, ranks, slabs that change hands, and memory that runs out."""

from __future__ import annotations

import errno
import logging
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.blocks import Slot
from kvferry.store.arena import Arena, slot_stride, slots_in, unit_bytes_of
from kvferry.store.slots import Room, SlotAllocator, SlotClass, fits, slab_units

ARENA_BYTES = 2 * 4096 + 8 * (4096 + 4096)
UNIT_BYTES = unit_bytes_of(ARENA_BYTES)


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    arena = Arena.create(ARENA_BYTES, str(tmp_path))
    assert (arena.num_units, arena.unit_bytes) == (8, UNIT_BYTES)
    yield arena
    arena.close()


@pytest.fixture
def slots(arena: Arena) -> Iterator[SlotAllocator]:
    allocator = SlotAllocator(arena)
    yield allocator
    allocator.close()


def take_all(slots: SlotAllocator, num_bytes: int, rank: int = 0) -> list[Slot]:
    taken = []
    while (slot := slots.take(num_bytes, rank)) is not None:
        taken.append(slot)
    return taken


def test_every_slot_is_its_own_with_a_generation_of_its_own(slots: SlotAllocator) -> None:
    first = take_all(slots, 4096)
    assert len(first) == 8 * slots_in(UNIT_BYTES, 4096)
    slots.check(first)
    for slot in first[::2]:
        slots.give_back(slot)
    slots.check(first[1::2])
    second = take_all(slots, 4096)
    assert {slot.offset for slot in second} == {slot.offset for slot in first[::2]}
    generations = [slot.generation for slot in first + second]
    assert len(set(generations)) == len(generations)


def test_slots_of_one_rank_lie_in_slabs_of_their_own(slots: SlotAllocator, arena: Arena) -> None:
    taken = [(slots.take(640, rank), rank) for _ in range(100) for rank in (0, 1)]
    slabs = {(arena.slab_of(slot.offset), rank) for slot, rank in taken if slot is not None}
    assert len({slab for slab, _ in slabs}) == len(slabs)


def test_neighbours_are_taken_in_order(slots: SlotAllocator) -> None:
    offsets = [slot.offset for _ in range(10) if (slot := slots.take(64, 0))]
    assert offsets == list(range(offsets[0], offsets[0] + 10 * 64, 64))


def test_an_empty_slab_serves_another_size(slots: SlotAllocator) -> None:
    taken = take_all(slots, 4096)
    assert slots.take(64, 0) is None
    for slot in taken[:-1]:
        slots.give_back(slot)
    assert slots.counts()["units_free"] == 7
    assert len(take_all(slots, 64)) == 7 * slots_in(UNIT_BYTES, 64)


def test_a_slot_larger_than_a_unit_lies_in_a_run_of_units(slots: SlotAllocator) -> None:
    """Neighbours that come free make one run, whoever had them."""
    small = [slot for slot in take_all(slots, 3000) if slot is not None]
    assert len(small) == 8
    assert slots.take(10_000, 0) is None
    for index in (0, 2, 4, 6):
        slots.give_back(small[index])
    assert slots.take(10_000, 0) is None, "room enough, but in pieces"
    slots.give_back(small[1])
    large = slots.take(10_000, 0)
    assert large is not None
    assert slots.take(10_000, 0) is None
    slots.check([large, small[3], small[5], small[7]])
    slots.give_back(large)
    assert slots.take(4096, 1) is not None


def test_room_foresees_what_giving_back_would_bring(slots: SlotAllocator) -> None:
    taken = take_all(slots, 4096)
    per_unit = slots_in(UNIT_BYTES, 4096)
    needs = Counter({SlotClass(64, 0): 1, SlotClass(12288, 0): 1})
    room = Room(slots, needs)
    given = [*taken[:per_unit], *taken[2 * per_unit : 4 * per_unit]]
    for slot in given:
        assert not room.enough(tight=False)
        room.give([slot])
    assert room.enough(tight=False), "one unit here and two side by side there"
    slots.check(taken)
    for slot in given:
        slots.give_back(slot)
    assert slots.prepare(needs)
    assert slots.take(64, 0)
    assert slots.take(12288, 0)


SIZES = st.sampled_from([64, 640, 4096, 10_000, 20_000])


@given(st.lists(st.tuples(SIZES, st.integers(0, 1), st.booleans()), max_size=60))
def test_room_says_what_prepare_then_does(steps: list[tuple[int, int, bool]]) -> None:
    arena = Arena.create(ARENA_BYTES)
    slots = SlotAllocator(arena)
    taken: list[Slot] = []
    for num_bytes, rank, give in steps:
        if give and taken:
            slots.give_back(taken.pop(len(taken) // 2))
            continue
        needs = Counter([*[SlotClass(slot_stride(num_bytes), rank)] * 3, SlotClass(4096, 1)])
        enough = any(Room(slots, needs).enough(tight=tight) for tight in (False, True))
        assert slots.prepare(needs) == enough
        sizes = [(num_bytes, rank)] * 3 + [(4096, 1)]
        got = [slots.take(size, rank) for size, rank in sizes] if enough else []
        assert all(got)
        taken += [slot for slot in got if slot is not None]
        slots.check(taken)
    for slot in taken:
        slots.give_back(slot)
    assert slots.counts() == {"slabs_used": 0, "units_free": 8, "slots_free": 0}
    slots.close()
    arena.close()


def test_memory_that_runs_out_ends_the_arena(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    claim = Arena.claim

    def claim_two(self: Arena, unit: int) -> None:
        if unit >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        claim(self, unit)

    monkeypatch.setattr(Arena, "claim", claim_two)
    with caplog.at_level(logging.WARNING, "kvferry"):
        slots = SlotAllocator(arena)
        taken = take_all(slots, 4096)
    assert len(taken) == 2 * slots_in(UNIT_BYTES, 4096)
    assert [record.message[:24] for record in caplog.records] == ["shared memory is full: t"]
    slots.give_back(taken[0])
    assert slots.take(4096, 0) is not None
    assert not Room(slots, {SlotClass(64, 0): 1}).enough(tight=True)
    slots.close()


def test_nobody_waits_while_pages_are_zeroed(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end, began = threading.Event(), threading.Event()

    def zero(self: Arena, unit: int) -> None:
        began.set()
        assert may_end.wait(60)

    monkeypatch.setattr(Arena, "populate", zero)
    slots = SlotAllocator(arena)
    assert began.wait(60), "the thread zeroes what nobody has taken yet"
    assert len(take_all(slots, 4096)) == arena.num_units * slots_in(UNIT_BYTES, 4096)
    may_end.set()
    slots.close()


@pytest.mark.parametrize("arena_bytes", [64 * 10**6, 10**9, 4 * 10**9, 100 * 10**9])
@pytest.mark.parametrize("part_bytes", [640, 4096, 64 << 10, 640 << 10, 1 << 20, 2_949_120, 11_796_480, 32 << 20])
def test_little_of_a_slab_is_left_over(arena_bytes: int, part_bytes: int) -> None:
    unit_bytes, stride = unit_bytes_of(arena_bytes), slot_stride(part_bytes)
    slab_bytes = slab_units(unit_bytes, arena_bytes // unit_bytes, stride).usual * unit_bytes
    left_over = 1 - slots_in(slab_bytes, stride) * stride / slab_bytes
    if slab_bytes <= arena_bytes / 2:
        assert left_over <= (0.12 if stride >= 4096 else 0.2)
    assert slab_bytes <= max(arena_bytes / 8, stride + 2 * unit_bytes)


def test_units_are_a_sixty_fourth_of_the_arena_within_limits() -> None:
    assert [unit_bytes_of(size) - 4096 for size in (10**5, 10**6, 10**8, 4 * 10**9, 10**12)] == [
        1 << 12,
        1 << 13,
        1 << 20,
        1 << 25,
        1 << 25,
    ]


def test_a_chunk_that_does_not_fit_is_foreseen(arena: Arena) -> None:
    for part_bytes, num_ranks, is_expected in (
        (UNIT_BYTES // 2, 8, True),
        (UNIT_BYTES // 2, 9, False),
        (UNIT_BYTES, 4, True),
        (UNIT_BYTES, 5, False),
        (8 * UNIT_BYTES - 4096, 1, True),
        (8 * UNIT_BYTES - 4095, 1, False),
    ):
        assert fits(arena, [(part_bytes, rank) for rank in range(num_ranks)]) == is_expected
    assert fits(arena, [(part_bytes, rank) for part_bytes in (UNIT_BYTES, 640) for rank in range(2)])
    assert fits(arena, [(UNIT_BYTES, 0)] * 4)


def test_more_is_claimed_ahead_for_who_may_take_more_at_once(tmp_path: Path) -> None:
    arena = Arena.create(1 << 30, str(tmp_path))
    slots = SlotAllocator(arena)
    memory = tmp_path.joinpath(arena.info.path)

    def wait_for(num_bytes: int) -> None:
        while memory.stat().st_blocks * 512 < num_bytes:
            threading.Event().wait(0.001)

    wait_for(7 * arena.unit_bytes)
    assert memory.stat().st_blocks * 512 < 10 * arena.unit_bytes
    slots.keep_ahead(12 * arena.unit_bytes)
    wait_for(12 * arena.unit_bytes)
    slots.keep_ahead(1 << 40)
    wait_for(arena.num_units // 4 * arena.unit_bytes)
    slots.close()
    assert memory.stat().st_blocks * 512 < (arena.num_units // 4 + 1) * arena.unit_bytes
    arena.close()
