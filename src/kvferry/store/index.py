"""What lies in the arena: entries by (key, group), with their slots, headers, pins and turn to leave.

Knows no lease, job, owner or tier: `store.Store` decides, this keeps index, slots, headers and evictor in step.
Callers serialise.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from kvferry.blocks import Slot, Tier
from kvferry.errors import InvariantError
from kvferry.store.arena import COMMITTED, FREE, NO_CHECKSUM, RESERVED, Arena, SlotHeader, slot_stride
from kvferry.store.base import Selection, Tally
from kvferry.store.eviction import Evictor, make_policy
from kvferry.store.recovery import Found, recover
from kvferry.store.slots import Room, SlotAllocator, SlotClass

EntryId = tuple[bytes, int]
"""Key and group."""

_KEPT_SHARE: Final = 2
"""At most one part in this many of the arena is kept from eviction by command."""


class EntryState(enum.Enum):
    """Who may touch an entry's bytes."""

    STORING = "storing"
    """An engine's ranks fill it; nobody else may know of it."""
    PROMOTING = "promoting"
    """Tiers fill it; jobs may wait for it."""
    COMMITTED = "committed"
    """Complete and immutable."""


class Wanted(NamedTuple):
    """An entry to make room for: `num_parts` slots of `part_bytes`. `parent` is the key of the chunk before.

    geometry_tag, salt_tag: what it is stored under, for those who list, limit or clear what is kept.
    """

    id: EntryId
    parent: bytes
    part_bytes: int
    num_parts: int
    geometry_tag: bytes
    salt_tag: bytes

    @property
    def num_bytes(self) -> int:
        return self.part_bytes * self.num_parts


@dataclass(slots=True, eq=False)
class Entry:
    """One group of one chunk in the arena, one slot per rank.

    used_at: when it was last used, by the store's clock. source: the tier that it is promoted from. num_awaited: parts
    that tiers still fill. doubtful: a part failed or is overdue, so nobody new may wait for it. failed: a part failed,
    so the entry goes once no tier writes to it any more.
    """

    wanted: Wanted
    slots: tuple[Slot, ...]
    state: EntryState
    used_at: float
    source: Tier = Tier.MEMORY
    num_awaited: int = 0
    doubtful: bool = False
    failed: bool = False

    @property
    def id(self) -> EntryId:
        return self.wanted.id

    @property
    def num_bytes(self) -> int:
        return self.wanted.num_bytes

    @property
    def place(self) -> Tier | None:
        """Where a load finds the entry: what is on its way counts as where it comes from, as it may yet fail. None: it
        cannot be loaded now."""
        if self.state is EntryState.COMMITTED:
            return Tier.MEMORY
        return self.source if self.state is EntryState.PROMOTING and not self.doubtful else None


