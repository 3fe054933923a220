"""What every `BlockStore` must do, as a suite that the tests of each implementation subclass.

Uses the seam alone, and the arena as a worker in another process would: attached by its `ArenaInfo`. So it holds for a
store in this process and for one behind a socket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from kvferry.blocks import Geometry, GroupKind, GroupSpec, Job, JobKind, Part, Tier
from kvferry.config import StoreOptions
from kvferry.errors import ConfigError
from kvferry.store.arena import Arena
from kvferry.store.base import BlockStore, ByteStore
from kvferry.store.keys import Extras, chunk_keys, root_key
from kvferry.testing.byte_store import DictByteStore

ENGINE = "engine"
CHUNK_TOKENS = 4


def full_geometry(num_ranks: int = 1, part_bytes: int = 8192, identity: str = "model") -> Geometry:
    """One group of full attention."""
    return Geometry(identity, "layout", CHUNK_TOKENS, num_ranks, (GroupSpec(GroupKind.FULL, (0, 1), part_bytes),))


def hybrid_geometry(num_ranks: int = 1) -> Geometry:
    """Full attention, a window of two chunks, and a recurrent state, each with parts of its own size. Ranks share those
    of full attention."""
    groups = (
        GroupSpec(GroupKind.FULL, (0,), 8192, is_shared=num_ranks > 1),
        GroupSpec(GroupKind.WINDOW, (1,), 4096, window_tokens=2 * CHUNK_TOKENS),
        GroupSpec(GroupKind.STATE, (2,), 640),
    )
    return Geometry("hybrid", "layout", CHUNK_TOKENS, num_ranks, groups)


def keys_of(geometry: Geometry, num_chunks: int, first_token: int = 0) -> list[bytes]:
    """Keys of a prompt that begins with `first_token`, then 1, 2, 3, ..."""
    tokens = [first_token, *range(1, num_chunks * geometry.chunk_tokens)]
    return chunk_keys(root_key(geometry), tokens, geometry.chunk_tokens)


def bytes_of(key: bytes, part: Part, rank: int) -> bytes:
    """What this part of the chunk named `key` must hold, on any machine at any time."""
    seed = key + bytes([part.group, rank])
    return hashlib.shake_128(seed).digest(part.slots[rank].num_bytes)


def register(store: BlockStore, geometry: Geometry, engine: str = ENGINE) -> None:
    """Declare every rank."""
    for rank in range(geometry.num_ranks):
        store.register(engine, rank, geometry)


def own_parts(job: Job, rank: int) -> list[Part]:
    """Those that a rank saves: of what ranks share the first rank saves all."""
    return [part for part in job.parts if rank < len(part.slots)]


def copy_in(arena: Arena, job: Job, keys: Sequence[bytes], rank: int) -> None:
    """Do what a mover does with a store's job."""
    own = own_parts(job, rank)
    writing = arena.begin_writing([part.slots[rank] for part in own])
    assert writing is not None
    with writing:
        for part in own:
            arena.view(part.slots[rank])[:] = bytes_of(keys[part.chunk], part, rank)


def assert_copied(arena: Arena, job: Job, keys: Sequence[bytes]) -> None:
    """Every part of a load is what was once stored, and still its own after it was read."""
    for part in job.parts:
        for rank, slot in enumerate(part.slots):
            assert bytes(arena.view(slot)) == bytes_of(keys[part.chunk], part, rank)
            assert arena.holds(slot)


