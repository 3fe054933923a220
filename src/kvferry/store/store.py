"""The store in process: content-addressed chunks in an arena, with tiers below it.

One lock guards everything. Entries live in `index.Index`; this module knows jobs, leases, owners and tiers, and no
engine, request or tensor.

A slot that someone may still copy to or from is never used again under them:

===================================  ======================================================================
a store's lease lapses, its owner    its slots are withdrawn and lose their generation, so that no copy is begun
is released, or it is cancelled      any more; they are used again once nobody has a lock on them
                                     (`Arena.begin_writing`), which is at once if none had begun
a load's lease lapses, or the like   the same, if its copies have begun (`Arena.begin_reading`); a reader that
                                     begins later, while the entry lasts, keeps all writers from its slots
a load's wait for a tier ends        the entry stays PROMOTING until the tier's thread has returned
===================================  ======================================================================
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from kvferry.blocks import Geometry, GroupKind, Job, JobKind, Tier
from kvferry.config import StoreOptions
from kvferry.errors import ConfigError
from kvferry.hit import longest_hit, needed_units
from kvferry.observability.metrics import Meter
from kvferry.store.arena import Arena
from kvferry.store.base import ArenaInfo, Match, PollResult
from kvferry.store.index import Entry, EntryId, EntryState, Index, Wanted
from kvferry.store.keys import geometry_tag, salt_tag
from kvferry.store.leases import Lease, LeaseTable
from kvferry.store.registry import Registry
from kvferry.store.stack import TierStack
from kvferry.store.tier import ByteTier

logger = logging.getLogger(__name__)

LEASE_SECONDS: Final = 600.0
"""Longer than any pass, also of a slow machine: slots for what a pass saves are leased before it. Owners that die are
noticed otherwise, and sooner."""
WRITING_SHARE: Final = 4
"""At most one part in this many of the arena waits to be written to a tier: it cannot be evicted meanwhile."""
_LARGE_PASS_TOKENS: Final = 8_192
"""What such a pass saves should find memory that is there already."""
_RECLAIM_SECONDS: Final = 0.1
"""How often it is asked whether withdrawn slots are still being written to."""


class Store:
    """A `BlockStore` in this process. Thread-safe.

    tiers: below memory, nearest first; the store owns them. lease_seconds: how long a job may take. clock: seconds,
    monotonic. adopt: for a server, whose arena has a fixed name in its folder and outlives it if it is killed: what the
    last one had committed is here again. quotas: by cache salt, the most bytes that its entries may have in memory.
    ArenaError: shared memory cannot be made, or another server has it.
    """

    def __init__(
        self,
        options: StoreOptions,
        *,
        tiers: Sequence[ByteTier] = (),
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        adopt: bool = False,
        quotas: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._options = options
        self._clock = clock
        self._arena = Arena.create(int(options.l1_size_gb * 1e9), options.arena_dir, adopt=adopt)
        self._tiers = TierStack(tiers, self._arena.info.num_bytes // WRITING_SHARE)
        self._index = Index(
            self._arena,
            options.eviction_policy,
            clock=clock,
            quotas={salt_tag(salt): num_bytes for salt, num_bytes in quotas.items()},
            adopt=adopt,
        )
        if len(self._index):
            logger.info("%d parts of an earlier server are kept in %s", len(self._index), self._arena.info.path)
        self._registry = Registry(self._arena)
        self._lease_seconds = lease_seconds
        self._leases = self._no_leases()
        self._reclaim_at = 0.0
        self._writing: Counter[EntryId] = Counter()
        self._meter = Meter()
        self._lock = threading.RLock()
        self._answered = threading.Condition(self._lock)
        self._closed = False

    def register(self, engine: str, rank: int, geometry: Geometry) -> None:
        """See `BlockStore.register`."""
        with self._lock:
            if self._closed:
                raise ConfigError(f"engine {engine} registers with a store that is closed")
            self._registry.register(engine, rank, geometry)
            self._prune()
            self._index.expect(-(-_LARGE_PASS_TOKENS // geometry.chunk_tokens) * geometry.chunk_bytes)

    def unregister(self, engine: str) -> None:
        """The engine is gone; one of the same name may declare another geometry. What it stored stays."""
        with self._lock:
            self._registry.unregister(engine)
            self._prune()

    def geometry(self, engine: str) -> Geometry | None:
        """See `BlockStore.geometry`."""
        with self._lock:
            return self._registry.geometry(engine)

    def arena(self) -> ArenaInfo:
        """See `BlockStore.arena`."""
        return self._arena.info

    @property
    def mapping(self) -> Arena:
        """This process's own mapping of the arena, whose pages are in place already. Copies must end before `close`."""
        return self._arena

    def match(self, geometry: Geometry, keys: Sequence[bytes]) -> Match:
        """See `BlockStore.match`."""
        with self._lock:
            self._expire()
            farthest = self._farthest(geometry, keys)
            for tier in set(farthest):
                self._meter.add(f"matched_chunks_{tier.name.lower()}", farthest.count(tier))
            self._meter.add("unmatched_chunks", len(keys) - len(farthest))
            return Match(len(farthest), tuple(farthest))

    def locate(self, geometry: Geometry, keys: Sequence[bytes]) -> Sequence[Tier | None]:
        """See `BlockStore.locate`."""
        with self._lock:
            if self._closed or self._registry.root(geometry) is None:
                return [None] * len(keys)
            of_groups = [
                self._locate(keys, group, geometry.num_parts(group))
                for group, spec in enumerate(geometry.groups)
                if spec.kind is GroupKind.FULL
            ]
            return [_farthest(tiers) for tiers in zip(*of_groups, strict=True)] or [None] * len(keys)

    def begin_load(
        self,
        geometry: Geometry,
        keys: Sequence[bytes],
        first_chunk: int,
        *,
        salt: str | None = None,
        owner: str = "local",
    ) -> Job | None:
        """See `BlockStore.begin_load`."""
        with self._lock:
            self._expire()
            wanted = self._wanted(geometry, keys, first_chunk, salt)
            if self._closed or not wanted:
                return None
            entries = [self._index.get(want.id) for _, want in wanted]
            missing = [want for (_, want), entry in zip(wanted, entries, strict=True) if entry is None]
            if any(entry is not None and entry.place is None for entry in entries):
                return None
            sources = [self._tiers.source(want.id, want.num_parts) for want in missing]
            if any(source is None for source in sources):
                return None
            present = [entry for entry in entries if entry is not None]
            self._index.use(present)
            self._tiers.touch(present)
            promoted = self._index.reserve(missing, EntryState.PROMOTING) if missing else []
            if promoted is None:
                self._unpin(present)
                self._meter.add("loads_without_room")
                return None
            for entry in promoted:
                self._index.pin(entry)
            by_id = {entry.id: entry for entry in (*present, *promoted)}
            leased = [(chunk, by_id[want.id]) for chunk, want in wanted]
            lease = self._leases.open(JobKind.LOAD, leased, geometry.num_ranks, owner, self._clock())
            # Deepest first: a backend that evicts by last use then loses children before parents.
            for entry, source in reversed([*zip(promoted, sources, strict=True)]):
                assert source is not None, "sources were looked for"
                self._promote(entry, source, self._options.load_deadline_seconds)
            return lease.job

    def begin_store(
        self,
        geometry: Geometry,
        keys: Sequence[bytes],
        first_chunk: int,
        *,
        salt: str | None = None,
        owner: str = "local",
    ) -> Job | None:
        """See `BlockStore.begin_store`. A full-attention part without its parent is not stored: no hit finds it."""
        with self._lock:
            self._expire()
            if self._closed:
                return None
            wanted = self._wanted(geometry, keys, first_chunk, salt)
            missing = [(chunk, want) for chunk, want in wanted if self._index.get(want.id) is None]
            if any(chunk == first_chunk and self._is_orphan(geometry, chunk, want) for chunk, want in missing):
                self._meter.add("orphaned_stores")
                return None
            kept = [entry for _, want in wanted if (entry := self._index.get(want.id))]
            if first_chunk > 0:
                parents = ((keys[first_chunk - 1], group) for group in range(len(geometry.groups)))
                kept += [entry for parent in parents if (entry := self._index.get(parent))]
            self._index.use(kept)
            reserved = self._reserve(missing)
            self._unpin(kept)
            if not reserved:
                return None
            return self._leases.open(JobKind.STORE, reserved, geometry.num_ranks, owner, self._clock()).job

    def done(self, job_id: int, rank: int, ok: bool) -> None:
        """See `BlockStore.done`."""
        with self._lock:
            self._expire()
            lease = self._leases.find(job_id)
            if lease is None or rank not in lease.ranks or (ok and lease.awaited):
                self._meter.add("unknown_jobs")
                return
            lease.ranks.discard(rank)
            lease.ok &= ok
            if lease.ranks:
                return
            self._leases.end(lease)
            if lease.job.kind is JobKind.LOAD:
                self._meter.add("loaded_bytes" if lease.ok else "failed_loads", lease.num_bytes if lease.ok else 1)
                self._unpin(lease.entries)
            elif lease.ok:
                self._commit(lease)
            else:
                self._meter.add("failed_stores")
                self._withdraw(lease.entries)

    def cancel(self, job_id: int) -> None:
        """See `BlockStore.cancel`. Promotions that are under way go on and are committed."""
        with self._lock:
            lease = self._leases.find(job_id)
            if lease is None:
                self._meter.add("unknown_jobs")
            else:
                self._take_back(lease, was_told=False)

    def release(self, owner: str) -> None:
        """Return all that `owner` leased, and forget what it was to be told. Its ranks may still be copying."""
        with self._lock:
            for lease in self._leases:
                if lease.owner == owner:
                    self._take_back(lease)
            self._leases.forget(owner)

    def poll(self, timeout_seconds: float = 0.0, *, owner: str = "local") -> PollResult:
        """See `BlockStore.poll`: of this owner's loads. One that its tiers have not answered within
        `load_deadline_seconds` has failed."""
        with self._lock:
            self._expire()
            ready_by = self._leases.next_ready_by(owner)
            if ready_by is not None and timeout_seconds > 0 and not self._leases.has_answers(owner):
                timeout_seconds = min(timeout_seconds, max(ready_by - self._clock(), 0.0))
                self._answered.wait_for(lambda: self._leases.has_answers(owner) or self._closed, timeout_seconds)
                self._expire()
            return self._leases.take_answers(owner)

    def stats(self) -> Mapping[str, float]:
        """See `BlockStore.stats`."""
        with self._lock:
            values: dict[str, float] = {**self._meter.snapshot(), "arena_bytes": self._arena.info.num_bytes}
            values["leases"] = len(self._leases)
            values["parts_being_written_through"] = self._writing.total()
            return {**values, **self._registry.counts(), **self._index.counts(), **self._tiers.stats()}

    def check(self) -> None:
        """See `BlockStore.check`."""
        with self._lock:
            if self._closed:
                return
            filling = Counter(entry.id for entry in self._index if entry.state is EntryState.PROMOTING)
            self._index.check(self._writing + filling + self._leases.pins())

    def close(self, *, keep_arena: bool = False) -> None:
        """See `BlockStore.close`. Copies of this store's arena must have ended. keep_arena: for the next server."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._answered.notify_all()
        self._tiers.close(self._options.close_deadline_seconds)
        with self._lock:
            self._index.close()
            self._leases = self._no_leases()
            self._reclaim_at = math.inf
            self._arena.close(keep=keep_arena)

    def _prune(self) -> None:
        self._registry.prune(geometry for geometry, _ in self._index.tallies())

    def _wanted(
        self, geometry: Geometry, keys: Sequence[bytes], first_chunk: int, salt: str | None
    ) -> list[tuple[int, Wanted]]:
        """What an engine needs after the last of `keys`, by chunk and then group."""
        root = self._registry.root(geometry)
        if root is None:
            return []
        tags = geometry_tag(root), salt_tag(salt)
        wanted = []
        for group, spec in enumerate(geometry.groups):
            for chunk in needed_units(spec, geometry.chunk_tokens, first_chunk, len(keys)):
                parent = keys[chunk - 1] if chunk else root
                num_parts = geometry.num_parts(group)
                wanted.append((chunk, Wanted((keys[chunk], group), parent, spec.part_bytes, num_parts, *tags)))
        wanted.sort(key=lambda item: (item[0], item[1].id[1]))
        return wanted

    def _farthest(self, geometry: Geometry, keys: Sequence[bytes]) -> list[Tier]:
        """Of each chunk of the longest loadable prefix, the farthest tier that it needs."""
        if self._closed or self._registry.root(geometry) is None:
            return []
        tiers = [self._locate(keys, group, geometry.num_parts(group)) for group in range(len(geometry.groups))]
        present = [[tier is not None for tier in of] for of in tiers]
        num_chunks = longest_hit(geometry.groups, geometry.chunk_tokens, present)
        farthest = [Tier.MEMORY] * num_chunks
        for group, of in zip(geometry.groups, tiers, strict=True):
            if of[:num_chunks] == farthest:
                continue
            for chunk in needed_units(group, geometry.chunk_tokens, 0, num_chunks):
                tier = of[chunk]
                assert tier is not None, "a hit has all that its groups need"
                farthest[chunk] = max(farthest[chunk], tier)
        return farthest

    def _locate(self, keys: Sequence[bytes], group: int, num_parts: int) -> list[Tier | None]:
        """The nearest place of this group of each chunk."""
        entries = self._index.find(keys, group)
        tiers = [
            None if entry is None else Tier.MEMORY if entry.state is EntryState.COMMITTED else entry.place
            for entry in entries
        ]
        if self._tiers:
            absent = [chunk for chunk, entry in enumerate(entries) if entry is None]
            below = self._tiers.locate([keys[chunk] for chunk in absent], group, num_parts)
            for chunk, tier in zip(absent, below, strict=True):
                tiers[chunk] = tier
        return tiers

    def _reserve(self, missing: Sequence[tuple[int, Wanted]]) -> list[tuple[int, Entry]]:
        """Entries to store to: all that are missing, or as many whole chunks from the first as there is room for."""
        entries = self._index.reserve([want for _, want in missing], EntryState.STORING) if missing else []
        if entries is not None:
            return [(chunk, entry) for (chunk, _), entry in zip(missing, entries, strict=True)]
        self._meter.add("stores_without_room")
        reserved: list[tuple[int, Entry]] = []
        for chunk, of_chunk in itertools.groupby(missing, key=lambda item: item[0]):
            entries = self._index.reserve([want for _, want in of_chunk], EntryState.STORING)
            if entries is None:
                break
            reserved += [(chunk, entry) for entry in entries]
        return reserved

    def _is_orphan(self, geometry: Geometry, chunk: int, want: Wanted) -> bool:
        if chunk == 0 or geometry.groups[want.id[1]].kind is not GroupKind.FULL:
            return False
        parent = (want.parent, want.id[1])
        return self._index.get(parent) is None and self._tiers.source(parent, want.num_parts) is None

    def _no_leases(self) -> LeaseTable:
        return LeaseTable(self._arena.info.boot_id, self._lease_seconds, self._options.load_deadline_seconds)

    def _promote(self, entry: Entry, source: ByteTier, seconds: float) -> None:
        entry.source = source.tier
        if any(map(self._arena.is_locked, entry.slots)):  # by a reader whose lease lapsed before it began
            entry.num_awaited = 1
            self._arrived(entry, ok=False)
            return
        entry.num_awaited = len(entry.slots)
        self._tiers.promote(entry, source, self._arena.view, self._arrived, seconds)

    def _arrived(self, entry: Entry, ok: bool) -> None:
        """A tier has finished with one part of an entry; called in its thread."""
        with self._lock:
            if self._closed:  # It answers after closing gave up on it.
                return
            entry.num_awaited -= 1
            entry.failed |= not ok
            entry.doubtful |= not ok
            waiting = self._leases.waiting_for(entry)
            if entry.failed:
                for lease in waiting:
                    self._fail(lease)
            if entry.num_awaited:
                return
            if entry.failed:
                self._withdraw([entry])
                return
            self._index.commit(entry)
            entry.doubtful = False
            self._meter.add("promoted_bytes", entry.num_bytes)
            for lease in waiting:
                lease.awaited.discard(entry)
                if not lease.awaited:
                    self._leases.answer(lease, ok=True)
                    self._answered.notify_all()

    def _fail(self, lease: Lease) -> None:
        """A load whose tiers did not deliver is over."""
        self._leases.end(lease)
        self._leases.answer(lease, ok=False)
        self._unpin(lease.entries)
        self._meter.add("failed_promotions")
        self._answered.notify_all()

    def _expire(self) -> None:
        """End waits, leases and promises to keep whose time is up."""
        now = self._clock()
        for lease in self._leases.overdue(now):
            for entry in lease.awaited:
                if not entry.doubtful:
                    entry.doubtful = True
                    self._tiers.overdue(entry)
            self._fail(lease)
        for lease in self._leases.expired(now):
            self._meter.add("lapsed_leases")
            if lease.awaited:
                self._fail(lease)
            else:
                self._take_back(lease)
        if now >= self._index.next_release:
            self._index.release_kept()
        if self._index.has_withdrawn and now >= self._reclaim_at:
            self._reclaim(now)

    def _reclaim(self, now: float) -> None:
        self._index.reclaim()
        self._reclaim_at = now + _RECLAIM_SECONDS

    def _commit(self, lease: Lease) -> None:
        self._meter.add("stored_bytes", lease.num_bytes)
        for entry in lease.entries:
            self._index.commit(entry)
        for entry in reversed(lease.entries):
            self._tiers.write(entry, self._arena.view, self._writing_begins, self._written)

    def _writing_begins(self, entry: Entry) -> None:
        self._index.pin(entry)
        self._writing[entry.id] += 1

    def _written(self, entry: Entry, ok: bool) -> None:
        """A tier needs one part of an entry no more; called in its thread."""
        with self._lock:
            if self._closed:
                return
            self._index.unpin(entry)
            self._writing[entry.id] -= 1
            if not self._writing[entry.id]:
                del self._writing[entry.id]

    def _unpin(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._index.unpin(entry)

    def _take_back(self, lease: Lease, *, was_told: bool = True) -> None:
        """End a job that will not be done. If its ranks were told of it, they may still copy to or from its slots; if
        not, who reads these does so for another."""
        self._leases.end(lease)
        entries = lease.entries
        if lease.job.kind is JobKind.LOAD:
            self._unpin(lease.entries)
            entries = [entry for entry in entries if was_told and any(map(self._arena.is_locked, entry.slots))]
        self._withdraw(entries)

    def _withdraw(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self._index.withdraw(entry)
        self._reclaim(self._clock())


def _farthest(tiers: Iterable[Tier | None]) -> Tier | None:
    """None: one is None."""
    known = [*tiers]
    present = [tier for tier in known if tier is not None]
    return max(present) if len(present) == len(known) else None
