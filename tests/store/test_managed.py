"""What those who run a store may ask of it: usage, clearing, keeping, fetching, and quotas of salts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry.blocks import Geometry, Tier
from kvferry.config import StoreOptions
from kvferry.store.base import Selection, Tally
from kvferry.store.disk import DiskStore
from kvferry.store.keys import NO_TAG, Extras, chunk_keys, geometry_tag, part_name, root_key, salt_tag
from kvferry.store.managed import ManagedStore
from kvferry.store.tier import ByteTier
from kvferry.testing.block_store import CHUNK_TOKENS, assert_copied, copy_in, full_geometry, keys_of, register
from kvferry.testing.byte_store import DictByteStore
from kvferry.testing.faults import FaultyByteStore

MINE, OTHER = full_geometry(num_ranks=2), full_geometry(identity="other", part_bytes=4096)
MINE_TAG, OTHER_TAG = geometry_tag(root_key(MINE)), geometry_tag(root_key(OTHER))
CHUNK_BYTES = 2 * 8192
ALL = Selection()


class Rig:
    """Stores one after another, with a clock, and a backend that outlives them."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.folder = folder
        self.backend = FaultyByteStore(DictByteStore())
        self.store = self.open()

    def open(self, arena_bytes: int = 1_000_000, **more: Any) -> ManagedStore:
        options = StoreOptions(chunk_tokens=CHUNK_TOKENS, l1_size_gb=arena_bytes / 1e9, arena_dir=str(self.folder))
        tiers = [ByteTier(self.backend, Tier.DISK)]
        self.store = ManagedStore(options, tiers=tiers, clock=lambda: self.now, adopt=True, **more)
        register(self.store, MINE)
        register(self.store, OTHER, engine="other")
        return self.store

    def save(self, geometry: Geometry, keys: list[bytes], salt: str | None = None) -> int:
        job = self.store.begin_store(geometry, keys, 0, salt=salt)
        if job is None:
            return 0
        for rank in range(geometry.num_ranks):
            copy_in(self.store.mapping, job, keys, rank)
            self.store.done(job.job_id, rank, True)
        self.settle()
        return len(job.parts)

    def settle(self) -> None:
        names = ("parts_being_written_through", "entries_promoting", "disk_queued_deletes")
        for _ in range(10_000):
            stats = self.store.stats()
            if not any(stats[name] for name in names):
                self.store.check()
                return
            threading.Event().wait(0.001)
        raise AssertionError("the tier's threads do not finish")

    def in_memory(self, geometry: Geometry, keys: list[bytes]) -> int:
        return list(self.store.match(geometry, keys).tiers).count(Tier.MEMORY)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "arenas")
    yield rig
    rig.backend.gate.set()
    rig.settle()
    rig.store.close()


def salted(geometry: Geometry, num_chunks: int, salt: str, first_token: int = 0) -> list[bytes]:
    tokens = [first_token, *range(1, num_chunks * CHUNK_TOKENS)]
    return chunk_keys(root_key(geometry), tokens, CHUNK_TOKENS, Extras(cache_salt=salt))


def usage(store: ManagedStore) -> dict[tuple[bytes, bytes], tuple[str | None, int, int]]:
    return {(of.geometry_tag, of.salt_tag): (of.identity, of.num_entries, of.num_bytes) for of in store.usage()}


def test_usage_is_listed_by_model_and_salt_also_after_a_restart(rig: Rig) -> None:
    rig.save(MINE, keys_of(MINE, 3))
    rig.save(MINE, salted(MINE, 2, "a"), salt="a")
    rig.save(OTHER, keys_of(OTHER, 4))
    listed = {
        (MINE_TAG, NO_TAG): ("model", 3, 3 * CHUNK_BYTES),
        (MINE_TAG, salt_tag("a")): ("model", 2, 2 * CHUNK_BYTES),
        (OTHER_TAG, NO_TAG): ("other", 4, 4 * 4096),
    }
    assert usage(rig.store) == listed
    rig.store.close(keep_arena=True)
    rig.open()
    assert usage(rig.store) == listed
    rig.store.unregister("other")
    assert usage(rig.store) == listed, "a name is known as long as something is kept under it"
    rig.store.clear(Selection(geometry_tags=frozenset([OTHER_TAG])))
    rig.store.unregister("engine")
    del listed[OTHER_TAG, NO_TAG]
    assert usage(rig.store) == listed
    assert rig.store._registry.identity(OTHER_TAG) is None
    rig.store.clear(ALL)
    rig.store.unregister("engine")
    assert rig.store._registry._identities == {}


def test_names_of_models_are_those_declared_since_the_start(rig: Rig) -> None:
    rig.save(MINE, keys_of(MINE, 1))
    rig.store.close(keep_arena=True)
    options = StoreOptions(chunk_tokens=CHUNK_TOKENS, l1_size_gb=0.001, arena_dir=str(rig.folder))
    rig.store = ManagedStore(options, tiers=[ByteTier(rig.backend, Tier.DISK)], adopt=True)
    assert usage(rig.store) == {(MINE_TAG, NO_TAG): (None, 1, CHUNK_BYTES)}


