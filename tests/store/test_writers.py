"""Locks that tell who still copies: within a process, between processes, and of a process that is stopped or killed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.blocks import Slot
from kvferry.config import StoreOptions
from kvferry.errors import ArenaError
from kvferry.store.arena import Arena
from kvferry.store.locks import Range, joined, lock_ranges, locked_range
from kvferry.store.store import Store
from kvferry.testing.block_store import (
    CHUNK_TOKENS,
    assert_copied,
    bytes_of,
    copy_in,
    full_geometry,
    keys_of,
    register,
)

GEOMETRY = full_geometry()

WRITER = """
import sys, time, msgspec
from kvferry.blocks import Slot
from kvferry.store.arena import Arena
from kvferry.store.base import ArenaInfo
info, slots = msgspec.json.decode(sys.argv[1], type=tuple[ArenaInfo, list[Slot]])
arena = Arena.attach(info)
writing = arena.begin_writing(slots)
print("writing" if writing else "not allowed", flush=True)
while True:
    for slot in slots:
        arena.view(slot)[:] = b"x" * slot.num_bytes
    time.sleep(0.001)
"""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    options = StoreOptions(chunk_tokens=CHUNK_TOKENS, l1_size_gb=200_000 / 1e9, arena_dir=str(tmp_path / "arenas"))
    store = Store(options, clock=clock)
    register(store, GEOMETRY)
    yield store
    store.check()
    store.close()


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT) is not None


def test_slots_of_a_stopped_writer_are_not_used_and_those_of_a_killed_one_are(store: Store, clock: Clock) -> None:
    late = store.begin_store(GEOMETRY, keys_of(GEOMETRY, 4, first_token=7), 0, owner="engine")
    assert late is not None
    slots = [part.slots[0] for part in late.parts]
    argument = msgspec.json.encode((store.arena(), slots)).decode()
    process = subprocess.Popen([sys.executable, "-c", WRITER, argument], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout as said:
        try:
            assert said.readline() == "writing\n"
            store.release("engine")
            assert store.stats()["slots_withdrawn"] == 4, "it was believed dead, and still writes"
            process.send_signal(signal.SIGSTOP)
            wait_until_stopped(process)
            seen = set()
            for prompt in range(20):
                clock.now += 1
                keys = keys_of(GEOMETRY, 4, first_token=100 + prompt)
                job = store.begin_store(GEOMETRY, keys, 0)
                assert job is not None
                seen |= {part.slots[0].offset for part in job.parts}
                copy_in(store.mapping, job, keys, 0)
                store.done(job.job_id, 0, True)
                process.send_signal(signal.SIGCONT if prompt % 2 else signal.SIGSTOP)
                load = store.begin_load(GEOMETRY, keys, 0)
                assert load is not None
                assert_copied(store.mapping, load, keys)
                store.done(load.job_id, 0, True)
            store.check()
            assert store.stats()["evicted_entries"] > 0
            assert not seen & {slot.offset for slot in slots}
            assert store.stats()["slots_withdrawn"] == 4
            process.send_signal(signal.SIGSTOP)
        finally:
            process.kill()
    clock.now += 1
    store.poll()
    assert store.stats()["slots_withdrawn"] == 0
    for prompt in range(20):
        job = store.begin_store(GEOMETRY, keys_of(GEOMETRY, 4, first_token=200 + prompt), 0)
        assert job is not None
        seen |= {part.slots[0].offset for part in job.parts}
        store.done(job.job_id, 0, True)
    assert seen >= {slot.offset for slot in slots}


def test_writers_of_one_process_exclude_each_other(store: Store) -> None:
    job = store.begin_store(GEOMETRY, keys_of(GEOMETRY, 3), 0)
    assert job is not None
    slots = [part.slots[0] for part in job.parts]
    attached = Arena.attach(store.arena())
    first = store.mapping.begin_writing(slots[:2])
    assert first is not None
    assert store.mapping.begin_writing(slots) is None
    assert attached.begin_writing(slots[1:]) is None
    last = attached.begin_writing(slots[2:])
    assert last is not None
    assert [store.mapping.is_locked(slot) for slot in slots] == [True] * 3
    first.end()
    assert [attached.is_locked(slot) for slot in slots] == [False, False, True]
    last.end()
    attached.close()
    store.cancel(job.job_id)


def save(store: Store, first_token: int) -> set[int]:
    """Four chunks, unless somebody is in the way. The offsets of what was written."""
    keys = keys_of(GEOMETRY, 4, first_token=first_token)
    job = store.begin_store(GEOMETRY, keys, 0)
    if job is None:
        return set()
    slots = [part.slots[0] for part in job.parts]
    writing = store.mapping.begin_writing(slots)
    if writing is not None:
        writing.end()
        copy_in(store.mapping, job, keys, 0)
    store.done(job.job_id, 0, writing is not None)
    return {slot.offset for slot in slots} if writing is not None else set()


@pytest.mark.parametrize("begins", ["before the lease lapses", "after the lease lapsed"])
def test_nobody_writes_where_a_reader_is_that_outlives_its_lease(store: Store, clock: Clock, begins: str) -> None:
    keys = keys_of(GEOMETRY, 4, first_token=7)
    save(store, 7)
    load = store.begin_load(GEOMETRY, keys, 0)
    assert load is not None
    slots = [part.slots[0] for part in load.parts]
    if begins == "after the lease lapsed":
        clock.now += 1e6
        store.poll()
    reading = store.mapping.begin_reading(slots)
    others = store.mapping.begin_reading(slots)
    assert reading is not None
    assert others is not None, "readers share"
    assert store.mapping.begin_writing(slots) is None
    others.end()
    clock.now += 1e6
    written = set()
    for prompt in range(40):
        clock.now += 1
        written |= save(store, 100 + prompt)
        store.check()
    assert store.stats()["evicted_entries"] > 0
    assert written
    assert not written & {slot.offset for slot in slots}
    for part in load.parts:
        assert bytes(store.mapping.view(part.slots[0])) == bytes_of(keys[part.chunk], part, 0)
    reading.end()
    for prompt in range(40):
        clock.now += 1
        written |= save(store, 200 + prompt)
    assert written >= {slot.offset for slot in slots}
    assert store.mapping.begin_reading(slots) is None


def test_a_slot_that_keeps_another_part_is_not_written(store: Store) -> None:
    job = store.begin_store(GEOMETRY, keys_of(GEOMETRY, 1), 0)
    assert job is not None
    slot = job.parts[0].slots[0]
    assert store.mapping.begin_writing([slot, Slot(slot.offset, slot.num_bytes, slot.generation + 1)]) is None
    assert not store.mapping.is_locked(slot), "what was refused holds no lock"
    store.cancel(job.job_id)
    assert store.mapping.begin_writing([slot]) is None


def test_an_arena_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /proc is not mounted: nothing could ever be stored."""
    monkeypatch.setattr("kvferry.store.arena.lock_ranges", lambda *_, **__: None)
    with pytest.raises(ArenaError, match="gives no locks"):
        Arena.create(1 << 20, str(tmp_path / "arenas"))
    assert not list((tmp_path / "arenas").iterdir())


RANGES = st.lists(st.builds(lambda start, size: (start, start + size), st.integers(0, 60), st.integers(1, 9)))


@given(RANGES)
def test_ranges_are_joined(ranges: list[Range]) -> None:
    found = joined(ranges)
    assert {at for start, end in found for at in range(start, end)} == {
        at for start, end in ranges for at in range(start, end)
    }
    assert all(left[1] < right[0] for left, right in itertools.pairwise(found))


@given(ranges=RANGES, at=st.integers(0, 70))
def test_a_lock_is_seen_where_it_is_and_nowhere_else(ranges: list[Range], at: int) -> None:
    fd = os.memfd_create("locks")
    writer = lock_ranges(fd, ranges)
    assert writer is not None
    seen = locked_range(fd, (at, at + 1))
    assert (seen is not None) == any(start <= at < end for start, end in ranges)
    assert seen is None or seen in joined(ranges)
    os.close(writer)
    assert locked_range(fd, (0, 100)) is None
    os.close(fd)
