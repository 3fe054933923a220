"""Matches by a cache server, alone and under load, against those of a store inside the engine.

In one run, interleaved. A match includes the keys of its tokens, hashed anew each time. The load is 8 processes that
each ask for matches of 2,048 tokens as fast as they are answered; on a small machine all share its cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from kvferry.blocks import Geometry, GroupKind, GroupSpec
from kvferry.config import StoreOptions
from kvferry.server.client import StoreClient
from kvferry.store.base import BlockStore
from kvferry.store.keys import chunk_keys, root_key
from kvferry.store.store import Store
from kvferry.testing.servers import ServerProcess

CHUNK_TOKENS, LONG_TOKENS, SHORT_TOKENS, NUM_CLIENTS = 256, 32_768, 2_048, 8
MATCHES = ("embedded", "served", "under load")
BARS = {"served / embedded": 2.5, "served p50, ms": 3.0, "under load p99, ms": 10.0, "matches a second": 5_000.0}
GEOMETRY = Geometry("benchmark", "", CHUNK_TOKENS, 1, (GroupSpec(GroupKind.FULL, (0,), 65_536),))
PATIENT = StoreOptions(l1_size_gb=0.2, match_deadline_seconds=10.0, job_deadline_seconds=10.0)
"""What is measured is the time that an answer takes, also past the deadlines of engines."""
ROOT = root_key(GEOMETRY)


def match(store: BlockStore, tokens: list[int]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    num_chunks = store.match(GEOMETRY, chunk_keys(ROOT, tokens, CHUNK_TOKENS)).num_chunks
    assert num_chunks == len(tokens) // CHUNK_TOKENS
    return (time.perf_counter() - start) * 1e3


def save(store: BlockStore, prompts: list[list[int]]) -> None:
    """Let the store have these prompts, with whatever bytes its memory holds."""
    store.register("benchmark", 0, GEOMETRY)
    for tokens in prompts:
        job = store.begin_store(GEOMETRY, chunk_keys(ROOT, tokens, CHUNK_TOKENS), 0)
        assert job is not None
        store.done(job.job_id, 0, True)
        match(store, tokens)


def load(url: str, seconds: float) -> None:
    """One of the clients that load a server: prints how many matches it had."""
    client = StoreClient(url, PATIENT)
    tokens = [random.randrange(150_000) for _ in range(SHORT_TOKENS)]
    save(client, [tokens])
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + seconds
    print(sum(1 for _ in iter(lambda: time.monotonic() < end and match(client, tokens), False)))
    client.close()


def measure(server: ServerProcess, num_rounds: int, load_seconds: float) -> dict[str, list[float]]:
    """Milliseconds by what was measured, and matches a second."""
    prompts = [[random.randrange(150_000) for _ in range(LONG_TOKENS)] for _ in range(4)]
    embedded, client = Store(PATIENT), StoreClient(server.url, PATIENT)
    save(embedded, prompts)
    save(client, prompts)
    times: dict[str, list[float]] = {name: [] for name in MATCHES}
    turns = itertools.cycle(prompts)
    for tokens in itertools.islice(turns, num_rounds):
        times["embedded"].append(match(embedded, tokens))
        times["served"].append(match(client, tokens))
    command = [sys.executable, __file__, "--load", server.url, str(load_seconds)]
    clients = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(NUM_CLIENTS)]
    assert [loading.stdout.readline() for loading in clients] == [b"ready\n"] * NUM_CLIENTS
    for loading in clients:
        loading.stdin.write(b"go\n")
        loading.stdin.flush()
    end = time.monotonic() + load_seconds - 0.2
    while time.monotonic() < end:
        times["under load"].append(match(client, next(turns)))
        time.sleep(0.01)
    times["matches a second"] = [sum(int(loading.communicate()[0]) for loading in clients) / load_seconds]
    client.close()
    embedded.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--load-seconds", type=float, default=5.0)
    parser.add_argument("--json", type=argparse.FileType("w"))
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="kvferry-bench-", dir="/dev/shm") as folder,
        ServerProcess(Path(folder), "--l1-size-gb", "1.0") as server,
    ):
        times = measure(server, arguments.rounds, arguments.load_seconds)
    figures = {f"{name} p{part}, ms": np.percentile(times[name], part) for name in MATCHES for part in (50, 99)}
    figures["served / embedded"] = figures["served p50, ms"] / figures["embedded p50, ms"]
    figures["matches a second"] = times["matches a second"][0]
    for file in filter(None, (sys.stdout, arguments.json)):
        print(json.dumps({"figures": figures, "bars": BARS}), file=file)
    table = Table("", "measured", "bar", title=f"matches of {LONG_TOKENS:,} tokens; {NUM_CLIENTS} clients as load")
    for name, figure in figures.items():
        table.add_row(name, f"{figure:,.2f}", str(BARS.get(name, "")))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    load(sys.argv[2], float(sys.argv[3])) if sys.argv[1:2] == ["--load"] else main()
