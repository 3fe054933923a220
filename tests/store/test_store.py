"""The store in process: the shared suite, and what only its own clock, tiers and memory can show."""

from __future__ import annotations

import dataclasses
import errno
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvferry.blocks import Geometry, Job, Slot, Tier
from kvferry.config import StoreOptions
from kvferry.errors import ConfigError, InvariantError
from kvferry.store.arena import COMMITTED, Arena
from kvferry.store.base import ByteStore
from kvferry.store.disk import DiskStore
from kvferry.store.store import Store
from kvferry.store.tier import ByteTier
from kvferry.testing.block_store import (
    CHUNK_TOKENS,
    BlockStoreSuite,
    assert_copied,
    copy_in,
    full_geometry,
    keys_of,
    register,
)
from kvferry.testing.byte_store import DictByteStore
from kvferry.testing.faults import FaultyByteStore

GEOMETRY = full_geometry()
RANKED = full_geometry(num_ranks=2)


class FakeClock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class TestStore(BlockStoreSuite):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "arenas"

    def make(self, options: StoreOptions, byte_store: ByteStore | None) -> Store:
        tiers = [ByteTier(byte_store, Tier.DISK)] if byte_store is not None else []
        return Store(dataclasses.replace(options, arena_dir=str(self.folder)), tiers=tiers)


class Rig:
    """A store with a fake clock and a backend that fails on command."""

    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock()
        self.backend = FaultyByteStore(DictByteStore())
        self.folder = folder
        self.store = self.open()

    def open(self, geometry: Geometry = GEOMETRY, arena_bytes: int = 4_000_000) -> Store:
        options = StoreOptions(
            chunk_tokens=CHUNK_TOKENS,
            l1_size_gb=arena_bytes / 1e9,
            arena_dir=str(self.folder),
            load_deadline_seconds=2.0,
        )
        tier = ByteTier(self.backend, Tier.DISK, clock=self.clock)
        store = Store(options, tiers=[tier], lease_seconds=60.0, clock=self.clock)
        register(store, geometry)
        return store

    def reopen(self, geometry: Geometry = GEOMETRY) -> None:
        self.store.close()
        self.store = self.open(geometry)

    @property
    def arena(self) -> Arena:
        return self.store.mapping

    def save(self, keys: list[bytes], geometry: Geometry = GEOMETRY) -> None:
        job = self.store.begin_store(geometry, keys, 0)
        assert job is not None
        self.fill(job, keys, geometry)

    def fill(self, job: Job, keys: list[bytes], geometry: Geometry = GEOMETRY) -> None:
        for rank in range(geometry.num_ranks):
            copy_in(self.arena, job, keys, rank)
            self.store.done(job.job_id, rank, True)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it did not come about")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "arenas")
    yield rig
    rig.backend.gate.set()
    rig.store.check()
    rig.store.close()


def test_a_store_whose_lease_lapses_keeps_its_slots_from_others(rig: Rig) -> None:
    """A rank that is late may still write: what it writes must reach nobody else's chunk."""
    rig.reopen(RANKED)
    keys = keys_of(RANKED, 2)
    late = rig.store.begin_store(RANKED, keys, 0)
    assert late is not None
    slots = [[part.slots[rank] for part in late.parts] for rank in range(2)]
    writing = rig.arena.begin_writing(slots[1])
    assert writing is not None
    rig.store.done(late.job_id, 0, True)
    rig.clock.now += 61
    assert rig.store.match(RANKED, keys).num_chunks == 0
    rig.store.check()
    assert rig.store.stats()["slots_withdrawn"] == 2, "those of rank 0 serve again"
    assert rig.arena.begin_writing(slots[0]) is None, "who has not begun must not"
    rig.save(keys, RANKED)
    for slot in slots[1]:
        rig.arena.view(slot)[:] = b"\xee" * slot.num_bytes
    load = rig.store.begin_load(RANKED, keys, 0)
    assert load is not None
    assert_copied(rig.arena, load, keys)
    for rank in range(2):
        rig.store.done(load.job_id, rank, True)
    writing.end()
    rig.store.done(late.job_id, 1, True)
    assert rig.store.stats()["unknown_jobs"] == 1, "what was late was not committed a second time"
    rig.clock.now += 1
    rig.store.poll()
    assert rig.store.stats()["slots_withdrawn"] == 0
    assert rig.store.match(RANKED, keys).num_chunks == 2


def test_a_store_cancelled_under_a_writer_waits_for_it(rig: Rig) -> None:
    rig.reopen(RANKED)
    job = rig.store.begin_store(RANKED, keys_of(RANKED, 2), 0)
    assert job is not None
    writing = rig.arena.begin_writing([part.slots[0] for part in job.parts])
    assert writing is not None
    rig.store.done(job.job_id, 1, True)
    rig.store.cancel(job.job_id)
    assert rig.store.stats()["slots_withdrawn"] == 2
    rig.store.check()
    writing.end()
    rig.clock.now += 1
    rig.store.poll()
    assert rig.store.stats()["slots_withdrawn"] == 0


