"""The store without engine and copies: keys and match of a prompt of 32,768 tokens, jobs a second, a hit on disk.

The disk hit is the smallest useful one: 7 chunks of 11.8 MB (SmolLM2 in float32), read from the page cache, verified,
into an arena that is claimed ahead. Each of its rounds opens the folder anew, as a new process would.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from kvferry.blocks import Geometry, GroupKind, GroupSpec, Tier
from kvferry.config import StoreOptions
from kvferry.store.base import Match
from kvferry.store.disk import DiskStore
from kvferry.store.keys import chunk_keys, root_key
from kvferry.store.store import Store
from kvferry.store.tier import ByteTier

NUM_TOKENS, CHUNK_TOKENS = 32_768, 256
KEYS_AND_MATCH_BAR_MS = 1.5
DISK_CHUNKS, DISK_PART_BYTES = 7, 11_796_480
CLAIM_AHEAD_SECONDS = 0.3


def geometry(part_bytes: int) -> Geometry:
    return Geometry("benchmark", "", CHUNK_TOKENS, 1, (GroupSpec(GroupKind.FULL, (0,), part_bytes),))


def milliseconds(work: Callable[[], object], num_rounds: int) -> list[float]:
    """How long each round took, after one that is not counted."""
    work()
    times = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def measure_prompt(num_rounds: int) -> dict[str, list[float]]:
    """Milliseconds for all 128 chunks of a prompt, by what was done."""
    shape = geometry(65_536)
    root = root_key(shape)
    prompts = [[random.randrange(150_000) for _ in range(NUM_TOKENS)] for _ in range(8)]
    store = Store(StoreOptions(l1_size_gb=0.2))
    store.register("benchmark", 0, shape)
    rounds = iter(range(10**9))

    def keys() -> list[bytes]:
        return chunk_keys(root, prompts[next(rounds) % len(prompts)], CHUNK_TOKENS)

    def keys_and_match() -> Match:
        return store.match(shape, keys())

    def save() -> None:
        job = store.begin_store(shape, keys(), 0)
        if job is not None:
            store.done(job.job_id, 0, True)

    def load() -> None:
        job = store.begin_load(shape, keys(), 0)
        assert job is not None
        store.done(job.job_id, 0, True)

    misses = milliseconds(keys_and_match, num_rounds)
    saves = milliseconds(save, len(prompts) - 1)
    assert keys_and_match().num_chunks == NUM_TOKENS // CHUNK_TOKENS
    times = {
        "keys": milliseconds(keys, num_rounds),
        "keys and match, nothing there": misses,
        "keys and match, all there": milliseconds(keys_and_match, num_rounds),
        "keys, begin_store, done": saves,
        "keys, begin_load, done": milliseconds(load, num_rounds),
    }
    store.close()
    return times


def measure_disk(num_rounds: int) -> list[float]:
    """Milliseconds from the question to bytes that may be read, in a store that has just been opened."""
    shape = geometry(DISK_PART_BYTES)
    keys = chunk_keys(root_key(shape), range(DISK_CHUNKS * CHUNK_TOKENS), CHUNK_TOKENS)
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num_rounds + 1):
            store = Store(StoreOptions(l1_size_gb=1.0), tiers=[ByteTier(DiskStore(Path(folder), 10**9), Tier.DISK)])
            store.register("benchmark", 0, shape)
            time.sleep(CLAIM_AHEAD_SECONDS)
            start = time.perf_counter()
            hit = store.match(shape, keys).num_chunks
            job = store.begin_load(shape, keys, 0) if hit else store.begin_store(shape, keys, 0)
            assert job is not None
            if number:
                assert store.poll(5.0).ready == (job.job_id,)
                times.append((time.perf_counter() - start) * 1e3)
            else:
                for part in job.parts:
                    store.mapping.view(part.slots[0])[:] = np.random.default_rng(part.chunk).bytes(DISK_PART_BYTES)
            store.done(job.job_id, 0, True)
            store.close()
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    times = measure_prompt(arguments.rounds)
    times[f"disk hit of {DISK_CHUNKS * DISK_PART_BYTES // 10**6} MB"] = measure_disk(max(3, arguments.rounds // 30))
    figures = {name: {"p50_ms": np.median(of), "p99_ms": np.percentile(of, 99)} for name, of in times.items()}
    table = Table("32,768 tokens, 128 chunks", "p50 ms", "p99 ms", title="store")
    for name, figure in figures.items():
        table.add_row(name, f"{figure['p50_ms']:.2f}", f"{figure['p99_ms']:.2f}")
    Console(stderr=True).print(table)
    met = figures["keys and match, all there"]["p50_ms"] <= KEYS_AND_MATCH_BAR_MS
    text = json.dumps({"figures": figures, "bar_ms": KEYS_AND_MATCH_BAR_MS, "bar_met": bool(met)}, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
