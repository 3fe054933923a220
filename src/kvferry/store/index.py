"""What lies in the arena: entries by (key, group), with their slots, headers, pins and turn to leave.

Knows no lease, job, owner or tier: `store.Store` decides, this keeps index, slots, headers and evictor in step.
Callers serialise.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from kvferry.blocks import Slot, Tier
from kvferry.errors import InvariantError
from kvferry.store.arena import COMMITTED, FREE, RESERVED, Arena, SlotHeader, slot_stride
from kvferry.store.eviction import Evictor, make_policy
from kvferry.store.recovery import Found, recover
from kvferry.store.slots import Room, SlotAllocator, SlotClass

EntryId = tuple[bytes, int]
"""Key and group."""

_NO_CHECKSUM = bytes(16)


class EntryState(enum.Enum):
    """Who may touch an entry's bytes."""

    STORING = "storing"
    """An engine's ranks fill it; nobody else may know of it."""
    PROMOTING = "promoting"
    """Tiers fill it; jobs may wait for it."""
    COMMITTED = "committed"
    """Complete and immutable."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """An entry to make room for: `num_ranks` slots of `part_bytes`. `parent` is the key of the chunk before."""

    id: EntryId
    parent: bytes
    part_bytes: int
    num_ranks: int


@dataclass(slots=True, eq=False)
class Entry:
    """One group of one chunk in the arena, one slot per rank.

    source: the tier that it is promoted from. num_awaited: parts that tiers still fill. doubtful: a part failed or is
    overdue, so nobody new may wait for it. failed: a part failed, so the entry goes once no tier writes to it any more.
    """

    wanted: Wanted
    slots: tuple[Slot, ...]
    state: EntryState
    source: Tier = Tier.MEMORY
    num_awaited: int = 0
    doubtful: bool = False
    failed: bool = False

    @property
    def id(self) -> EntryId:
        return self.wanted.id

    @property
    def num_bytes(self) -> int:
        return self.wanted.part_bytes * self.wanted.num_ranks


class Index:
    """The entries of one arena. adopt: also those that an earlier owner of the arena left whole."""

    def __init__(self, arena: Arena, policy: Literal["lru", "s3fifo"], *, adopt: bool = False) -> None:
        self._arena = arena
        found = recover(arena) if adopt else Found()
        self._slots = SlotAllocator(arena, found.slabs, found.unusable)
        self._evictor: Evictor[EntryId] = Evictor(make_policy(policy))
        self._entries: dict[EntryId, Entry] = {}
        self._withdrawn = set(found.withdrawn)
        self.num_evicted = 0
        for parts in found.entries:
            header = parts[0][0]
            want = Wanted((header.key, header.group), header.parent, header.num_bytes, header.num_ranks)
            self._admit(Entry(want, tuple(slot for _, slot in parts), EntryState.COMMITTED))
            self._evictor.unpin(want.id)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, entry_id: EntryId) -> Entry | None:
        """The entry in whatever state, or None."""
        return self._entries.get(entry_id)

    def reserve(self, wanted: Sequence[Wanted], state: EntryState) -> list[Entry] | None:
        """New entries, each with one pin, evicting others if need be; None, and nothing evicted: no room for all."""
        needs = Counter(
            SlotClass(slot_stride(want.part_bytes), rank) for want in wanted for rank in range(want.num_ranks)
        )
        if not (self._make_room(needs) and self._slots.prepare(needs)):
            return None
        entries: list[Entry] = []
        for want in wanted:
            entry = Entry(want, self._take(want), state)
            self._admit(entry)
            entries.append(entry)
        return entries

    def commit(self, entry: Entry) -> None:
        """The entry's bytes are complete. Takes back the pin of `reserve`."""
        assert entry.state is not EntryState.COMMITTED, "an entry is committed once"
        for slot in entry.slots:
            self._arena.set_state(slot, COMMITTED)
        entry.state = EntryState.COMMITTED
        self._evictor.unpin(entry.id)

    def withdraw(self, entry: Entry) -> None:
        """The entry is gone, but someone may still write to its slots: they stay unused until `reclaim`.

        A writer that has not begun sees by the header that it must not.
        """
        self._forget(entry)
        self._withdrawn.update(entry.slots)

    def reclaim(self) -> None:
        """Use withdrawn slots again that nobody writes to any more."""
        ended = [slot for slot in self._withdrawn if not self._arena.is_written(slot)]
        self._withdrawn.difference_update(ended)
        for slot in ended:
            self._slots.give_back(slot)

    @property
    def num_withdrawn(self) -> int:
        return len(self._withdrawn)

    def drop(self, entry: Entry) -> None:
        """The entry is gone and nobody writes to its slots."""
        self._forget(entry)
        for slot in entry.slots:
            self._slots.give_back(slot)

    def touch(self, entry: Entry) -> None:
        """The entry was used."""
        self._evictor.touch(entry.id)

    def pin(self, entry: Entry) -> None:
        """Keep the entry until as many `unpin`."""
        self._evictor.pin(entry.id)

    def unpin(self, entry: Entry) -> None:
        """Take one pin back, unless the entry was dropped under it."""
        if self._entries.get(entry.id) is entry:
            self._evictor.unpin(entry.id)

    def counts(self) -> dict[str, int]:
        """Gauges for `BlockStore.stats`."""
        states = Counter(entry.state for entry in self)
        return {
            **{f"entries_{state.value}": states[state] for state in EntryState},
            "entries_bytes": sum(entry.num_bytes for entry in self),
            "evicted_entries": self.num_evicted,
            "slots_used": sum(len(entry.slots) for entry in self),
            "slots_withdrawn": len(self._withdrawn),
            **self._slots.counts(),
        }

    def check(self, pins: Counter[EntryId]) -> None:
        """InvariantError: entries, slots, headers and evictor disagree, or pins are not these."""
        for entry_id, entry in self._entries.items():
            if entry.id != entry_id:
                raise InvariantError(f"the entry under {entry_id} says it is {entry.id}")
            self._check_headers(entry)
        for slot in self._withdrawn:
            header = self._arena.read_header(slot)
            if header is None or header.state != FREE or header.generation:
                raise InvariantError(f"the header of withdrawn {slot} still lets writers begin")
        self._slots.check([slot for entry in self for slot in entry.slots] + list(self._withdrawn))
        self._evictor.check(pins, ((entry.id, (entry.wanted.parent, entry.id[1])) for entry in self))

    def close(self) -> None:
        """Reserve nothing any more."""
        self._slots.close()

    def _make_room(self, needs: Counter[SlotClass]) -> bool:
        """Short slabs leave more over than the usual ones, but are better than evicting, or than no room at all."""
        if self._slots.room(needs).enough() or self._slots.room(needs, tight=True).enough():
            return True
        for tight in (False, True):
            room = self._slots.room(needs, tight=tight)

            def enough(victim: EntryId, room: Room = room) -> bool:
                room.give(self._entries[victim].slots)
                return room.enough()

            victims = self._evictor.evict(enough)
            if victims is not None:
                for victim in victims:
                    for slot in self._entries.pop(victim).slots:
                        self._arena.set_state(slot, FREE)
                        self._slots.give_back(slot)
                self.num_evicted += len(victims)
                return True
        return False

    def _admit(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        self._evictor.add(entry.id, (entry.wanted.parent, entry.id[1]))

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.id]
        self._evictor.remove(entry.id)
        for slot in entry.slots:
            self._arena.set_state(slot, FREE)

    def _take(self, want: Wanted) -> tuple[Slot, ...]:
        slots: list[Slot] = []
        for rank in range(want.num_ranks):
            slot = self._slots.take(want.part_bytes, rank)
            assert slot is not None, "slots were prepared"
            self._arena.write_header(slot, _header_of(want, rank, slot, RESERVED))
            slots.append(slot)
        return tuple(slots)

    def _check_headers(self, entry: Entry) -> None:
        state = COMMITTED if entry.state is EntryState.COMMITTED else RESERVED
        for rank, slot in enumerate(entry.slots):
            expected = _header_of(entry.wanted, rank, slot, state)
            if (header := self._arena.read_header(slot)) != expected:
                raise InvariantError(f"the header of {slot} is {header}, the index says {expected}")


def _header_of(want: Wanted, rank: int, slot: Slot, state: int) -> SlotHeader:
    key, group = want.id
    return SlotHeader(
        slot.generation, state, slot.num_bytes, group, rank, want.num_ranks, _NO_CHECKSUM, key, want.parent
    )
