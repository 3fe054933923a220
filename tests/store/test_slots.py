"""Free slots: sizes, ranks, slabs that change hands, and memory that runs out."""

from __future__ import annotations

import errno
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.blocks import Slot
from kvferry.store.arena import Arena, slot_stride, slots_per_slab
from kvferry.store.slots import SlotAllocator, SlotClass, choose_slab_bytes, fits

SLAB_BYTES = 64 << 10


@pytest.fixture
def arena(tmp_path: Path) -> Iterator[Arena]:
    arena = Arena.create(4096 + 8 * SLAB_BYTES, str(tmp_path))
    arena.cut(SLAB_BYTES)
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
    assert len(first) == 8 * slots_per_slab(SLAB_BYTES, 4096)
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
    offsets = [slot.offset for _ in range(10) if (slot := slots.take(4096, 0))]
    assert offsets == list(range(offsets[0], offsets[0] + 10 * 4096, 4096))


def test_an_empty_slab_serves_another_size(slots: SlotAllocator) -> None:
    taken = take_all(slots, 4096)
    assert slots.take(64, 0) is None
    for slot in taken[:-1]:
        slots.give_back(slot)
    assert slots.num_spare == 7
    assert len(take_all(slots, 64)) == 7 * slots_per_slab(SLAB_BYTES, 64)


def test_room_foresees_what_giving_back_would_bring(slots: SlotAllocator) -> None:
    large = take_all(slots, 16384)
    needs = Counter({SlotClass(64, 0): 1, SlotClass(16384, 0): 1})
    room = slots.room(needs)
    for slot in large[:4]:
        assert not room.enough()
        room.give([slot])
    assert room.enough()
    slots.check(large)
    for slot in large[:4]:
        slots.give_back(slot)
    assert slots.take(64, 0)
    assert slots.take(16384, 0)


@given(st.lists(st.tuples(st.sampled_from([64, 640, 4096, 16384]), st.integers(0, 1), st.booleans()), max_size=60))
def test_room_says_what_take_then_does(steps: list[tuple[int, int, bool]]) -> None:
    arena = Arena.create(4096 + 4 * SLAB_BYTES)
    arena.cut(SLAB_BYTES)
    slots = SlotAllocator(arena)
    taken: list[Slot] = []
    for num_bytes, rank, give in steps:
        if give and taken:
            slots.give_back(taken.pop(len(taken) // 2))
            continue
        of = SlotClass(slot_stride(num_bytes), rank)
        few = slots.slots_per_slab(of) // 2 + 1
        enough = slots.room({of: few}).enough()
        got = [slot for _ in range(few) if (slot := slots.take(num_bytes, rank))]
        assert (len(got) == few) == enough
        taken += got
        slots.check(taken)
    slots.close()
    arena.close()


def test_memory_that_runs_out_ends_the_arena(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    claim = Arena.claim

    def claim_two(self: Arena, slab: int) -> None:
        if slab >= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        claim(self, slab)

    monkeypatch.setattr(Arena, "claim", claim_two)
    with caplog.at_level(logging.WARNING, "kvferry"):
        slots = SlotAllocator(arena)
        taken = take_all(slots, 4096)
    assert len(taken) == 2 * slots_per_slab(SLAB_BYTES, 4096)
    assert [record.message[:24] for record in caplog.records] == ["shared memory is full: t"]
    slots.give_back(taken[0])
    assert slots.take(4096, 0) is not None
    assert not slots.room({SlotClass(64, 0): 1}).enough()
    slots.close()


@pytest.mark.parametrize(
    ("arena_bytes", "part_bytes", "num_ranks"),
    [
        (4 * 10**9, [11_796_480], 1),
        (4 * 10**9, [32 << 20], 1),
        (4 * 10**9, [32 << 20, 5 << 20], 2),
        (4 * 10**9, [64 << 10], 8),
        (4 * 10**9, [1 << 20, 640], 1),
        (1 * 10**9, [11_796_480, 2_949_120], 1),
        (64 * 10**6, [11_796_480], 1),
    ],
)
def test_slabs_are_cut_so_that_little_is_wasted(arena_bytes: int, part_bytes: list[int], num_ranks: int) -> None:
    slab_bytes = choose_slab_bytes(arena_bytes, part_bytes, num_ranks)
    assert slab_bytes is not None
    for num_bytes in part_bytes:
        stride = slot_stride(num_bytes)
        wasted = 1 - slots_per_slab(slab_bytes, stride) * stride / slab_bytes
        assert wasted <= (0.01 if len(part_bytes) == 1 and stride >= 1 << 20 else 0.12 if stride >= 4096 else 0.2)
    assert arena_bytes % slab_bytes <= 0.25 * arena_bytes


def test_a_chunk_that_does_not_fit_is_foreseen(arena: Arena) -> None:
    assert choose_slab_bytes(10_000_000, [11_000_000], 1) is None
    assert choose_slab_bytes(10_000_000, [4_000_000], 3) is None
    assert choose_slab_bytes(10_000_000, [3_000_000], 3) is not None
    assert fits(arena, [SLAB_BYTES // 2], 8)
    assert not fits(arena, [SLAB_BYTES // 2], 9)
    assert not fits(arena, [SLAB_BYTES], 1)