class BlockStoreSuite:
    """Subclass as `class TestMine(BlockStoreSuite)` and implement `make`. Tests end with `check` and no lease left."""

    def make(self, options: StoreOptions, byte_store: ByteStore | None) -> BlockStore:
        """A new store, with `byte_store` as its disk tier if there is one. The suite closes it."""
        raise NotImplementedError

    def open(
        self, geometry: Geometry, *, arena_bytes: int = 4_000_000, byte_store: ByteStore | None = None
    ) -> tuple[BlockStore, Arena]:
        """A store on which all ranks of `geometry` have registered, and a worker's view of its arena."""
        store = self.make(StoreOptions(chunk_tokens=CHUNK_TOKENS, l1_size_gb=arena_bytes / 1e9), byte_store)
        register(store, geometry)
        return store, Arena.attach(store.arena())

    def end(self, store: BlockStore, arena: Arena) -> None:
        """Check, and close."""
        store.check()
        assert store.stats()["leases"] == 0
        arena.close()
        store.close()

    def save(self, store: BlockStore, arena: Arena, geometry: Geometry, keys: Sequence[bytes], first: int = 0) -> int:
        """Store what is lacking of `keys[first:]`; the number of parts stored."""
        job = store.begin_store(geometry, keys, first)
        if job is None:
            return 0
        assert job.kind is JobKind.STORE
        assert job.ready
        for rank in range(geometry.num_ranks):
            copy_in(arena, job, keys, rank)
            store.done(job.job_id, rank, True)
        store.check()
        return len(job.parts)

    def load(self, store: BlockStore, arena: Arena, geometry: Geometry, keys: Sequence[bytes], first: int = 0) -> int:
        """Load `keys` after the first `first` chunks and verify every byte; the number of parts loaded."""
        job = store.begin_load(geometry, keys, first)
        assert job is not None
        assert job.kind is JobKind.LOAD
        if not job.ready:
            assert store.poll(10.0).ready == (job.job_id,)
        store.check()
        assert_copied(arena, job, keys)
        for rank in range(geometry.num_ranks):
            store.done(job.job_id, rank, True)
        return len(job.parts)

    def test_what_is_stored_is_matched_and_loaded(self) -> None:
        for geometry in (full_geometry(), full_geometry(num_ranks=2)):
            store, arena = self.open(geometry)
            keys = keys_of(geometry, 5)
            assert store.match(geometry, keys).num_chunks == 0
            assert self.save(store, arena, geometry, keys) == 5
            match = store.match(geometry, [*keys, b"?" * 32])
            assert (match.num_chunks, match.tiers) == (5, (Tier.MEMORY,) * 5)
            assert self.load(store, arena, geometry, keys) == 5
            assert self.load(store, arena, geometry, keys, first=3) == 2
            assert self.load(store, arena, geometry, keys[:2]) == 2
            self.end(store, arena)

    def test_only_what_is_lacking_is_stored(self) -> None:
        geometry = full_geometry()
        store, arena = self.open(geometry)
        keys = keys_of(geometry, 6)
        assert self.save(store, arena, geometry, keys[:2]) == 2
        first = store.begin_store(geometry, keys[:4], 0)
        assert first is not None
        assert [part.chunk for part in first.parts] == [2, 3]
        assert store.begin_store(geometry, keys[:4], 0) is None, "what is reserved is not stored twice"
        second = store.begin_store(geometry, keys, 2)
        assert second is not None
        assert [part.chunk for part in second.parts] == [4, 5]
        for job in (first, second):
            copy_in(arena, job, keys, 0)
            store.done(job.job_id, 0, True)
        assert self.load(store, arena, geometry, keys) == 6
        self.end(store, arena)

    def test_nothing_is_seen_before_every_rank_has_stored(self) -> None:
        geometry = full_geometry(num_ranks=3)
        store, arena = self.open(geometry)
        keys = keys_of(geometry, 2)
        job = store.begin_store(geometry, keys, 0)
        assert job is not None
        for rank in range(3):
            assert store.match(geometry, keys).num_chunks == 0
            assert store.begin_load(geometry, keys, 0) is None
            copy_in(arena, job, keys, rank)
            store.done(job.job_id, rank, True)
        assert store.match(geometry, keys).num_chunks == 2
        self.end(store, arena)

    def test_one_failed_rank_fails_the_store(self) -> None:
        geometry = full_geometry(num_ranks=2)
        store, arena = self.open(geometry)
        keys = keys_of(geometry, 2)
        job = store.begin_store(geometry, keys, 0)
        assert job is not None
        store.done(job.job_id, 0, False)
        store.done(job.job_id, 0, True)
        assert store.begin_store(geometry, keys, 0) is None, "the other rank may still write"
        store.done(job.job_id, 1, True)
        assert store.match(geometry, keys).num_chunks == 0
        assert self.save(store, arena, geometry, keys) == 2
        self.end(store, arena)

    def test_cancelled_jobs_leave_nothing(self) -> None:
        geometry = full_geometry()
        store, arena = self.open(geometry)
        keys = keys_of(geometry, 3)
        job = store.begin_store(geometry, keys, 0)
        assert job is not None
        store.cancel(job.job_id)
        assert store.match(geometry, keys).num_chunks == 0
        assert self.save(store, arena, geometry, keys) == 3
        job = store.begin_load(geometry, keys, 0)
        assert job is not None
        store.cancel(job.job_id)
        self.end(store, arena)

    def test_unknown_jobs_are_counted_and_ignored(self) -> None:
        geometry = full_geometry()
        store, arena = self.open(geometry)
        store.done(12345, 0, True)
        store.cancel(12345)
        job = store.begin_store(geometry, keys_of(geometry, 1), 0)
        assert job is not None
        store.done(job.job_id, 7, True)
        store.cancel(job.job_id)
        store.done(job.job_id, 0, True)
        assert store.stats()["unknown_jobs"] == 4
        self.end(store, arena)

    def test_a_full_store_evicts_whole_tails_and_goes_on(self) -> None:
        geometry = full_geometry()
        store, arena = self.open(geometry, arena_bytes=300_000)
        for prompt in range(40):
            keys = keys_of(geometry, 4, first_token=1000 + prompt)
            assert self.save(store, arena, geometry, keys) == 4
            assert self.load(store, arena, geometry, keys) == 4
        hits = [store.match(geometry, keys_of(geometry, 4, 1000 + prompt)).num_chunks for prompt in range(40)]
        assert hits[-1] == 4
        assert hits[0] == 0
        for prompt, num_chunks in enumerate(hits):
            if num_chunks:
                self.load(store, arena, geometry, keys_of(geometry, 4, 1000 + prompt)[:num_chunks])
        assert store.stats()["evicted_entries"] > 0
        self.end(store, arena)

    def test_what_is_leased_is_not_evicted(self) -> None:
        geometry = full_geometry()
        store, arena = self.open(geometry, arena_bytes=300_000)
        kept = keys_of(geometry, 4, first_token=999)
        self.save(store, arena, geometry, kept)
        job = store.begin_load(geometry, kept, 0)
        assert job is not None
        for prompt in range(40):
            self.save(store, arena, geometry, keys_of(geometry, 4, first_token=1000 + prompt))
        assert_copied(arena, job, kept)
        store.done(job.job_id, 0, True)
        assert store.match(geometry, kept).num_chunks == 4
        self.end(store, arena)

    def test_a_prompt_larger_than_the_arena_keeps_its_beginning(self) -> None:
        geometry = full_geometry()
        store, arena = self.open(geometry, arena_bytes=300_000)
        keys = keys_of(geometry, 100)
        num_parts = self.save(store, arena, geometry, keys)
        assert 10 < num_parts < 100
        assert store.match(geometry, keys).num_chunks == num_parts
        assert self.load(store, arena, geometry, keys[:num_parts]) == num_parts
        assert store.begin_load(geometry, keys, 0) is None
        self.end(store, arena)

    def test_a_chunk_without_its_parent_is_not_stored(self) -> None:
        geometry = full_geometry()
        store, arena = self.open(geometry)
        keys = keys_of(geometry, 3)
        assert store.begin_store(geometry, keys, 1) is None
        assert self.save(store, arena, geometry, keys[:1]) == 1
        assert self.save(store, arena, geometry, keys, first=1) == 2
        self.end(store, arena)

    def test_every_group_is_at_the_same_boundary(self) -> None:
        geometry = hybrid_geometry(num_ranks=2)
        store, arena = self.open(geometry)
        keys = keys_of(geometry, 8)
        # At the boundary after 5 chunks: 5 of full attention, the last 2 of the window, the last state.
        assert self.save(store, arena, geometry, keys[:5]) == 5 + 2 + 1
        assert store.match(geometry, keys).num_chunks == 5
        assert store.match(geometry, keys[:4]).num_chunks == 0, "no state there"
        assert self.save(store, arena, geometry, keys) == 3 + 2 + 1
        assert store.match(geometry, keys).num_chunks == 8
        assert store.match(geometry, keys[:7]).num_chunks == 5
        assert self.load(store, arena, geometry, keys, first=7) == 3
        assert self.load(store, arena, geometry, keys) == 8 + 2 + 1
        self.end(store, arena)

    def test_a_shared_part_has_one_slot(self) -> None:
        geometry = hybrid_geometry(num_ranks=2)
        store, arena = self.open(geometry)
        keys = keys_of(geometry, 2)
        job = store.begin_store(geometry, keys, 0)
        assert job is not None
        assert {(part.group, len(part.slots)) for part in job.parts} == {(0, 1), (1, 2), (2, 2)}
        for rank in range(2):
            assert store.match(geometry, keys).num_chunks == 0
            copy_in(arena, job, keys, rank)
            store.done(job.job_id, rank, True)
        assert store.stats()["entries_bytes"] == 2 * 8192 + 2 * 2 * 4096 + 2 * 640
        assert self.load(store, arena, geometry, keys) == 2 + 2 + 1
        self.end(store, arena)

    def test_places_are_those_of_full_attention(self) -> None:
        byte_store = DictByteStore()
        geometry = hybrid_geometry(num_ranks=2)
        keys = keys_of(geometry, 5)
        store, arena = self.open(geometry, byte_store=byte_store)
        job = store.begin_store(geometry, keys[:4], 0)
        assert job is not None
        for rank in range(2):
            assert [*store.locate(geometry, keys)] == [None] * 5
            copy_in(arena, job, keys, rank)
            store.done(job.job_id, rank, True)
        assert [*store.locate(geometry, keys[::-1])] == [None, *[Tier.MEMORY] * 4]
        assert store.match(geometry, keys[:3]).num_chunks == 0, "no state there"
        assert [*store.locate(geometry, [])] == []
        self.end(store, arena)
        store, arena = self.open(geometry, byte_store=byte_store)
        assert [*store.locate(geometry, keys)] == [*[Tier.DISK] * 4, None]
        self.end(store, arena)

    def test_other_geometries_are_other_chunks(self) -> None:
        mine, other = full_geometry(), full_geometry(identity="another model")
        store, arena = self.open(mine)
        register(store, other, engine="another engine")
        keys = keys_of(mine, 3)
        self.save(store, arena, mine, keys)
        assert not set(keys) & set(keys_of(other, 3))
        assert store.match(other, keys_of(other, 3)).num_chunks == 0
        self.end(store, arena)

    def test_parts_of_any_size_take_memory_from_each_other(self) -> None:
        """Whichever registers first, in slots that are a fraction or a multiple of the arena's units."""
        sizes = (4096, 50_000, 16384, 120_000)
        geometries = [full_geometry(part_bytes=size, identity=str(size)) for size in sizes]
        store, arena = self.open(geometries[0], arena_bytes=600_000)
        for geometry in geometries[1:]:
            register(store, geometry, engine=geometry.identity)
        for geometry in (*geometries, *reversed(geometries), *geometries):
            for prompt in range(6):
                keys = keys_of(geometry, 3, first_token=1000 + prompt)
                self.save(store, arena, geometry, keys)
                assert self.load(store, arena, geometry, keys) == 3
        self.end(store, arena)

    def test_a_salt_is_told_and_changes_nothing_but_keys(self) -> None:
        geometry = full_geometry()
        store, arena = self.open(geometry)
        tokens = range(3 * CHUNK_TOKENS)
        keys = chunk_keys(root_key(geometry), tokens, CHUNK_TOKENS, Extras(cache_salt="tenant"))
        job = store.begin_store(geometry, keys, 0, salt="tenant")
        assert job is not None
        copy_in(arena, job, keys, 0)
        store.done(job.job_id, 0, True)
        job = store.begin_load(geometry, keys, 0, salt="tenant")
        assert job is not None
        assert_copied(arena, job, keys)
        store.done(job.job_id, 0, True)
        assert store.match(geometry, chunk_keys(root_key(geometry), tokens, CHUNK_TOKENS)).num_chunks == 0
        self.end(store, arena)

    def test_ranks_must_agree_and_a_chunk_must_fit(self) -> None:
        geometry = full_geometry(num_ranks=2)
        store, arena = self.open(geometry)
        assert store.geometry(ENGINE) == geometry
        store.register("half", 0, geometry)
        assert store.geometry("half") is None
        assert store.geometry("nobody") is None
        impossible = (
            ("half", 1, full_geometry(num_ranks=2, identity="another")),
            ("half", 2, geometry),
            ("large", 0, full_geometry(part_bytes=5_000_000)),
        )
        for engine, rank, declared in impossible:
            try:
                store.register(engine, rank, declared)
            except ConfigError:
                continue
            raise AssertionError(f"rank {rank} of {engine} was let in")
        self.end(store, arena)

    def test_a_geometry_that_nobody_registered_is_a_miss(self) -> None:
        stranger = full_geometry(identity="stranger")
        store, arena = self.open(full_geometry())
        keys = keys_of(stranger, 2)
        assert store.match(stranger, keys).num_chunks == 0
        assert store.begin_store(stranger, keys, 0) is None
        assert store.begin_load(stranger, keys, 0) is None
        self.end(store, arena)

    def test_a_new_store_finds_what_the_last_one_wrote_below(self) -> None:
        byte_store = DictByteStore()
        for geometry in (full_geometry(num_ranks=2), hybrid_geometry(), hybrid_geometry(num_ranks=2)):
            keys = keys_of(geometry, 5)
            store, arena = self.open(geometry, byte_store=byte_store)
            self.save(store, arena, geometry, keys)
            self.end(store, arena)
            store, arena = self.open(geometry, byte_store=byte_store)
            match = store.match(geometry, keys)
            assert match.num_chunks == 5
            assert match.tiers == (Tier.DISK,) * 5
            self.load(store, arena, geometry, keys)
            assert store.match(geometry, keys).tiers == (Tier.MEMORY,) * 5
            self.end(store, arena)

    def test_a_part_that_is_gone_below_shortens_the_next_match(self) -> None:
        geometry = full_geometry()
        byte_store = DictByteStore()
        keys = keys_of(geometry, 4)
        store, arena = self.open(geometry, byte_store=byte_store)
        self.save(store, arena, geometry, keys)
        self.end(store, arena)
        store, arena = self.open(geometry, byte_store=byte_store)
        name = next(name for name in byte_store.values if name.startswith(keys[2]))
        byte_store.values[name] = byte_store.values[name][:-1]
        job = store.begin_load(geometry, keys, 0)
        assert job is not None
        assert not job.ready
        answer = store.poll(10.0)
        assert (answer.ready, answer.failed) == ((), (job.job_id,))
        assert store.match(geometry, keys).num_chunks == 2
        self.load(store, arena, geometry, keys[:2])
        assert self.save(store, arena, geometry, keys) >= 1
        assert store.match(geometry, keys).num_chunks == 4
        self.end(store, arena)

    def test_polling_without_a_load_returns_at_once(self) -> None:
        store, arena = self.open(full_geometry())
        answer = store.poll(30.0)
        assert (answer.ready, answer.failed) == ((), ())
        self.end(store, arena)