def test_a_load_whose_lease_lapses_gives_its_pins_back(rig: Rig) -> None:
    keys = keys_of(GEOMETRY, 2)
    rig.save(keys)
    job = rig.store.begin_load(GEOMETRY, keys, 0)
    assert job is not None
    rig.clock.now += 61
    rig.store.poll()
    assert rig.store.stats()["leases"] == 0
    rig.store.done(job.job_id, 0, True)
    assert rig.store.stats()["unknown_jobs"] == 1


def test_a_load_that_is_cancelled_takes_nothing_from_those_who_read_the_same(rig: Rig) -> None:
    """No rank was told of it: who has locked the slots reads them for another load."""
    keys = keys_of(GEOMETRY, 2)
    rig.save(keys)
    read, cancelled, waiting = (rig.store.begin_load(GEOMETRY, keys, 0) for _ in range(3))
    assert read is not None
    assert cancelled is not None
    assert waiting is not None
    slots = [slot for part in read.parts for slot in part.slots]
    lock = rig.store.mapping.begin_reading(slots)
    assert lock is not None
    rig.store.cancel(cancelled.job_id)
    assert rig.store.match(GEOMETRY, keys).num_chunks == 2
    assert all(map(rig.store.mapping.holds, slots)), "the one that waits finds them"
    lock.end()
    for job in (read, waiting):
        for rank in range(GEOMETRY.num_ranks):
            rig.store.done(job.job_id, rank, True)
    assert rig.store.stats()["leases"] == 0
    rig.store.check()


def test_an_owner_that_dies_leaves_nothing(rig: Rig) -> None:
    keys, other = keys_of(GEOMETRY, 2), keys_of(GEOMETRY, 2, first_token=7)
    rig.save(keys)
    load = rig.store.begin_load(GEOMETRY, keys, 0, owner="dead")
    lapsed = rig.store.begin_store(GEOMETRY, other, 0, owner="dead")
    rig.clock.now += 61
    rig.store.poll()
    store = rig.store.begin_store(GEOMETRY, other, 0, owner="dead")
    mine = rig.store.begin_load(GEOMETRY, keys, 0, owner="alive")
    assert load
    assert lapsed
    assert store
    assert mine
    rig.store.release("dead")
    rig.store.check()
    stats = rig.store.stats()
    assert (stats["leases"], stats["slots_withdrawn"], stats["entries_storing"]) == (1, 0, 0)
    rig.store.done(mine.job_id, 0, True)
    assert rig.store.match(GEOMETRY, keys).num_chunks == 2


def test_a_slow_tier_fails_the_load_at_its_deadline_and_commits_when_it_answers(rig: Rig) -> None:
    keys = keys_of(GEOMETRY, 3)
    rig.save(keys)
    rig.reopen()
    rig.backend.gate.clear()
    job = rig.store.begin_load(GEOMETRY, keys, 0)
    assert job is not None
    joined = rig.store.begin_load(GEOMETRY, keys[:2], 0)
    assert joined is not None
    assert not joined.ready
    wait_until(lambda: rig.backend.num_gets == 2)
    rig.clock.now += 2.1
    assert set(rig.store.poll(10.0).failed) == {job.job_id, joined.job_id}
    assert rig.store.match(GEOMETRY, keys).num_chunks == 0, "nobody waits for it again"
    assert rig.store.begin_load(GEOMETRY, keys, 0) is None
    rig.store.check()
    rig.backend.gate.set()
    wait_until(lambda: not rig.store.stats()["entries_promoting"])
    # Two of the three had begun before the deadline; the third was not begun after it.
    assert rig.store.match(GEOMETRY, keys[1:]).num_chunks == 2


def test_a_cancelled_load_still_promotes(rig: Rig) -> None:
    keys = keys_of(GEOMETRY, 3)
    rig.save(keys)
    rig.reopen()
    rig.backend.gate.clear()
    job = rig.store.begin_load(GEOMETRY, keys, 0)
    assert job is not None
    assert rig.store.match(GEOMETRY, keys).tiers == (Tier.DISK,) * 3, "on its way counts as where it comes from"
    rig.store.cancel(job.job_id)
    rig.store.check()
    rig.backend.gate.set()
    wait_until(lambda: not rig.store.stats()["entries_promoting"])
    assert rig.store.match(GEOMETRY, keys).tiers == (Tier.MEMORY,) * 3
    assert rig.store.poll().ready == ()


