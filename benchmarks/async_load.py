"""What a batch of 16 requests that decode loses while one more loads its KV from a slow disk.

One batch decodes throughout. Each round times its steps during a load and beside it, before and after in turn; reading
each part from disk takes 200 ms longer than it does. What counts is the median step of all rounds.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
import threading
import time
from typing import Any

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, SamplingParams
from kvferry.cli.demo import DEFAULT_MODEL
from kvferry.offload import embedded
from kvferry.store.disk import DiskStore
from kvferry.testing.faults import FaultyByteStore

BATCH, LOAD_TOKENS, LATENCY_SECONDS = 16, 1025, 0.2
MOST_LOST = 0.03
BLOCK, CHUNK = 32, 64
PARAMS = SamplingParams(max_tokens=900, ignore_eos=True)
ALONE_SECONDS = LOAD_TOKENS // CHUNK / 2 * LATENCY_SECONDS  # as long as a load, which two threads read


class Counter:
    """Notes when one request of a batch grew: a step is one token for each."""

    def __init__(self, handle: Any) -> None:
        self._stamps: list[tuple[float, int]] = []
        self.thread = threading.Thread(target=self._note, args=(handle,))
        self.thread.start()

    def _note(self, handle: Any) -> None:
        for output in handle:
            self._stamps.append((time.perf_counter(), len(output.token_ids)))

    def steps(self, start: float, end: float) -> list[float]:
        """Seconds of the steps that fall into this time."""
        within = [stamp for stamp in self._stamps if start <= stamp[0] <= end]
        return [(later - earlier) / (more - less) for (earlier, less), (later, more) in itertools.pairwise(within)]

    def steps_of(self, seconds: float) -> list[float]:
        """The same for the coming time."""
        start = time.perf_counter()
        time.sleep(seconds)
        return self.steps(start, start + seconds)


def document(number: int) -> list[int]:
    return random.Random(number).choices(range(1000, 30_000), k=LOAD_TOKENS)


def open_engine(model: str, connector: KvCacheConnectorConfig) -> LLM:
    cache = KvCacheConfig(tokens_per_block=BLOCK, max_tokens=20_000, enable_block_reuse=False)
    return LLM(model, kv_cache_config=cache, kv_connector_config=connector, max_batch_size=BATCH + 1)


def wait_for_transfers(llm: LLM, number: int) -> float:
    assert llm.connector_manager is not None
    while llm.connector_manager.num_in_flight != number:
        time.sleep(0.002)
    return time.perf_counter()


def measure(model: str, disk: str, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of the steps while a load is under way, and without."""
    options = {"chunk_tokens": CHUNK, "l1_size_gb": 2.0, "disk_path": disk, "load_deadline_seconds": 30.0}
    connector = KvCacheConnectorConfig(connector="kvferry", options=options)
    with open_engine(model, connector) as llm:
        for number in range(num_rounds):
            llm.generate(document(number), SamplingParams(max_tokens=1))
    backends: list[FaultyByteStore] = []

    def slow_disk(folder: str, num_bytes: int) -> FaultyByteStore:
        backends.append(FaultyByteStore(DiskStore(folder, num_bytes)))
        return backends[-1]

    setattr(embedded, "DiskStore", slow_disk)  # noqa: B010 - in the place of a class
    steps: dict[str, list[float]] = {"loading": [], "alone": []}
    with open_engine(model, connector) as llm:
        backends[-1].latency_seconds = LATENCY_SECONDS
        batch = [llm.generate_async(document(number)[:64], PARAMS) for number in range(1000, 1000 + BATCH)]
        counter = Counter(batch[0])
        counter.steps_of(5.0)
        for number in range(num_rounds):
            steps["alone"] += counter.steps_of(ALONE_SECONDS if number % 2 else 0.0)
            load = llm.generate_async(document(number), SamplingParams(max_tokens=1))
            start = wait_for_transfers(llm, 1)
            steps["loading"] += counter.steps(start, wait_for_transfers(llm, 0))
            assert load.result().metrics.num_connector_tokens == LOAD_TOKENS - 1
            wait_for_transfers(llm, 0)
            steps["alone"] += counter.steps_of(0.0 if number % 2 else ALONE_SECONDS)
        for handle in batch:
            handle.abort()
        counter.thread.join()
    return steps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvferry-async-") as disk:
        steps = measure(arguments.model, disk, arguments.rounds)
    medians = {name: statistics.median(of_name) for name, of_name in steps.items()}
    lost = 1 - medians["alone"] / medians["loading"]
    print(f"median seconds of {len(steps['loading'])} and {len(steps['alone'])} steps: {medians}")
    print(f"token rate lost while a request loads: {lost:.1%} (bar {MOST_LOST:.0%})")
    return 0 if lost <= MOST_LOST else 1


if __name__ == "__main__":
    raise SystemExit(main())
