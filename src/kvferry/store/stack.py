"""The tiers below memory, nearest first, asked for whole entries. Knows names and ranks; no job and no slot's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from kvferry.blocks import Slot, Tier
from kvferry.store.base import PartName
from kvferry.store.index import Entry, EntryId
from kvferry.store.keys import part_name
from kvferry.store.tier import ByteTier

ViewOf = Callable[[Slot], memoryview]


class TierStack:
    """Some tiers, or none. An entry is in a tier if the parts of all its ranks are.

    max_queued_bytes: how much of memory may wait to be written to each.
    """

    def __init__(self, tiers: Sequence[ByteTier], max_queued_bytes: int) -> None:
        self._tiers = tuple(tiers)
        for tier in self._tiers:
            tier.max_queued_bytes = max_queued_bytes

    def __bool__(self) -> bool:
        return bool(self._tiers)

    def locate(self, keys: Sequence[bytes], group: int, num_parts: int) -> list[Tier | None]:
        """The nearest tier that holds this group of each chunk. One question a tier, however many chunks."""
        found: list[Tier | None] = [None] * len(keys)
        if not keys:
            return found
        names = [part_name(key, group, rank) for key in keys for rank in range(num_parts)]
        for tier in reversed(self._tiers):
            held = tier.contains(names)
            for chunk in range(len(keys)):
                if all(held[chunk * num_parts : (chunk + 1) * num_parts]):
                    found[chunk] = tier.tier
        return found

    def source(self, entry_id: EntryId, num_parts: int) -> ByteTier | None:
        """The nearest tier that holds the entry."""
        names = _names(entry_id, num_parts)
        return next((tier for tier in self._tiers if all(tier.contains(names))), None)

    def promote(
        self, entry: Entry, source: ByteTier, view_of: ViewOf, arrived: Callable[[Entry, bool], None], seconds: float
    ) -> None:
        """Have `source` fill the entry's slots within `seconds`; `arrived` is told of each part."""
        for name, slot in zip(_names(entry.id, len(entry.slots)), entry.slots, strict=True):
            source.get(name, view_of(slot), partial(arrived, entry), timeout_seconds=seconds)

    def overdue(self, entry: Entry) -> None:
        """Nobody waits any longer for the tier that fills this entry."""
        for tier in self._tiers:
            if tier.tier is entry.source:
                tier.overdue(_names(entry.id, len(entry.slots)))

    def write(
        self, entry: Entry, view_of: ViewOf, begin: Callable[[Entry], None], ended: Callable[[Entry, bool], None]
    ) -> None:
        """Give each tier the parts that it lacks. `begin` is called before each, `ended` once it was written or not."""
        names = _names(entry.id, len(entry.slots))
        for tier in self._tiers:
            for name, slot, held in zip(names, entry.slots, tier.contains(names), strict=True):
                if held:
                    continue
                begin(entry)
                if not tier.put(name, view_of(slot), partial(ended, entry)):
                    ended(entry, False)

    def touch(self, entries: Iterable[Entry]) -> None:
        """These entries were used, from memory."""
        if self._tiers:
            names = [name for entry in entries for name in _names(entry.id, len(entry.slots))]
            for tier in self._tiers:
                tier.touch(names)

    def delete(self, entries: Iterable[Entry]) -> None:
        """Forget what tiers hold of these entries, at once; it is deleted soon."""
        names = [name for entry in entries for name in _names(entry.id, len(entry.slots))]
        for tier in self._tiers:
            tier.delete(names)

    def stats(self) -> Mapping[str, float]:
        return {name: value for tier in self._tiers for name, value in tier.stats().items()}

    def close(self, deadline_seconds: float) -> None:
        for tier in self._tiers:
            tier.close(deadline_seconds)


def _names(entry_id: EntryId, num_parts: int) -> list[PartName]:
    return [part_name(*entry_id, rank) for rank in range(num_parts)]
