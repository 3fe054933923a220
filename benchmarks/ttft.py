"""Time to first token of a prompt of 1,800 tokens: transformers alone, the engine cold, and each place that keeps KV.

All in one run, interleaved, medians; a ratio is the median of the rounds' ratios. Every round uses another prompt, so
its first time is cold. Hits in memory and on disk are the previous round's prompt, which this round's pushed out of a
pool that holds one. A new process reads the disk each time; its files are in the page cache, as after a restart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from kvferry import LLM
from kvferry.cli.demo import DEFAULT_MODEL
from kvferry.cli.demo.document import document
from kvferry.cli.demo.steps import Question, Setting, ask, ask_in_new_process, open_engine
from kvferry.engine.model import find_model

NUM_PROMPT_TOKENS = 1800
POOL_TOKENS = 1824
BARS = {
    ("cold", "transformers"): 1.10,
    ("cold with kvferry", "cold"): 1.03,
    ("memory hit", "pool hit"): 1.30,
    ("disk hit, new process", "pool hit"): 1.60,
}


def prefill_seconds(model: Any, token_ids: list[int]) -> float:
    """transformers' own prefill, up to the logits of the first new token."""
    ids = torch.tensor([token_ids], device=model.device)
    start = time.perf_counter()
    with torch.inference_mode():
        model(ids, use_cache=True, logits_to_keep=1).logits.argmax().item()
    return time.perf_counter() - start


def ttft(llm: LLM, token_ids: list[int], num_pool: int = 0, num_memory: int = 0) -> float:
    """Seconds; asserts that the prompt's KV came from where it should."""
    answer = ask(llm, token_ids, num_tokens=1)
    assert (answer.num_pool_tokens, answer.num_memory_tokens, answer.num_disk_tokens) == (num_pool, num_memory, 0)
    return answer.ttft_seconds


def measure(setting: Setting, num_rounds: int) -> dict[str, list[float]]:
    """Seconds by what was measured, one a round."""
    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = find_model(setting.model)
    model = AutoModelForCausalLM.from_pretrained(source.name_or_path, dtype=torch.float32, **source.options)
    model.eval().to(device)
    seconds: dict[str, list[float]] = {"transformers": [], "cold": [], "cold with kvferry": []}
    seconds |= {"pool hit": [], "memory hit": [], "disk hit, new process": []}
    num_hit = setting.num_chunks * setting.chunk_tokens
    with open_engine(setting, with_kvferry=False) as plain, open_engine(setting) as ferry:
        tokens = plain.tokenizer.encode(document())
        prompts = [tokens[i * 97 : i * 97 + NUM_PROMPT_TOKENS] for i in range(num_rounds + 1)]
        prefill_seconds(model, prompts[0])
        ttft(plain, prompts[0])
        ttft(ferry, prompts[0])
        for previous, prompt in itertools.pairwise(prompts):
            seconds["transformers"].append(prefill_seconds(model, prompt))
            seconds["cold"].append(ttft(plain, prompt))
            seconds["cold with kvferry"].append(ttft(ferry, prompt))
            seconds["pool hit"].append(ttft(ferry, prompt, num_pool=num_hit))
            seconds["memory hit"].append(ttft(ferry, previous, num_memory=num_hit))
            answer = ask_in_new_process(Question(setting, previous))
            assert answer.num_disk_tokens == num_hit
            seconds["disk hit, new process"].append(answer.ttft_seconds)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvferry-ttft-") as disk_path:
        setting = Setting(
            arguments.model, disk_path, pool_tokens=POOL_TOKENS, num_generated_tokens=1, arena_gb=2.0, disk_gb=4.0
        )
        seconds = measure(setting, arguments.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        f"{name} / {base}": statistics.median(map(operator.truediv, seconds[name], seconds[base]))
        for name, base in BARS
    }
    result = {"num_prompt_tokens": NUM_PROMPT_TOKENS, "seconds": seconds, "median_seconds": medians, "ratios": ratios}
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = Table(
        "", "TTFT, s", "faster than cold", title=f"{NUM_PROMPT_TOKENS:,} tokens, median of {arguments.rounds}"
    )
    for name, value in medians.items():
        table.add_row(name, f"{value:.3f}", f"{medians['cold'] / value:.1f}x")
    bars = Table("ratio", "measured", "bar", "held")
    for (name, base), bar in BARS.items():
        ratio = ratios[f"{name} / {base}"]
        bars.add_row(f"{name} / {base}", f"{ratio:.3f}", f"{bar:.2f}", "yes" if ratio <= bar else "no")
    Console().print(table, bars)


if __name__ == "__main__":
    main()
