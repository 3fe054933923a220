"""The store without engine and copies: keys and match of a prompt of 32,768 tokens, jobs a second, a hit on disk.

The disk hit is the smallest useful one: 7 chunks of 11.8 MB (SmolLM2 in float32), read from the page cache, verified,
into an arena that is claimed ahead, by a store that has just been opened.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from kvferry.blocks import Geometry, GroupKind, GroupSpec, Job, Tier
from kvferry.config import StoreOptions
from kvferry.store.base import Match
from kvferry.store.disk import DiskStore
from kvferry.store.keys import chunk_keys, root_key
from kvferry.store.store import Store
from kvferry.store.tier import ByteTier

NUM_TOKENS, CHUNK_TOKENS = 32_768, 256
KEYS_AND_MATCH_BAR_MS = 1.5
DISK_CHUNKS, DISK_PART_BYTES = 7, 11_796_480


def geometry(part_bytes: int) -> Geometry:
    """One group of full attention."""
    return Geometry("benchmark", "", CHUNK_TOKENS, 1, (GroupSpec(GroupKind.FULL, (0,), part_bytes),))


def milliseconds(work: Callable[[], object], num_rounds: int) -> list[float]:
    """How long each round took, after one that is not counted."""
    times = []
    for _ in range(num_rounds + 1):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return times[1:]


def measure_prompt(num_rounds: int) -> dict[str, list[float]]:
    """Milliseconds for all 128 chunks of a prompt, by what was done."""
    shape = geometry(65_536)
    root = root_key(shape)
    prompts = [[random.randrange(150_000) for _ in range(NUM_TOKENS)] for _ in range(8)]
    store = Store(StoreOptions(l1_size_gb=0.2))
    store.register("benchmark", 0, shape)
    turns = itertools.cycle(prompts)

    def keys() -> list[bytes]:
        return chunk_keys(root, next(turns), CHUNK_TOKENS)

    def keys_and_match() -> Match:
        return store.match(shape, keys())

    def keys_and_job(begin: Callable[[Geometry, list[bytes], int], Job | None]) -> None:
        job = begin(shape, keys(), 0)
        assert job is not None
        store.done(job.job_id, 0, True)

    times = {"keys": milliseconds(keys, num_rounds)}
    times["keys and match, nothing there"] = milliseconds(keys_and_match, num_rounds)
    times["keys, begin_store, done"] = milliseconds(lambda: keys_and_job(store.begin_store), len(prompts) - 1)
    assert keys_and_match().num_chunks == NUM_TOKENS // CHUNK_TOKENS
    times["keys and match, all there"] = milliseconds(keys_and_match, num_rounds)
    times["keys, begin_load, done"] = milliseconds(lambda: keys_and_job(store.begin_load), num_rounds)
    store.close()
    return times


def measure_disk(num_rounds: int) -> list[float]:
    """Milliseconds from the question to bytes that may be read, in a store that has just been opened."""
    shape = geometry(DISK_PART_BYTES)
    keys, times = chunk_keys(root_key(shape), range(DISK_CHUNKS * CHUNK_TOKENS), CHUNK_TOKENS), []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(num_rounds + 1):
            store = Store(StoreOptions(l1_size_gb=1.0), tiers=[ByteTier(DiskStore(folder, 10**9), Tier.DISK)])
            store.register("benchmark", 0, shape)
            time.sleep(0.3)  # For memory to be claimed ahead.
            start = time.perf_counter()
            hit = store.match(shape, keys).num_chunks
            job = store.begin_load(shape, keys, 0) if hit else store.begin_store(shape, keys, 0)
            assert job is not None
            if number:
                assert store.poll(5.0).ready == (job.job_id,)
                times.append((time.perf_counter() - start) * 1e3)
            store.done(job.job_id, 0, True)
            store.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    times = measure_prompt(arguments.rounds)
    times[f"disk hit of {DISK_CHUNKS * DISK_PART_BYTES // 10**6} MB"] = measure_disk(max(3, arguments.rounds // 30))
    figures = {name: {"p50_ms": np.median(of), "p99_ms": np.percentile(of, 99)} for name, of in times.items()}
    text = json.dumps({"figures": figures, "keys_and_match_bar_ms": KEYS_AND_MATCH_BAR_MS})
    print(text)
    if arguments.json:
        arguments.json.write_text(text)
    table = Table("", "p50 ms", "p99 ms", title=f"32,768 tokens (keys and match: bar {KEYS_AND_MATCH_BAR_MS} ms)")
    for name, figure in figures.items():
        table.add_row(name, f"{figure['p50_ms']:.2f}", f"{figure['p99_ms']:.2f}")
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
