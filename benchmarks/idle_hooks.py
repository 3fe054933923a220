"""What a connector whose hooks do nothing costs a decode step, for one request and for a batch of 16.

Two engines of one model in one process, asked in turn; what counts is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, SamplingParams
from kvferry.cli.demo import DEFAULT_MODEL
from kvferry.connector.api import KvCacheConnectorScheduler, KvCacheConnectorWorker

MOST_COST = 0.01
NUM_STEPS = 32
PROMPT = list(range(1000, 1064))


class IdleScheduler(KvCacheConnectorScheduler):
    def build_connector_meta(self, scheduler_output: Any) -> None: ...
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        return False

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None: ...


class IdleWorker(KvCacheConnectorWorker):
    def register_kv_caches(self, kv_cache_tensor: Any) -> None: ...
    def start_load_kv(self, stream: Any) -> None: ...
    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None: ...
    def save_kv_layer(self, layer_idx: int, stream: Any) -> None: ...
    def wait_for_save(self, stream: Any) -> None: ...
    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        return [], []


def open_engine(model: str, connector: KvCacheConnectorConfig | None) -> LLM:
    cache = KvCacheConfig(max_tokens=4096, enable_block_reuse=False)
    return LLM(model, kv_cache_config=cache, kv_connector_config=connector, max_batch_size=16)


def step_seconds(llm: LLM, batch_size: int) -> float:
    """Of the decode steps between the second token and the last."""
    params = SamplingParams(max_tokens=NUM_STEPS + 2, ignore_eos=True)
    *others, last = [llm.generate_async(PROMPT, params) for _ in range(batch_size)]
    while len(last.output.token_ids) < 2:
        time.sleep(0.0005)
    start, num_start = time.perf_counter(), len(last.output.token_ids)
    last.result()
    seconds = time.perf_counter() - start
    for handle in others:
        handle.result()
    return seconds / (NUM_STEPS + 2 - num_start)


def measure(model: str, num_rounds: int) -> dict[int, list[float]]:
    """By batch size, each round's seconds a step with idle hooks over those without a connector."""
    idle = KvCacheConnectorConfig(
        connector_module=__name__, connector_scheduler_class="IdleScheduler", connector_worker_class="IdleWorker"
    )
    ratios: dict[int, list[float]] = {1: [], 16: []}
    with open_engine(model, None) as plain, open_engine(model, idle) as hooked:
        for number in range(num_rounds):
            for batch_size, of_size in ratios.items():
                in_turn = (plain, hooked) if number % 2 else (hooked, plain)
                seconds = {llm: step_seconds(llm, batch_size) for llm in in_turn}
                of_size.append(seconds[hooked] / seconds[plain])
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    ratios = measure(arguments.model, arguments.rounds)
    result = json.dumps({"ratios": ratios})
    print(result)
    if arguments.json:
        arguments.json.write_text(result + "\n", encoding="utf-8")
    costs = {batch_size: statistics.median(of_size) - 1 for batch_size, of_size in ratios.items()}
    for batch_size, cost in costs.items():
        print(f"batch of {batch_size}: idle hooks cost {cost:.2%} of a decode step (bar {MOST_COST:.0%})")
    return 0 if max(costs.values()) <= MOST_COST else 1


if __name__ == "__main__":
    raise SystemExit(main())