def test_two_loads_share_one_promotion(rig: Rig) -> None:
    keys = keys_of(GEOMETRY, 2)
    rig.save(keys)
    rig.reopen()
    rig.backend.gate.clear()
    jobs = [rig.store.begin_load(GEOMETRY, keys, 0) for _ in range(2)]
    rig.backend.gate.set()
    ready: set[int] = set()
    while len(ready) < 2:
        ready |= set(rig.store.poll(10.0).ready)
    assert rig.backend.num_gets == 2
    for job in jobs:
        assert job is not None
        assert_copied(rig.arena, job, keys)
        rig.store.done(job.job_id, 0, True)


def test_each_owner_is_told_of_its_own_loads_alone(rig: Rig) -> None:
    keys = keys_of(GEOMETRY, 3)
    rig.save(keys)
    rig.reopen()
    rig.backend.gate.clear()
    jobs = {owner: rig.store.begin_load(GEOMETRY, keys, 0, owner=owner) for owner in ("one", "two", "dead", "silent")}
    ids = {owner: job.job_id for owner, job in jobs.items() if job is not None}
    assert len(ids) == 4
    rig.store.release("dead")
    rig.backend.gate.set()
    assert rig.store.poll(10.0, owner="one").ready == (ids["one"],)
    assert rig.store.poll(owner="one").ready == ()
    assert rig.store.poll(30.0, owner="dead").ready == (), "who is dead waits for nothing"
    assert rig.store.poll(owner="two").ready == (ids["two"],)
    rig.store.done(ids["silent"], 0, True)
    assert rig.store.poll(owner="silent").ready == (), "a job that is done needs no answer"
    rig.store.done(ids["one"], 0, True)
    rig.store.release("two")
    assert rig.store.stats()["leases"] == 0


def test_answers_to_those_who_never_ask_do_not_pile_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.store.leases._MOST_ANSWERS", 3)
    keys = keys_of(GEOMETRY, 1)
    rig.save(keys)
    rig.reopen()
    rig.backend.gate.clear()
    jobs = [rig.store.begin_load(GEOMETRY, keys, 0) for _ in range(8)]
    rig.backend.gate.set()
    wait_until(lambda: not rig.store.stats()["entries_promoting"])
    assert rig.store.poll().ready == tuple(job.job_id for job in jobs[-3:] if job is not None)
    rig.store.release("local")


def test_an_engine_that_is_gone_may_come_back_as_another(rig: Rig) -> None:
    rig.save(keys_of(GEOMETRY, 2))
    other = full_geometry(identity="another", part_bytes=4096)
    with pytest.raises(ConfigError, match="different geometries"):
        rig.store.register("engine", 1, RANKED)
    rig.store.unregister("engine")
    rig.store.unregister("nobody")
    assert rig.store.geometry("engine") is None
    assert rig.store.stats()["geometries"] == 0
    assert rig.store.match(GEOMETRY, keys_of(GEOMETRY, 2)).num_chunks == 0, "nobody has declared it"
    register(rig.store, other)
    assert rig.store.geometry("engine") == other
    register(rig.store, GEOMETRY, engine="second")
    assert rig.store.match(GEOMETRY, keys_of(GEOMETRY, 2)).num_chunks == 2


def test_parts_being_written_below_are_not_evicted(rig: Rig) -> None:
    rig.store.close()
    rig.store = rig.open(arena_bytes=300_000)
    rig.backend.gate.clear()
    keys = keys_of(GEOMETRY, 2, first_token=999)
    rig.save(keys)
    for prompt in range(40):
        rig.save(keys_of(GEOMETRY, 2, first_token=1000 + prompt))
    assert rig.store.match(GEOMETRY, keys).tiers == (Tier.MEMORY,) * 2
    stats = rig.store.stats()
    assert stats["disk_queued_write_bytes"] <= 300_000 / 4
    assert stats["disk_refused_writes"] > 0, "what the queue cannot take is dropped and counted"
    rig.backend.gate.set()
    wait_until(lambda: not rig.store.stats()["parts_being_written_through"])


