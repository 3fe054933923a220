"""A server's arena after its owner was killed: what was committed is there again, and nothing else."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest

from kvferry.blocks import Geometry, Job, Part, Slot
from kvferry.config import StoreOptions
from kvferry.errors import ArenaError
from kvferry.store import arena as arena_module
from kvferry.store import index as index_module
from kvferry.store.arena import COMMITTED, Arena
from kvferry.store.index import EntryId
from kvferry.store.store import Store
from kvferry.testing.block_store import (
    CHUNK_TOKENS,
    assert_copied,
    bytes_of,
    copy_in,
    full_geometry,
    hybrid_geometry,
    keys_of,
    register,
)

RANKED = full_geometry(num_ranks=2)
HYBRID = hybrid_geometry(num_ranks=2)
Open = Callable[..., Store]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "arenas"


@pytest.fixture
def open_store(folder: Path) -> Iterator[Open]:
    """Servers' stores, one after another, on one folder."""
    opened: list[Store] = []

    def make(arena_bytes: int = 4_000_000, *, adopt: bool = True, **more: Any) -> Store:
        options = StoreOptions(chunk_tokens=CHUNK_TOKENS, l1_size_gb=arena_bytes / 1e9, arena_dir=str(folder), **more)
        opened.append(Store(options, adopt=adopt))
        for number, geometry in enumerate((RANKED, HYBRID)):
            register(opened[-1], geometry, engine=str(number))
        return opened[-1]

    yield make
    for store in opened:
        store.check()
        store.close()
    assert not list(folder.iterdir())


def save(store: Store, geometry: Geometry, keys: list[bytes]) -> Job:
    job = store.begin_store(geometry, keys, 0)
    assert job is not None
    for rank in range(geometry.num_ranks):
        copy_in(store.mapping, job, keys, rank)
        store.done(job.job_id, rank, True)
    return job


def load(store: Store, geometry: Geometry, keys: list[bytes]) -> None:
    job = store.begin_load(geometry, keys, 0)
    assert job is not None
    assert_copied(store.mapping, job, keys)
    for rank in range(geometry.num_ranks):
        store.done(job.job_id, rank, True)


def found_in(store: Store) -> set[EntryId]:
    """What is there, every byte of it being what its key says."""
    store.check()
    for entry in store._index:
        for rank, slot in enumerate(entry.slots):
            assert bytes(store.mapping.view(slot)) == bytes_of(entry.id[0], Part(0, entry.id[1], entry.slots), rank)
    return {entry.id for entry in store._index}


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_what_was_committed_is_there_after_a_restart(open_store: Open, policy: str) -> None:
    store = open_store(eviction_policy=policy)
    keys, hybrid = keys_of(RANKED, 5), keys_of(HYBRID, 3)
    save(store, RANKED, keys)
    save(store, HYBRID, hybrid)
    half = store.begin_store(RANKED, keys_of(RANKED, 2, first_token=7), 0)
    assert half is not None
    store.done(half.job_id, 0, True)
    before = {slot.generation for entry in store._index for slot in entry.slots}
    store.close(keep_arena=True)
    store = open_store(eviction_policy=policy)
    assert store.match(RANKED, keys).num_chunks == 5
    assert store.match(HYBRID, hybrid).num_chunks == 3
    assert store.match(RANKED, keys_of(RANKED, 2, first_token=7)).num_chunks == 0, "one rank had not stored it"
    load(store, RANKED, keys)
    load(store, HYBRID, hybrid)
    store.done(half.job_id, 1, True)
    assert store.stats()["unknown_jobs"] == 1, "jobs of the last boot mean nothing"
    job = save(store, RANKED, keys_of(RANKED, 2, first_token=7))
    assert min(slot.generation for part in job.parts for slot in part.slots) > max(before)


def test_the_oldest_leave_first_after_a_restart(open_store: Open) -> None:
    store = open_store(arena_bytes=300_000)
    for prompt in range(20):
        save(store, RANKED, keys_of(RANKED, 2, first_token=100 + prompt))
    store.close(keep_arena=True)
    store = open_store(arena_bytes=300_000)
    there = [store.match(RANKED, keys_of(RANKED, 2, first_token=100 + prompt)).num_chunks for prompt in range(20)]
    assert there == sorted(there)
    assert there[-4:] == [2] * 4
    for prompt in range(2):
        save(store, RANKED, keys_of(RANKED, 2, first_token=200 + prompt))
    assert store.match(RANKED, keys_of(RANKED, 2, first_token=119)).num_chunks == 2


