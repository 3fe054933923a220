"""A server killed at random moments of a random life, again and again, each taking over what the last one left.

    python killed_store.py FOLDER ARENA_BYTES NUM_KILLS SEED

Runs by itself: each life is a fork of this process, which has no other thread while it forks. After each kill, what the
next owner finds must be entries whose bytes are what their keys say, among them all that the dead one had reported as
committed, unless it could evict. Prints how many it found over all lives.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

from kvferry.blocks import Geometry, GroupKind, GroupSpec, Job, Part
from kvferry.config import StoreOptions
from kvferry.store.index import EntryId, EntryState
from kvferry.store.store import Store
from kvferry.testing.block_store import CHUNK_TOKENS, bytes_of, copy_in, keys_of, register

GEOMETRY = Geometry(
    "hybrid",
    "layout",
    CHUNK_TOKENS,
    2,
    (
        GroupSpec(GroupKind.FULL, (0,), 1024),
        GroupSpec(GroupKind.WINDOW, (1,), 640, window_tokens=2 * CHUNK_TOKENS),
        GroupSpec(GroupKind.STATE, (2,), 64),
    ),
)
LONGEST_LIFE_SECONDS = 0.03
RECORD_BYTES = 33


def open_store(folder: str, arena_bytes: int) -> Store:
    options = StoreOptions(chunk_tokens=CHUNK_TOKENS, l1_size_gb=arena_bytes / 1e9, arena_dir=folder)
    store = Store(options, adopt=True)
    register(store, GEOMETRY)
    return store


def live(store: Store, report: int, chance: random.Random, prompts: range) -> None:
    """Until killed. Reports (key, group) of what was committed."""
    hanging = 0
    while True:
        keys = keys_of(GEOMETRY, chance.randint(1, 4), first_token=chance.choice(prompts))
        if hit := store.match(GEOMETRY, keys).num_chunks:
            load = store.begin_load(GEOMETRY, keys[:hit], 0)
            end(store, load, chance)
        job = store.begin_store(GEOMETRY, keys, 0)
        if job is None:
            continue
        fate = chance.choice(["commit", "commit", "commit", "commit", "cancel", "fail", "hang"])
        copy_in(store.mapping, job, keys, 0)
        if fate == "cancel":
            store.cancel(job.job_id)
        elif fate == "fail":
            end(store, job, chance, ok=False)
        elif fate == "commit":
            copy_in(store.mapping, job, keys, 1)
            end(store, job, chance)
            os.write(report, b"".join(keys[part.chunk] + bytes([part.group]) for part in job.parts))
        elif hanging < 3:
            hanging += 1
        else:
            store.cancel(job.job_id)


def end(store: Store, job: Job | None, chance: random.Random, *, ok: bool = True) -> None:
    if job is not None:
        for rank in chance.sample([0, 1], 2):
            store.done(job.job_id, rank, ok)


def kill_one(folder: str, arena_bytes: int, chance: random.Random, prompts: range) -> set[EntryId]:
    """One life; what it reported."""
    receive, report = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        os.write(report, bytes(RECORD_BYTES))
        live(open_store(folder, arena_bytes), report, chance, prompts)
    os.close(report)
    told = os.read(receive, 1 << 16)  # It lives, and may be killed while it takes over as well.
    if chance.random() < 0.7:
        told += os.read(receive, 1 << 16)
    time.sleep(chance.random() * LONGEST_LIFE_SECONDS)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while piece := os.read(receive, 1 << 16):
        told += piece
    os.close(receive)
    records = range(RECORD_BYTES, len(told) - RECORD_BYTES + 1, RECORD_BYTES)
    return {(told[at : at + 32], told[at + 32]) for at in records}


def main() -> None:
    folder, arena_bytes, num_kills, seed = sys.argv[1], *map(int, sys.argv[2:])
    told: set[EntryId] = set()
    num_found = 0
    evicts = arena_bytes < 1_000_000
    for life in range(num_kills):
        prompts = range(1000, 1012) if evicts else range(1000 + 10 * life, 1010 + 10 * life)
        told |= kill_one(folder, arena_bytes, random.Random(seed * 1000 + life), prompts)
        store = open_store(folder, arena_bytes)
        store.check()
        found = set()
        for entry in store._index:
            assert entry.state is EntryState.COMMITTED
            part = Part(0, entry.id[1], entry.slots)
            for rank, slot in enumerate(entry.slots):
                assert bytes(store.mapping.view(slot)) == bytes_of(entry.id[0], part, rank), f"life {life}"
            found.add(entry.id)
        assert evicts or told <= found, f"{len(told - found)} committed parts are gone after life {life}"
        num_found += len(found)
        store.close(keep_arena=life < num_kills - 1)
    assert num_found > 0
    print(num_found, len(told))


if __name__ == "__main__":
    main()