@pytest.mark.parametrize(
    ("selection", "cleared"),
    [
        (ALL, "old young salted other"),
        (Selection(geometry_tags=frozenset([OTHER_TAG])), "other"),
        (Selection(geometry_tags=frozenset()), ""),
        (Selection(salt_tag=salt_tag("a")), "salted"),
        (Selection(salt_tag=NO_TAG), "old young other"),
        (Selection(unused_seconds=100.0), "old"),
        (Selection(geometry_tags=frozenset([MINE_TAG]), unused_seconds=10.0), "old salted"),
        (Selection(keys=frozenset(keys_of(MINE, 2, first_token=1))), "young"),
    ],
)
def test_what_is_selected_is_cleared_in_memory_and_below(rig: Rig, selection: Selection, cleared: str) -> None:
    prompts = {"old": (MINE, keys_of(MINE, 2), None), "salted": (MINE, salted(MINE, 2, "a"), "a")}
    prompts["young"] = (MINE, keys_of(MINE, 2, first_token=1), None)
    prompts["other"] = (OTHER, keys_of(OTHER, 2), None)
    for name, (geometry, keys, salt) in prompts.items():
        rig.save(geometry, keys, salt)
        rig.now += {"old": 100.0, "salted": 20.0}.get(name, 0.0)
    expected = [prompts[name][0] for name in cleared.split()]
    tally = rig.store.clear(selection)
    assert tally == Tally(2 * len(expected), 2 * sum(CHUNK_BYTES if of is MINE else 4096 for of in expected))
    for name, (geometry, keys, _) in prompts.items():
        assert rig.store.match(geometry, keys).num_chunks == (0 if name in cleared.split() else 2)
    rig.settle()
    assert isinstance(rig.backend.inner, DictByteStore)
    assert len(rig.backend.inner.values) == sum(2 * geometry.num_ranks for geometry, *_ in prompts.values()) - sum(
        2 * of.num_ranks for of in expected
    )


def test_use_makes_young(rig: Rig) -> None:
    keys = keys_of(MINE, 2)
    rig.save(MINE, keys)
    rig.now += 100.0
    job = rig.store.begin_load(MINE, keys[:1], 0)
    assert job is not None
    rig.store.cancel(job.job_id)
    assert rig.store.clear(Selection(unused_seconds=50.0)).num_entries == 1
    assert rig.store.match(MINE, keys).num_chunks == 1


def test_what_somebody_needs_is_not_cleared(rig: Rig) -> None:
    keys = keys_of(MINE, 3)
    rig.save(MINE, keys)
    load = rig.store.begin_load(MINE, keys[:1], 0)
    store = rig.store.begin_store(MINE, keys_of(MINE, 1, first_token=5), 0)
    assert load is not None
    assert store is not None
    rig.store.keep(Selection(keys=frozenset(keys[:2])), 10.0)
    assert rig.store.clear(ALL).num_entries == 1
    assert_copied(rig.store.mapping, load, keys)
    rig.store.cancel(load.job_id)
    rig.store.cancel(store.job_id)
    assert rig.store.clear(ALL).num_entries == 0, "the two are still to be kept"
    rig.store.unkeep(ALL)
    assert rig.store.clear(ALL).num_entries == 2


def test_what_is_kept_outlives_whatever_is_stored_until_its_time_is_up(rig: Rig) -> None:
    rig.store.close()
    rig.open(arena_bytes=300_000)
    kept = keys_of(MINE, 3)
    rig.save(MINE, kept)
    assert rig.store.keep(Selection(keys=frozenset(kept[2:])), 60.0) == Tally(1, CHUNK_BYTES)
    assert rig.store.stats()["entries_kept"] == 3, "nothing is kept without what it follows"

    def fill(first: int) -> None:
        for prompt in range(first, first + 20):
            assert rig.save(MINE, keys_of(MINE, 2, first_token=prompt))

    fill(100)
    assert rig.in_memory(MINE, kept) == 3
    rig.now += 59.0
    fill(200)
    assert rig.in_memory(MINE, kept) == 3
    rig.now += 1.0
    fill(300)
    assert rig.in_memory(MINE, kept) == 0
    assert rig.store.stats()["entries_kept"] == 0


def test_what_is_being_stored_cannot_be_kept(rig: Rig) -> None:
    keys = keys_of(MINE, 3)
    rig.save(MINE, keys)
    rig.store.clear(Selection(keys=frozenset(keys[:1])))
    job = rig.store.begin_store(MINE, keys[:1], 0)
    assert job is not None
    assert rig.store.keep(ALL, 10.0).num_entries == 2
    rig.store.cancel(job.job_id)
    rig.store.check()
    rig.now += 10.0
    rig.store.poll()
    rig.store.check()