def test_a_worker_of_the_last_boot_sees_that_it_is_over(open_store: Open) -> None:
    store = open_store()
    worker = Arena.attach(store.arena())
    save(store, RANKED, keys_of(RANKED, 1))
    job = store.begin_store(RANKED, keys_of(RANKED, 1, first_token=7), 0)
    assert job is not None
    assert worker.is_current()
    store.close(keep_arena=True)
    assert worker.is_current(), "nobody has taken over so far"
    store = open_store()
    assert not worker.is_current()
    assert worker.begin_writing([job.parts[0].slots[0]]) is None
    with pytest.raises(ArenaError, match="belongs to another store"):
        Arena.attach(worker.info)
    worker.close()


def test_a_living_server_keeps_its_arena(open_store: Open, folder: Path) -> None:
    store = open_store()
    save(store, RANKED, keys_of(RANKED, 3))
    with pytest.raises(ArenaError, match=r"another server owns .*server\.arena"):
        open_store()
    engine_s = open_store(adopt=False)
    assert len(list(folder.iterdir())) == 2, "a store inside an engine has a file of its own"
    engine_s.close()
    assert store.match(RANKED, keys_of(RANKED, 3)).num_chunks == 3


def test_a_store_inside_an_engine_leaves_a_dead_server_s_arena_alone(open_store: Open) -> None:
    store = open_store()
    save(store, RANKED, keys_of(RANKED, 3))
    store.close(keep_arena=True)
    open_store(adopt=False).close()
    assert open_store().match(RANKED, keys_of(RANKED, 3)).num_chunks == 3