def test_a_full_disk_changes_nothing_but_the_disk(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.backend.put_error = OSError(errno.ENOSPC, "No space left on device")
    with caplog.at_level(logging.WARNING, "kvferry"):
        for prompt in range(5):
            keys = keys_of(GEOMETRY, 2, first_token=1000 + prompt)
            rig.save(keys)
            wait_until(lambda: not rig.store.stats()["parts_being_written_through"])
            assert rig.store.match(GEOMETRY, keys).num_chunks == 2
    assert len(caplog.records) == 1


def test_memory_that_runs_out_is_no_room(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory that is smaller than the arena: what there is of it is evicted and used again."""
    rig.store.close()
    claim = Arena.claim

    def claim_a_dozen(self: Arena, unit: int) -> None:
        if unit >= 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        claim(self, unit)

    monkeypatch.setattr(Arena, "claim", claim_a_dozen)
    rig.store = rig.open()
    for prompt in range(50):
        keys = keys_of(GEOMETRY, 4, first_token=1000 + prompt)
        if (job := rig.store.begin_store(GEOMETRY, keys, 0)) is not None:
            rig.fill(job, keys)
        rig.store.check()
        wait_until(lambda: not rig.store.stats()["parts_being_written_through"])  # they cannot be evicted
    assert rig.store.match(GEOMETRY, keys).num_chunks == 4
    assert rig.store.stats()["evicted_entries"] > 0


def test_closing_finishes_writing_below(rig: Rig) -> None:
    rig.backend.latency_seconds = 0.005
    keys = keys_of(GEOMETRY, 10)
    rig.save(keys)
    rig.reopen()
    assert rig.store.match(GEOMETRY, keys).num_chunks == 10


def test_a_closed_store_is_a_miss(rig: Rig) -> None:
    keys = keys_of(GEOMETRY, 2)
    rig.save(keys)
    rig.store.close()
    rig.store.close()
    assert rig.store.match(GEOMETRY, keys).num_chunks == 0
    assert rig.store.begin_load(GEOMETRY, keys, 0) is None
    assert rig.store.begin_store(GEOMETRY, keys_of(GEOMETRY, 2, 5), 0) is None
    rig.store.done(1, 0, True)
    assert rig.store.poll(1.0).ready == ()
    assert rig.store.stats()["leases"] == 0
    with pytest.raises(ConfigError, match="closed"):
        rig.store.register("late", 0, GEOMETRY)


def test_check_finds_a_header_that_is_not_what_the_index_says(rig: Rig) -> None:
    keys = keys_of(GEOMETRY, 1)
    rig.save(keys)
    job = rig.store.begin_load(GEOMETRY, keys, 0)
    assert job is not None
    slot = job.parts[0].slots[0]
    right = rig.arena.read_header(slot)
    assert right is not None
    rig.arena.write_header(slot, right._replace(key=b"x" * 32))
    with pytest.raises(InvariantError, match="the index says"):
        rig.store.check()
    rig.arena.write_header(slot, right)
    rig.store.done(job.job_id, 0, True)


def test_a_writer_killed_at_any_moment_leaves_slots_absent_or_whole(rig: Rig) -> None:
    """What the header says between any two of its writes, as a reader after a crash would find it."""
    keys = keys_of(GEOMETRY, 1)
    job = rig.store.begin_store(GEOMETRY, keys, 0)
    assert job is not None
    slot: Slot = job.parts[0].slots[0]
    header = rig.arena.read_header(slot)
    assert header is not None
    assert header.state != COMMITTED
    rig.fill(job, keys)
    committed = rig.arena.read_header(slot)
    assert committed == header._replace(state=COMMITTED)
    assert committed.key == keys[0]


def test_random_threads_over_a_disk_see_only_right_bytes(tmp_path: Path) -> None:
    """Engines of several threads on one small store with a small disk: whatever they load is what was stored."""
    options = StoreOptions(chunk_tokens=CHUNK_TOKENS, l1_size_gb=250_000 / 1e9, arena_dir=str(tmp_path / "arenas"))
    store = Store(options, tiers=[ByteTier(DiskStore(tmp_path / "parts", 300_000), Tier.DISK)])
    register(store, GEOMETRY)
    failures: list[BaseException] = []
    loads = [0] * 4

    def live(seed: int) -> None:
        try:
            for step in range(60):
                keys = keys_of(GEOMETRY, 1 + (seed + step) % 4, first_token=1000 + (seed * 31 + step * 17) % 9)
                hit = store.match(GEOMETRY, keys).num_chunks
                job = store.begin_load(GEOMETRY, keys[:hit], 0) if hit else None
                ready = job is not None and (job.ready or wait(job.job_id))
                if job is not None and ready:
                    assert_copied(store.mapping, job, keys)
                    loads[seed] += 1
                    store.done(job.job_id, 0, True)
                saved = store.begin_store(GEOMETRY, keys, 0)
                if saved is not None:
                    copy_in(store.mapping, saved, keys, 0)
                    store.done(saved.job_id, 0, True)
                if step % 10 == 0:
                    store.check()
        except BaseException as error:  # noqa: BLE001 the thread's boundary: the test fails below
            failures.append(error)

    answers: dict[int, bool] = {}
    answered = threading.Lock()

    def wait(job_id: int) -> bool:
        while True:
            with answered:
                if job_id in answers:
                    return answers.pop(job_id)
                result = store.poll(0.01)
                answers.update(dict.fromkeys(result.ready, True) | dict.fromkeys(result.failed, False))

    threads = [threading.Thread(target=live, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    assert all(loads)
    store.check()
    assert store.stats()["leases"] == 0
    assert store.stats()["promoted_bytes"] > 0
    store.close()