def test_at_most_a_half_is_kept(rig: Rig) -> None:
    rig.store.close()
    rig.open(arena_bytes=300_000)
    keys = salted(MINE, 12, "a")
    assert rig.save(MINE, keys, "a") == 12
    most = 150_000 // CHUNK_BYTES
    assert rig.store.keep(Selection(salt_tag=salt_tag("a")), 60.0) == Tally(most, most * CHUNK_BYTES)
    assert rig.store.keep(Selection(salt_tag=salt_tag("a")), 90.0).num_entries == most, "a longer time costs nothing"
    for prompt in range(20):
        rig.save(MINE, keys_of(MINE, 2, first_token=100 + prompt))
    rig.now += 80.0
    assert rig.in_memory(MINE, keys) == most
    assert rig.store.unkeep(Selection(geometry_tags=frozenset([MINE_TAG]))) == Tally(most, most * CHUNK_BYTES)
    assert rig.store.stats()["entries_kept"] == 0


def test_a_salt_keeps_to_its_quota_and_evicts_its_own(rig: Rig) -> None:
    rig.store.close()
    rig.open(quotas={"a": 3 * CHUNK_BYTES, "b": 100})
    rig.save(MINE, keys_of(MINE, 4))
    for prompt in range(5):
        assert rig.save(MINE, salted(MINE, 2, "a", prompt), "a") == 2
    assert [rig.in_memory(MINE, salted(MINE, 2, "a", prompt)) for prompt in range(5)] == [0, 0, 0, 1, 2]
    assert rig.in_memory(MINE, keys_of(MINE, 4)) == 4, "others are not evicted for it"
    assert usage(rig.store)[MINE_TAG, salt_tag("a")][2] == 3 * CHUNK_BYTES
    assert rig.save(MINE, salted(MINE, 5, "a", 99), "a") == 3, "a prompt that is larger keeps its beginning"
    over_quota = rig.store.stats()["reserves_over_quota"]
    assert over_quota > 0
    assert rig.save(MINE, salted(MINE, 1, "b"), "b") == 0
    assert rig.store.stats()["reserves_over_quota"] > over_quota
    job = rig.store.begin_load(MINE, salted(MINE, 2, "a", 4), 0, salt="a")
    assert job is not None
    assert not job.ready, "what comes from below counts as well"
    assert rig.store.poll(10.0).ready == (job.job_id,)
    rig.settle()
    assert usage(rig.store)[MINE_TAG, salt_tag("a")][2] <= 3 * CHUNK_BYTES
    rig.store.release("local")


def test_a_smaller_quota_holds_from_the_restart_on(rig: Rig) -> None:
    keys = salted(MINE, 4, "a")
    rig.save(MINE, keys, "a")
    rig.store.close(keep_arena=True)
    rig.open(quotas={"a": 2 * CHUNK_BYTES})
    assert rig.in_memory(MINE, keys) == 2
    rig.store.check()


def test_fetching_ahead_brings_what_is_below_into_memory(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.store.managed._MOST_UNDER_WAY", 2)
    keys = keys_of(MINE, 5)
    rig.save(MINE, keys)
    rig.store.close()
    rig.open()
    assert rig.in_memory(MINE, keys) == 0
    rig.backend.gate.clear()
    first = rig.store.prefetch(MINE, keys)
    assert (first.num_entries, first.num_in_memory, first.num_under_way) == (5, 0, 2)
    again = rig.store.prefetch(MINE, keys)
    assert (again.num_in_memory, again.num_under_way) == (0, 2), "few at a time"
    assert rig.store.stats()["leases"] == 0
    rig.backend.gate.set()
    rig.settle()
    while (found := rig.store.prefetch(MINE, [*keys, b"?" * 32])).num_under_way:
        rig.settle()
    assert (found.num_entries, found.num_in_memory) == (5, 5)
    assert rig.in_memory(MINE, keys) == 5
    stranger = full_geometry(identity="stranger")
    assert rig.store.prefetch(stranger, keys_of(stranger, 2)).num_entries == 0


def test_fetching_ahead_ends_where_a_tier_fails(rig: Rig) -> None:
    keys = keys_of(MINE, 3)
    rig.save(MINE, keys)
    rig.store.close()
    rig.open()
    assert isinstance(rig.backend.inner, DictByteStore)
    name = next(name for name in rig.backend.inner.values if name.startswith(keys[1]))
    rig.backend.inner.values[name] = b""
    while rig.store.prefetch(MINE, keys).num_under_way:
        rig.settle()
    found = rig.store.prefetch(MINE, keys)
    assert (found.num_entries, found.num_in_memory) == (1, 1)


def test_what_is_used_in_memory_leaves_the_disk_last(rig: Rig, tmp_path: Path) -> None:
    rig.store.close()
    disk = DiskStore(tmp_path / "parts", 6 * 8192)
    rig.backend = FaultyByteStore(disk)
    rig.open()
    prompts = [keys_of(OTHER, 1, first_token=prompt) for prompt in range(9)]
    for number, keys in enumerate(prompts):
        rig.save(OTHER, keys)
        if number < 4:
            load = rig.store.begin_load(OTHER, prompts[0], 0)
            assert load is not None
            rig.store.done(load.job_id, 0, True)
    held = [disk.contains([part_name(keys[0], 0, 0)]) == [True] for keys in prompts]
    assert held == [True, False, False, False, *[True] * 5]