@pytest.mark.parametrize("fault", ["another size", "torn superblock", "another format", "cut off", "empty"])
def test_an_arena_that_is_not_this_one_s_is_begun_anew(
    open_store: Open, folder: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    save(store, RANKED, keys_of(RANKED, 3))
    worker = Arena.attach(store.arena())
    store.close(keep_arena=True)
    file = folder / "server.arena"
    with file.open("r+b") as opened:
        if fault == "torn superblock":
            opened.write(b"kvfer\0\0\0" + bytes(40))
        elif fault == "another format":
            opened.seek(8)
            opened.write(b"\1")
        elif fault in {"cut off", "empty"}:
            file.write_bytes(file.read_bytes()[: 4096 if fault == "cut off" else 0])
    with caplog.at_level(logging.WARNING, "kvferry"):
        store = open_store(arena_bytes=3_000_000 if fault == "another size" else 4_000_000)
    assert ["begun anew" in record.message for record in caplog.records] == [True] * (fault != "empty")
    assert store.match(RANKED, keys_of(RANKED, 3)).num_chunks == 0
    save(store, RANKED, keys_of(RANKED, 3))
    worker.close()


WRITER = """
import sys, time, msgspec
from kvferry.blocks import Slot
from kvferry.store.arena import Arena
from kvferry.store.base import ArenaInfo
info, slots = msgspec.json.decode(sys.argv[1], type=tuple[ArenaInfo, list[Slot]])
writing = Arena.attach(info).begin_writing(slots)
print("writing" if writing else "not allowed", flush=True)
time.sleep(60)
"""


def test_slots_that_a_surviving_worker_reads_are_not_used(open_store: Open) -> None:
    store = open_store(arena_bytes=300_000)
    keys = keys_of(RANKED, 2, first_token=7)
    save(store, RANKED, keys)
    load = store.begin_load(RANKED, keys, 0)
    assert load is not None
    worker = Arena.attach(store.arena())
    slots = [slot for part in load.parts for slot in part.slots]
    reading = worker.begin_reading(slots)
    assert reading is not None
    store.close(keep_arena=True)
    store = open_store(arena_bytes=300_000)
    for prompt in range(20):
        saved = save(store, RANKED, keys_of(RANKED, 2, first_token=100 + prompt))
        assert not {slot.offset for part in saved.parts for slot in part.slots} & {slot.offset for slot in slots}
    store.check()
    reading.end()
    worker.close()
    store._reclaim_at = 0.0
    store.poll()
    assert store.stats()["slots_withdrawn"] == 0
    found_in(store)


def test_slots_that_a_surviving_worker_writes_to_are_not_used(open_store: Open) -> None:
    store = open_store(arena_bytes=300_000)
    keys = keys_of(RANKED, 2)
    job = store.begin_store(RANKED, keys, 0)
    withdrawn = store.begin_store(RANKED, keys_of(RANKED, 1, first_token=7), 0)
    assert job is not None
    assert withdrawn is not None
    slots = [part.slots[1] for part in (*job.parts, *withdrawn.parts)]
    argument = msgspec.json.encode((store.arena(), slots)).decode()
    process = subprocess.Popen([sys.executable, "-c", WRITER, argument], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout as said:
        try:
            assert said.readline() == "writing\n"
            store.cancel(withdrawn.job_id)
            store.close(keep_arena=True)
            store = open_store(arena_bytes=300_000)
            assert store.stats()["slots_withdrawn"] == 3
            for prompt in range(20):
                saved = save(store, RANKED, keys_of(RANKED, 2, first_token=100 + prompt))
                used = {slot.offset for part in saved.parts for slot in part.slots}
                assert not used & {slot.offset for slot in slots}
            store.check()
        finally:
            process.kill()
    store._reclaim_at = 0.0
    store.poll()
    assert store.stats()["slots_withdrawn"] == 0
    found_in(store)


def test_every_moment_of_a_life_can_be_the_last(
    open_store: Open, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The arena as it is after every line that could have changed it is taken over by another store."""
    monkeypatch.setattr(arena_module, "_LEAST_UNIT_BYTES", 1 << 12)
    arena_bytes = 10 * 8192 + 8192
    store = open_store(arena_bytes)
    file = folder / "server.arena"
    moments: list[tuple[bytes, int]] = []
    """What was in the arena, and during which step."""
    committed: list[set[EntryId]] = [set()]

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename in {arena_module.__file__, index_module.__file__}:
            now = file.read_bytes()
            if not moments or moments[-1][0] != now:
                moments.append((now, len(committed)))
            return trace
        return None

    small = full_geometry(num_ranks=2, part_bytes=640, identity="small")
    register(store, small, engine="small")
    for step, (geometry, num_chunks) in enumerate([(RANKED, 2), (small, 2), (RANKED, 2), (small, 1), (RANKED, 2)]):
        keys = keys_of(geometry, num_chunks, first_token=step)
        sys.settrace(trace)
        try:
            save(store, geometry, keys)
        finally:
            sys.settrace(None)
        committed.append(found_in(store))
    assert store.stats()["evicted_entries"] > 0
    store.close()
    assert len(moments) > 100
    for number, (content, step) in enumerate(moments):
        with file.open("wb") as opened:
            opened.write(content)
        store = open_store(arena_bytes)
        before, after = committed[step - 1], committed[step]
        assert before & after <= found_in(store) <= before | after, f"moment {number}"
        store.close()


def test_headers_of_random_bytes_are_never_followed(open_store: Open, folder: Path) -> None:
    """Whatever stands in table and headers: no exception, books that are right, and a store that works."""
    store = open_store(arena_bytes=600_000)
    for prompt in range(8):
        save(store, HYBRID, keys_of(HYBRID, 3, first_token=100 + prompt))
    unit_bytes = store.mapping.unit_bytes
    places = [range(4096, 4096 + 4 * store.mapping.num_units)]
    places += [range(start, start + 2048) for start in range(8192, 600_000 - unit_bytes, unit_bytes)]
    store.close(keep_arena=True)
    file = folder / "server.arena"
    sound = file.read_bytes()
    chance = random.Random(5)
    for _ in range(60):
        content = bytearray(sound)
        for _ in range(chance.choice([1, 10, 200])):
            at = chance.choice(chance.choice(places))
            content[at] = chance.choice([0, 1, 2, 255, chance.randrange(256)])
        with file.open("r+b") as opened:
            opened.write(content)
        store = open_store(arena_bytes=600_000)
        store.check()
        for prompt in range(3):
            save(store, RANKED, keys_of(RANKED, 2, first_token=500 + prompt))
            load(store, RANKED, keys_of(RANKED, 2, first_token=500 + prompt))
        store.check()
        store.close(keep_arena=True)
    open_store(arena_bytes=600_000)


def test_a_slot_that_lies_about_itself_is_free(open_store: Open) -> None:
    store = open_store()
    job = save(store, RANKED, keys_of(RANKED, 6))
    changes: list[dict[str, Any]] = [
        {"generation": 1 << 60},
        {"num_bytes": 4096},
        {"rank": 1},
        {"num_parts": 1},
        {"parent": b"x" * 32},
        {"key": keys_of(RANKED, 6)[0]},
    ]
    for part, change in zip(job.parts, changes, strict=True):
        slot: Slot = part.slots[0]
        header = store.mapping.read_header(slot)
        assert header is not None
        store.mapping.write_header(slot, header._replace(state=COMMITTED, **change))
    store.close(keep_arena=True)
    store = open_store()
    assert len(store._index) == 0
    store.check()


@pytest.mark.parametrize(("arena_bytes", "num_kills"), [(8_000_000, 25), (100_000, 30)])
def test_a_server_is_killed_again_and_again(folder: Path, arena_bytes: int, num_kills: int) -> None:
    """With room for all that is ever stored, and with so little that something is evicted all the time."""
    script = Path(__file__).with_name("killed_store.py")
    arguments = [str(folder), str(arena_bytes), str(num_kills), "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    num_found, num_told = map(int, ended.stdout.split())
    assert min(num_found, num_told) > num_kills
    assert not list(folder.iterdir())
