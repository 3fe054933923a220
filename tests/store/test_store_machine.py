"""A random life of a store beside a model: ranks that fail or never answer, owners that die, time that passes, a tiny
arena, a tier with faults. Whatever a load gives is what was once stored, and `check` holds after every step."""

from __future__ import annotations

import dataclasses
import errno
import shutil
import tempfile
import threading
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvferry.blocks import Geometry, GroupKind, Job, Slot, Tier
from kvferry.config import StoreOptions
from kvferry.store.arena import Arena, SlotLock
from kvferry.store.base import PartName, Selection, Tally
from kvferry.store.index import EntryId, EntryState
from kvferry.store.keys import salt_tag
from kvferry.store.managed import ManagedStore
from kvferry.store.tier import ByteTier
from kvferry.testing.block_store import (
    CHUNK_TOKENS,
    assert_copied,
    bytes_of,
    full_geometry,
    hybrid_geometry,
    keys_of,
    own_parts,
    register,
)
from kvferry.testing.byte_store import DictByteStore
from kvferry.testing.faults import FaultyByteStore

OWNERS = st.sampled_from(["one", "two"])
SALTS = st.sampled_from([None, "tenant"])
ARENA_BYTES = 230_000
QUOTA_BYTES = 70_000


@dataclasses.dataclass(eq=False)
class Work:
    """A job that a fake engine was given. ranks: those that have not said done. writing: those that have begun to copy
    and not ended. sound: every slot was filled."""

    job: Job
    keys: list[bytes]
    owner: str
    ranks: set[int]
    begun_at: float
    writing: dict[int, SlotLock] = dataclasses.field(default_factory=dict)
    sound: bool = True

    def slots(self, rank: int) -> list[Slot]:
        return [part.slots[rank] for part in own_parts(self.job, rank)]

    def die(self) -> None:
        """What the kernel does for a process that ends."""
        for writing in self.writing.values():
            writing.end()
        self.writing.clear()


