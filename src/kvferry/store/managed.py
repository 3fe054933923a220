"""What those who run a store may ask of it: what is there, and to clear, keep or fetch some of it. Knows no job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvferry.blocks import Geometry
from kvferry.store.base import Prefetch, Selection, Tally, Usage
from kvferry.store.index import Entry, EntryState
from kvferry.store.store import Store

_MOST_UNDER_WAY: Final = 16
"""Entries of a prompt that are fetched at a time."""


class ManagedStore(Store):
    """A `Store` that takes commands beside its engines' questions. Thread-safe."""

    def prefetch(self, geometry: Geometry, keys: Sequence[bytes], *, salt: str | None = None) -> Prefetch:
        """Bring what lower tiers have of a prompt into memory, for nobody in particular.

        Each call puts a few parts under way, so that loads of engines need not wait behind them: call it again until
        none is. It ends short of all where there is no room or a tier fails.
        """
        with self._lock:
            self._expire()
            keys = keys[: len(self._farthest(geometry, keys))]
            wanted = [want for _, want in self._wanted(geometry, keys, 0, salt)]
            entries = [self._index.get(want.id) for want in wanted]
            num_under_way = sum(entry is not None and entry.state is EntryState.PROMOTING for entry in entries)
            for want, entry in zip(wanted, entries, strict=True):
                if entry is not None or num_under_way >= _MOST_UNDER_WAY:
                    continue
                source = self._tiers.source(want.id, want.num_parts)
                promoted = self._index.reserve([want], EntryState.PROMOTING) if source is not None else None
                if promoted is None or source is None:
                    break
                self._promote(promoted[0], source, self._lease_seconds)
                num_under_way += 1
            num_absent = sum(self._index.get(want.id) is None for want in wanted)
            return Prefetch(len(wanted), len(wanted) - num_absent - num_under_way, num_under_way)

    def usage(self) -> list[Usage]:
        """What is in memory, by geometry and salt; what is being stored counts. Lower tiers know names alone."""
        with self._lock:
            return [
                Usage(geometry, salt, self._registry.identity(geometry), tally.num_entries, tally.num_bytes)
                for (geometry, salt), tally in self._index.tallies().items()
            ]

    def clear(self, selection: Selection) -> Tally:
        """Drop entries, and delete from lower tiers what these hold of them. Those that are leased, kept, or being
        written below stay. What lies on lower tiers alone cannot be found by what it was stored under, and stays."""
        with self._lock:
            self._expire()
            entries = [entry for entry in self._index.select(selection) if not self._index.is_pinned(entry)]
            for entry in entries:
                self._index.drop(entry)
            self._tiers.delete(entries)
            return _tally(entries)

    def keep(self, selection: Selection, seconds: float) -> Tally:
        """Do not evict these entries, nor what they follow, for so long from now. A half of the arena may be kept: the
        answer says what is, and the rest is not. Nothing is kept over a restart."""
        with self._lock:
            self._expire()
            return _tally(self._index.keep(self._index.select(selection), seconds))

    def unkeep(self, selection: Selection) -> Tally:
        """Let entries be evicted again that were to be kept."""
        with self._lock:
            self._expire()
            return _tally(self._index.release_kept(self._index.select(selection)))


def _tally(entries: Sequence[Entry]) -> Tally:
    return Tally(len(entries), sum(entry.num_bytes for entry in entries))