class Index:
    """The entries of one arena.

    clock: seconds, monotonic. quotas: most bytes of entries of a salt, by its tag. adopt: also the entries that an
    earlier owner of the arena left whole, as far as quotas allow.
    """

    def __init__(
        self,
        arena: Arena,
        policy: Literal["lru", "s3fifo"],
        *,
        clock: Callable[[], float],
        quotas: Mapping[bytes, int],
        adopt: bool = False,
    ) -> None:
        self._arena = arena
        self._clock = clock
        self._quotas = quotas
        found = recover(arena) if adopt else Found()
        self._slots = SlotAllocator(arena, found.slabs, found.unusable)
        self._evictor: Evictor[EntryId] = Evictor(make_policy(policy), quotas)
        self._entries: dict[EntryId, Entry] = {}
        self._withdrawn = set(found.withdrawn)
        self._kept: dict[EntryId, float] = {}
        """Entries that are not to be evicted, and until when."""
        self._kept_bytes = 0
        self.next_release = math.inf
        """When the first of them may be evicted again."""
        self._tallies: dict[tuple[bytes, bytes], Tally] = {}
        """What there is of each geometry and salt, by their tags."""
        self._salt_bytes = dict.fromkeys(quotas, 0)
        self._meter: Counter[str] = Counter(evicted_entries=0, reserves_over_quota=0)
        for parts in found.entries:
            header = parts[0][0]
            entry_id = (header.key, header.group)
            tags = (header.geometry_tag, header.salt_tag)
            want = Wanted(entry_id, header.parent, header.num_bytes, header.num_parts, *tags)
            self._admit(Entry(want, tuple(slot for _, slot in parts), EntryState.COMMITTED, clock()))
            self._evictor.unpin(want.id)
        for salt, quota in quotas.items():
            self._choose(Room(self._slots, {}), salt, self._salt_bytes[salt] - quota, tight=True)
            self._evict()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, entry_id: EntryId) -> Entry | None:
        """The entry in whatever state, or None."""
        return self._entries.get(entry_id)

    def find(self, keys: Sequence[bytes], group: int) -> list[Entry | None]:
        """The entries of one group of chunks, in whatever state."""
        get = self._entries.get
        return [get((key, group)) for key in keys]

    def reserve(self, wanted: Sequence[Wanted], state: EntryState) -> list[Entry] | None:
        """New entries of one salt, each with one pin. Evicts others if need be: of that salt, where it would exceed its
        quota. None, and nothing evicted: no room for all."""
        needs = Counter(
            SlotClass(slot_stride(want.part_bytes), rank) for want in wanted for rank in range(want.num_parts)
        )
        salt = wanted[0].salt_tag
        quota = self._quotas.get(salt)
        excess = 0 if quota is None else self._salt_bytes[salt] + sum(want.num_bytes for want in wanted) - quota
        if not (self._make_room(needs, salt, excess) and self._slots.prepare(needs)):
            return None
        entries = [Entry(want, self._take(want), state, self._clock()) for want in wanted]
        for entry in entries:
            self._admit(entry)
        return entries

    def expect(self, num_bytes: int) -> None:
        """So much may be reserved at once: have memory for it ready as soon as can be."""
        self._slots.keep_ahead(num_bytes)

    def commit(self, entry: Entry) -> None:
        """The entry's bytes are complete. Takes back the pin of `reserve`."""
        assert entry.state is not EntryState.COMMITTED, "an entry is committed once"
        for slot in entry.slots:
            self._arena.set_state(slot, COMMITTED)
        entry.state = EntryState.COMMITTED
        self._evictor.unpin(entry.id)

    def withdraw(self, entry: Entry) -> None:
        """The entry is gone, but someone may still copy to or from its slots: they stay unused until `reclaim`.

        Who has not begun sees by the header that it must not.
        """
        self._forget(entry)
        self._withdrawn.update(entry.slots)

    def reclaim(self) -> None:
        """Use withdrawn slots again that nobody copies to or from any more."""
        ended = [slot for slot in self._withdrawn if not self._arena.is_locked(slot)]
        self._withdrawn.difference_update(ended)
        for slot in ended:
            self._slots.give_back(slot)

    @property
    def has_withdrawn(self) -> bool:
        """Whether `reclaim` has anything to do."""
        return bool(self._withdrawn)

    def drop(self, entry: Entry) -> None:
        """The entry is gone and nobody writes to its slots."""
        self._forget(entry)
        for slot in entry.slots:
            self._slots.give_back(slot)

    def use(self, entries: Iterable[Entry]) -> None:
        """The entries were used. Keep each until as many `unpin`."""
        now = self._clock()
        for entry in entries:
            entry.used_at = now
            self._evictor.pin(entry.id)
            self._evictor.touch(entry.id)

    def pin(self, entry: Entry) -> None:
        """Keep the entry until as many `unpin`."""
        self._evictor.pin(entry.id)

    def unpin(self, entry: Entry) -> None:
        """Take one pin back, unless the entry was dropped under it."""
        if self._entries.get(entry.id) is entry:
            self._evictor.unpin(entry.id)

    def is_pinned(self, entry: Entry) -> bool:
        """Whether somebody needs the entry, or it is kept."""
        return self._evictor.is_pinned(entry.id)

    def select(self, selection: Selection) -> list[Entry]:
        """The committed entries that are meant, those that came first first."""
        latest = math.inf if selection.unused_seconds is None else self._clock() - selection.unused_seconds
        return [
            entry
            for entry in self
            if entry.state is EntryState.COMMITTED
            and entry.used_at <= latest
            and (selection.geometry_tags is None or entry.wanted.geometry_tag in selection.geometry_tags)
            and (selection.salt_tag is None or entry.wanted.salt_tag == selection.salt_tag)
            and (selection.keys is None or entry.id[0] in selection.keys)
        ]

    def keep(self, entries: Iterable[Entry], seconds: float) -> list[Entry]:
        """Do not evict these entries, nor what they follow, for so long from now. Returns those kept: the first, up to
        a half of the arena."""
        until = self._clock() + seconds
        most_bytes = self._arena.info.num_bytes // _KEPT_SHARE
        done: list[Entry] = []
        for entry in entries:
            chain = [entry]
            while (parent := self._entries.get((chain[-1].wanted.parent, entry.id[1]))) is not None:
                if parent.state is not EntryState.COMMITTED or self._kept.get(parent.id) == until:
                    break
                chain.append(parent)
            added = [link for link in chain if link.id not in self._kept]
            added_bytes = sum(link.num_bytes for link in added)
            if self._kept_bytes + added_bytes > most_bytes:
                break
            for link in added:
                self.pin(link)
            self._kept_bytes += added_bytes
            self._kept.update((link.id, until) for link in chain)
            self.next_release = min(self.next_release, until)
            done.append(entry)
        return done

    def release_kept(self, entries: Iterable[Entry] | None = None) -> list[Entry]:
        """Let these entries be evicted again, or those whose time is up. Returns which."""
        if entries is None:
            now = self._clock()
            entries = [self._entries[kept] for kept, until in self._kept.items() if until <= now]
        done = [entry for entry in entries if self._kept.pop(entry.id, None) is not None]
        for entry in done:
            self._kept_bytes -= entry.num_bytes
            self.unpin(entry)
        self.next_release = min(self._kept.values(), default=math.inf)
        return done

    def tallies(self) -> Mapping[tuple[bytes, bytes], Tally]:
        """What there is, by the tags of geometry and salt."""
        return self._tallies

    def counts(self) -> dict[str, int]:
        """Gauges for `BlockStore.stats`."""
        states = [entry.state for entry in self]
        return {
            **{f"entries_{state.value}": states.count(state) for state in EntryState},
            "entries_bytes": sum(tally.num_bytes for tally in self._tallies.values()),
            "entries_kept": len(self._kept),
            **self._meter,
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
        tallies: dict[tuple[bytes, bytes], Tally] = {}
        for entry in self:
            _add(tallies, entry, 1)
        if tallies != self._tallies or self._kept_bytes != sum(self._entries[kept].num_bytes for kept in self._kept):
            raise InvariantError("bytes of a geometry, of a salt or of what is kept are miscounted")
        self._evictor.check(
            pins + Counter(self._kept.keys()), ((entry.id, (entry.wanted.parent, entry.id[1])) for entry in self)
        )

    def close(self) -> None:
        """Reserve nothing any more."""
        self._slots.close()

    def _make_room(self, needs: Mapping[SlotClass, int], salt: bytes, excess: int) -> bool:
        """Short slabs leave more over than the usual ones, but are better than evicting, or than no room at all."""
        room = Room(self._slots, needs)
        if excess <= 0 and (room.enough(tight=False) or room.enough(tight=True)):
            return True
        for tight in (False, True):
            if self._choose(room, salt, excess, tight=tight):
                self._evict()
                return True
            self._evictor.spare()
            room = Room(self._slots, needs)
        self._meter["reserves_over_quota"] += excess > 0
        return False

    def _choose(self, room: Room, salt: bytes, excess: int, *, tight: bool) -> bool:
        """Choose whom to evict: first bytes of this salt that exceed its quota, then whoever is next."""
        while excess > 0 or not room.enough(tight=tight):
            victim = self._evictor.choose(salt if excess > 0 else None)
            if victim is None:
                return False
            entry = self._entries[victim]
            excess -= entry.num_bytes
            room.give(entry.slots)
        return True

    def _evict(self) -> None:
        for victim in self._evictor.evict():
            self._meter["evicted_entries"] += 1
            entry = self._entries[victim]
            self._remove(entry)
            for slot in entry.slots:
                self._slots.give_back(slot)

    def _admit(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        self._evictor.add(entry.id, (entry.wanted.parent, entry.id[1]), entry.wanted.salt_tag)
        self._count(entry, 1)

    def _count(self, entry: Entry, sign: int) -> None:
        _add(self._tallies, entry, sign)
        if entry.wanted.salt_tag in self._salt_bytes:
            self._salt_bytes[entry.wanted.salt_tag] += sign * entry.num_bytes

    def _forget(self, entry: Entry) -> None:
        self._evictor.remove(entry.id)
        self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.id]
        self._count(entry, -1)
        for slot in entry.slots:
            self._arena.set_state(slot, FREE)

    def _take(self, want: Wanted) -> tuple[Slot, ...]:
        slots: list[Slot] = []
        for rank in range(want.num_parts):
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
        slot.generation,
        state,
        slot.num_bytes,
        group,
        rank,
        want.num_parts,
        NO_CHECKSUM,
        key,
        want.parent,
        want.geometry_tag,
        want.salt_tag,
    )


def _add(tallies: dict[tuple[bytes, bytes], Tally], entry: Entry, sign: int) -> None:
    tags = (entry.wanted.geometry_tag, entry.wanted.salt_tag)
    known = tallies.get(tags, Tally())
    tallies[tags] = Tally(known.num_entries + sign, known.num_bytes + sign * entry.num_bytes)
    if not tallies[tags].num_entries:
        del tallies[tags]