class StoreMachine(RuleBasedStateMachine):
    """Prompts share beginnings: prompt p of n chunks is keys_of(geometry, n, first_token=p)."""

    stores: Bundle[Work] = Bundle("stores")
    loads: Bundle[Work] = Bundle("loads")

    def __init__(self) -> None:
        super().__init__()
        self.geometry = self.make_geometry()
        self.now = 0.0
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.backend = FaultyByteStore(DictByteStore())
        self.stored: set[bytes] = set()
        """Keys of chunks that some store has ended well for."""
        self.live: dict[int, Work] = {}
        self.lapsed: dict[int, Work] = {}
        """Stores that the store took back while ranks were copying."""
        self.kept: dict[EntryId, float] = {}
        """What is not to be evicted, until when."""
        self.open()

    def make_geometry(self) -> Geometry:
        return full_geometry(num_ranks=2)

    def open(self) -> None:
        options = StoreOptions(
            chunk_tokens=CHUNK_TOKENS,
            l1_size_gb=ARENA_BYTES / 1e9,
            arena_dir=str(self.folder),
            load_deadline_seconds=2.0,
            eviction_policy="s3fifo" if isinstance(self, HybridMachine) else "lru",
        )
        tier = ByteTier(self.backend, Tier.DISK, clock=lambda: self.now)
        self.store = ManagedStore(
            options,
            tiers=[tier],
            lease_seconds=60.0,
            clock=lambda: self.now,
            adopt=True,
            quotas={"tenant": QUOTA_BYTES},
        )
        self.arena: Arena = self.store.mapping
        register(self.store, self.geometry)

    def keys(self, prompt: int, num_chunks: int) -> list[bytes]:
        """The first two prompts are one until their third chunk."""
        keys = keys_of(self.geometry, num_chunks, first_token=1000 + max(prompt, 1))
        if prompt == 0 and num_chunks > 2:
            tail = keys_of(self.geometry, num_chunks, first_token=999)
            return keys[:2] + tail[2:]
        return keys

    def salt(self, prompt: int) -> str | None:
        return "tenant" if prompt > 2 else None

    def took(self, job: Job | None, keys: list[bytes], owner: str) -> Work | None:
        if job is None:
            return None
        work = Work(job, keys, owner, set(range(self.geometry.num_ranks)), self.now)
        self.live[job.job_id] = work
        return work

    @rule(target=stores, prompt=st.integers(0, 5), num_chunks=st.integers(1, 6), first=st.integers(0, 3), owner=OWNERS)
    def begin_store(self, prompt: int, num_chunks: int, first: int, owner: str) -> Work | None:
        keys = self.keys(prompt, num_chunks)
        first, salt = min(first, num_chunks), self.salt(prompt)
        return self.took(self.store.begin_store(self.geometry, keys, first, salt=salt, owner=owner), keys, owner)

    @rule(prompts=st.lists(st.integers(0, 5), min_size=1, max_size=4), num_chunks=st.integers(1, 6))
    def save(self, prompts: list[int], num_chunks: int) -> None:
        """Most stores end well, and at once."""
        for prompt in prompts:
            work = self.begin_store(prompt, num_chunks, 0, "one")
            for rank in range(self.geometry.num_ranks):
                self.rank_stores(work, rank, True)
            self.settle()

    @rule(target=loads, prompt=st.integers(0, 5), num_chunks=st.integers(1, 6), first=st.integers(0, 3), owner=OWNERS)
    def begin_load(self, prompt: int, num_chunks: int, first: int, owner: str) -> Work | None:
        keys = self.keys(prompt, num_chunks)
        match = self.store.match(self.geometry, keys)
        assert set(keys[: match.num_chunks]) <= self.stored | set(self.unneeded(keys[: match.num_chunks]))
        if match.num_chunks <= first:
            return None
        keys = keys[: match.num_chunks]
        job = self.store.begin_load(self.geometry, keys, first, salt=self.salt(prompt), owner=owner)
        work = self.took(job, keys, owner)
        if work is not None and not work.job.ready:
            self.await_answer(work)
        return work if work is not None and work.job.job_id in self.live else None

    def unneeded(self, keys: list[bytes]) -> list[bytes]:
        """Without a group of full attention, a hit needs the last chunks alone."""
        return [] if any(group.kind is GroupKind.FULL for group in self.geometry.groups) else keys[:-1]

    def await_answer(self, work: Work) -> None:
        answer = self.store.poll(10.0, owner=work.owner)
        job_id = work.job.job_id
        assert {*answer.ready, *answer.failed} == {job_id}, "one load waits, and is answered once"
        if answer.failed:
            del self.live[job_id]

    def took_back(self, work: Work) -> None:
        if self.live.pop(work.job.job_id, None) and work.writing:
            self.lapsed[work.job.job_id] = work

    @rule(work=stores, rank=st.integers(0, 1))
    def rank_begins(self, work: Work | None, rank: int) -> None:
        if work is None or rank not in work.ranks or rank in work.writing:
            return
        writing = self.arena.begin_writing(work.slots(rank))
        assert (writing is not None) == (work.job.job_id in self.live or not work.slots(rank))
        if writing is not None:
            work.writing[rank] = writing

    @rule(work=stores, rank=st.integers(0, 1), ok=st.sampled_from([True, True, True, False]))
    def rank_stores(self, work: Work | None, rank: int, ok: bool) -> None:
        """A rank that is late writes all the same: nobody else's chunk may show it."""
        if work is None or rank not in work.ranks:
            return
        self.rank_begins(work, rank)
        writing = work.writing.pop(rank, None)
        ok = ok and work.job.job_id in self.live
        if writing is not None:
            for part, slot in zip(own_parts(work.job, rank), work.slots(rank), strict=True):
                text = bytes_of(work.keys[part.chunk], part, rank)
                self.arena.view(slot)[:] = text if ok else b"\xee" * slot.num_bytes
            writing.end()
        if not work.writing:
            self.lapsed.pop(work.job.job_id, None)
        work.ranks.discard(rank)
        work.sound &= ok
        self.store.done(work.job.job_id, rank, ok)
        if not work.ranks:
            live = self.live.pop(work.job.job_id, None)
            if live is not None and work.sound:
                self.stored.update(work.keys[part.chunk] for part in work.job.parts)

    @rule(work=consumes(loads), ok=st.booleans())
    def finish_load(self, work: Work | None, ok: bool) -> None:
        if work is None:
            return
        if self.live.pop(work.job.job_id, None):
            assert_copied(self.arena, work.job, work.keys)
        for rank in range(self.geometry.num_ranks):
            self.store.done(work.job.job_id, rank, ok)

    @rule(work=st.one_of(consumes(stores), consumes(loads)))
    def cancel(self, work: Work | None) -> None:
        if work is None:
            return
        self.store.cancel(work.job.job_id)
        self.took_back(work)

    @rule(seconds=st.sampled_from([1.0, 30.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.store.poll()
        for work in [*self.live.values()]:
            if work.begun_at + 60.0 <= self.now:
                self.took_back(work)
        assert self.store.stats()["slots_withdrawn"] == self.num_written()

    def num_written(self) -> int:
        return sum(len(work.slots(rank)) for work in self.lapsed.values() for rank in work.writing)

    @rule(owner=OWNERS, is_dead=st.booleans())
    def owner_goes(self, owner: str, is_dead: bool) -> None:
        """Or is thought to be gone, while it copies."""
        for work in [*self.live.values(), *self.lapsed.values()]:
            if work.owner == owner and is_dead:
                work.die()
        self.store.release(owner)
        for work in [*self.live.values()]:
            if work.owner == owner:
                self.took_back(work)
        self.lapsed = {job_id: work for job_id, work in self.lapsed.items() if work.writing}

    @rule(prompt=st.integers(0, 5), num_chunks=st.integers(1, 6))
    def prefetch(self, prompt: int, num_chunks: int) -> None:
        keys = self.keys(prompt, num_chunks)
        found = self.store.prefetch(self.geometry, keys, salt=self.salt(prompt))
        assert found.num_in_memory + found.num_under_way <= found.num_entries

    @rule(prompts=st.sets(st.integers(0, 5)), salt=SALTS, unused=st.sampled_from([None, None, 0.0, 50.0]))
    def clear(self, prompts: set[int], salt: str | None, unused: float | None) -> None:
        keys = frozenset(key for prompt in prompts for key in self.keys(prompt, 6)) if prompts else None
        selection = Selection(keys=keys, salt_tag=salt_tag(salt) if salt else None, unused_seconds=unused)
        meant = [entry for entry in self.store._index.select(selection) if not self.store._index.is_pinned(entry)]
        cleared = self.store.clear(selection)
        assert cleared == Tally(len(meant), sum(entry.num_bytes for entry in meant))
        for entry in meant:
            assert self.store._index.get(entry.id) is None
            assert self.store._tiers.source(entry.id, self.geometry.num_ranks) is None

    @rule(prompt=st.integers(0, 5), num_chunks=st.integers(1, 6), seconds=st.sampled_from([5.0, 50.0]))
    def keep(self, prompt: int, num_chunks: int, seconds: float) -> None:
        keys = frozenset(self.keys(prompt, num_chunks))
        tally = self.store.keep(Selection(keys=keys), seconds)
        self.kept = dict(self.store._index._kept)
        assert sum(until == self.now + seconds for until in self.kept.values()) >= tally.num_entries

    @rule(salt=SALTS)
    def unkeep(self, salt: str | None) -> None:
        self.store.unkeep(Selection(salt_tag=salt_tag(salt)))
        self.kept = dict(self.store._index._kept)
        assert not any(self.store._index.get(kept).wanted.salt_tag == salt_tag(salt) for kept in self.kept)  # type: ignore[union-attr]

    @rule(fault=st.sampled_from(["none", "none", "put", "get", "short"]))
    def tier_changes(self, fault: str) -> None:
        self.backend.put_error = OSError(errno.ENOSPC, "full") if fault == "put" else None
        self.backend.get_error = OSError(errno.EIO, "broken") if fault == "get" else None
        self.backend.short_reads = fault == "short"

    @rule(data=st.data())
    def tier_loses_a_value(self, data: st.DataObject) -> None:
        assert isinstance(self.backend.inner, DictByteStore)
        names: list[PartName] = sorted(self.backend.inner.values)
        if names:
            self.backend.inner.delete([data.draw(st.sampled_from(names))])

    @rule()
    def restart(self) -> None:
        self.close()
        self.open()
        assert len(self.store._index) == 0

    @rule(is_dead=st.booleans())
    def server_is_killed(self, is_dead: bool) -> None:
        """Its engines may live on, and go on copying."""
        self.settle()
        committed = {entry.id for entry in self.store._index if entry.state is EntryState.COMMITTED}
        for work in [*self.live.values()]:
            self.took_back(work)
        if is_dead:
            for work in self.lapsed.values():
                work.die()
            self.lapsed.clear()
        self.store.close(keep_arena=True)
        self.kept.clear()
        self.open()
        assert {entry.id for entry in self.store._index} == committed
        assert self.store.stats()["slots_withdrawn"] == self.num_written()

    def close(self) -> None:
        for work in [*self.live.values(), *self.lapsed.values()]:
            work.die()
        self.live.clear()
        self.lapsed.clear()
        self.kept.clear()
        self.store.close()

    @invariant()
    def agrees(self) -> None:
        self.settle()
        self.store.check()
        stats = self.store.stats()
        assert stats["leases"] == len(self.live)
        assert stats["slots_withdrawn"] >= self.num_written()
        usage = self.store.usage()
        assert sum(of.num_bytes for of in usage) == stats["entries_bytes"]
        assert sum(of.num_bytes for of in usage if of.salt_tag == salt_tag("tenant")) <= QUOTA_BYTES
        kept = [entry_id for entry_id, until in self.kept.items() if until > self.now]
        entries = [self.store._index.get(entry_id) for entry_id in kept]
        assert all(entries), "what is to be kept is there"
        assert sum(entry.num_bytes for entry in entries if entry) <= self.store.arena().num_bytes / 2

    def settle(self) -> None:
        """Let the tier's threads finish, so that each run of these steps is the same run."""
        for _ in range(10_000):
            stats = self.store.stats()
            under_way = ("parts_being_written_through", "entries_promoting", "disk_queued_deletes")
            if not any(stats[name] for name in under_way):
                return
            threading.Event().wait(0.0005)
        raise AssertionError("the tier's threads do not finish")

    def teardown(self) -> None:
        self.close()
        assert not list(self.folder.iterdir())
        shutil.rmtree(self.folder)


class HybridMachine(StoreMachine):
    def make_geometry(self) -> Geometry:
        return hybrid_geometry(num_ranks=2)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=30, stateful_step_count=40)
TestHybridMachine = HybridMachine.TestCase
TestHybridMachine.settings = settings(max_examples=30, stateful_step_count=40)
