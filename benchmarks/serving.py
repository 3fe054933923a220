"""Requests a second of `kvferry serve` under 64 clients at once: prompts it never saw, then the same ones again.

The pool holds a few prompts, so the second round's KV comes from the connector. A request has failed if it is not
answered, or with other tokens than in the first round; some are checked against an engine without a connector.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import yaml

from kvferry import LLM, KvCacheConfig, SamplingParams
from kvferry.cli.demo import DEFAULT_MODEL

NUM_CLIENTS, NUM_GENERATED, POOL_PROMPTS = 64, 4, 8
BLOCK, CHUNK = 32, 256
MAX_NUM_TOKENS = 2048  # a pass of the default's 8,192 can outlast the leases of its saves on two busy cores
LEAST_GAIN = 3.0


def make_prompts(num_tokens: int) -> list[list[int]]:
    return [random.Random(seed).choices(range(1000, 30_000), k=num_tokens) for seed in range(NUM_CLIENTS)]


@contextmanager
def serving(model: str, pool_tokens: int, arena_gb: float) -> Iterator[str]:
    """The address of a server in a process of its own."""
    options = {
        "kv_cache_config": {"tokens_per_block": BLOCK, "max_tokens": pool_tokens},
        "kv_connector_config": {"connector": "kvferry", "options": {"chunk_tokens": CHUNK, "l1_size_gb": arena_gb}},
        "max_num_tokens": MAX_NUM_TOKENS,
        "dtype": "float32",
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        yaml.safe_dump(options, config)
        config.flush()
        command = [sys.executable, "-m", "kvferry", "serve", model, "--config", config.name, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                assert line, "the server did not start"
                yield line.split()[-1]
            finally:
                process.terminate()


async def ask_all(url: str, model: str, prompts: list[list[int]]) -> tuple[float, list[Any]]:
    """Seconds until the last answer, and the answers or what was raised instead."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600)
    extra = {"ignore_eos": True, "return_token_ids": True}
    options: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": NUM_GENERATED, "extra_body": extra}
    async with client:
        start = time.perf_counter()
        asked = (client.completions.create(prompt=prompt, **options) for prompt in prompts)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return time.perf_counter() - start, answers


def tokens_of(answer: Any) -> list[int] | None:
    return None if isinstance(answer, BaseException) else answer.choices[0].token_ids


def cached_share(answers: list[Any]) -> float:
    usages = [answer.usage for answer in answers if not isinstance(answer, BaseException)]
    return sum(u.prompt_tokens_details.cached_tokens for u in usages) / sum(u.prompt_tokens for u in usages)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--prompt-tokens", type=int, default=2 * CHUNK + 1)
    parser.add_argument("--checked", type=int, default=8, help="prompts to compare with an engine without a connector")
    parser.add_argument("--arena-gb", type=float, default=4.0)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    prompts = make_prompts(arguments.prompt_tokens)
    pool_tokens = POOL_PROMPTS * (arguments.prompt_tokens + NUM_GENERATED + BLOCK)
    with serving(arguments.model, pool_tokens, arguments.arena_gb) as url:
        rounds = [asyncio.run(ask_all(url, arguments.model, prompts)) for _ in range(2)]
    with LLM(arguments.model, kv_cache_config=KvCacheConfig(max_tokens=pool_tokens), dtype="float32") as llm:
        params = SamplingParams(max_tokens=NUM_GENERATED, ignore_eos=True)
        expected = [list(output.token_ids) for output in llm.generate(prompts[: arguments.checked], params)]
    tokens = [[tokens_of(answer) for answer in answers] for _, answers in rounds]
    num_failed = sum(first is None or first != second for first, second in zip(*tokens, strict=True))
    result = {
        "num_clients": NUM_CLIENTS,
        "prompt_tokens": arguments.prompt_tokens,
        "requests_per_second": [NUM_CLIENTS / seconds for seconds, _ in rounds],
        "cached_share": [cached_share(answers) for _, answers in rounds],
        "gain": rounds[0][0] / rounds[1][0],
        "failed": num_failed,
        "other_than_offline": sum(a != b for a, b in zip(tokens[0], expected, strict=False)),
        "checked_offline": len(expected),
    }
    print(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    good = result["gain"] >= LEAST_GAIN and not num_failed and not result["other_than_offline"]
    print(f"second round {result['gain']:.1f} times the first (bar {LEAST_GAIN:g}), {num_failed} failed")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
