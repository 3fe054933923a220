"""What a dead owner's arena still holds: entries that are whole, slots that someone still copies, and free ones.

A header is believed only if it fits its slab and its entry's other headers. Knows headers; no tier, no lease.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvferry.blocks import Slot
from kvferry.store.arena import COMMITTED, FREE, NO_CHECKSUM, Arena, FoundSlab, SlotHeader, slot_stride
from kvferry.store.locks import Range
from kvferry.store.slots import Run, Slab, SlotClass


@dataclass(slots=True)
class Found:
    """What is in an arena.

    entries: the headers and slots of each entry that is whole, by rank; those reserved first come first. withdrawn:
    slots of nobody's that someone still copies. slabs: those with a slot of either kind. unusable: units in no such
    slab that someone still copies.
    """

    entries: list[list[tuple[SlotHeader, Slot]]] = field(default_factory=list)
    withdrawn: list[Slot] = field(default_factory=list)
    slabs: list[Slab] = field(default_factory=list)
    unusable: list[int] = field(default_factory=list)


def recover(arena: Arena) -> Found:
    """Look through an arena whose owner this process has become, and free all that is not whole.

    Headers are cleared before it is asked who copies, so that nobody begins unseen.
    """
    slabs = arena.find_slabs()
    whole = _whole_entries(arena, slabs)
    keep = {slot.offset for entry in whole for _, slot in entry}
    _clear(arena, slabs, keep)
    locked = arena.locked_ranges()
    found = Found()
    for entry in whole:
        if any(_overlaps(slot.offset, slot_stride(slot.num_bytes), locked) for _, slot in entry):
            for _, slot in entry:
                arena.set_state(slot, FREE)
                keep.discard(slot.offset)
        else:
            found.entries.append(entry)
    for slab in slabs:
        _take_stock(arena, slab, keep, locked, found)
    used = {unit for slab in found.slabs for unit in slab.units}
    for unit in set(range(arena.num_units)) - used:
        if _overlaps(arena.unit_offset(unit), arena.unit_bytes, locked):
            found.unusable.append(unit)
    return found


def _whole_entries(arena: Arena, slabs: Sequence[FoundSlab]) -> list[list[tuple[SlotHeader, Slot]]]:
    parts: dict[tuple[bytes, int], list[tuple[SlotHeader, Slot]]] = {}
    for slab in slabs:
        for offset, header in zip(slab.offsets, slab.headers, strict=True):
            if (
                header.state == COMMITTED
                and 0 < header.generation < arena.first_generation
                and header.rank == slab.rank < header.num_parts
                and header.num_bytes > 0
                and header.checksum == NO_CHECKSUM
                and slot_stride(header.num_bytes) == slab.stride
            ):
                slot = Slot(offset, header.num_bytes, header.generation)
                parts.setdefault((header.key, header.group), []).append((header, slot))
    whole = []
    for entry in parts.values():
        entry.sort(key=lambda part: part[0].rank)
        first = entry[0][0]
        expected = [first._replace(rank=rank) for rank in range(len(entry))]
        found = [header._replace(generation=first.generation) for header, _ in entry]
        if first.num_parts == len(entry) and found == expected:
            whole.append(entry)
    whole.sort(key=lambda entry: entry[0][0].generation)
    return whole


def _clear(arena: Arena, slabs: Sequence[FoundSlab], keep: set[int]) -> None:
    for slab in slabs:
        for offset, header in zip(slab.offsets, slab.headers, strict=True):
            if offset not in keep and (header.state != FREE or header.generation):
                arena.set_state(Slot(offset, header.num_bytes, header.generation), FREE)


def _take_stock(arena: Arena, slab: FoundSlab, keep: set[int], locked: Sequence[Range], found: Found) -> None:
    free = []
    for offset in reversed(slab.offsets):
        if offset in keep:
            continue
        if _overlaps(offset, slab.stride, locked):
            found.withdrawn.append(Slot(offset, slab.stride, 0))
        else:
            free.append(offset)
    if len(free) == len(slab.offsets):
        arena.free_slab(slab.first, slab.num_units)
    else:
        run = Run(SlotClass(slab.stride, slab.rank), slab.first, slab.num_units)
        found.slabs.append(Slab(run, len(slab.offsets), free))


def _overlaps(offset: int, num_bytes: int, ranges: Sequence[Range]) -> bool:
    """ranges: ascending and apart."""
    at = bisect_left(ranges, (offset + num_bytes,))
    return at > 0 and ranges[at - 1][1] > offset
