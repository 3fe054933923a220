"""LMCache's adapters for TensorRT-LLM under the embedded engine: is there a hit after eviction, are the tokens equal?

Needs a GPU and `pip install lmcache`. Three prompts: a long one, another that takes the whole pool, the first again.
With --server also through LMCache's server in a process of its own (needs cuda-python and cupy), which this script
starts and ends. LMCache is set up by its own environment variables (LMCACHE_CHUNK_SIZE, ...); those that are not set
get what LMCache's documentation for TensorRT-LLM gives.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, RequestOutput, SamplingParams
from kvferry.testing.models import make_model

BLOCK_TOKENS = 32
SETTINGS = {"LMCACHE_CHUNK_SIZE": "256", "LMCACHE_LOCAL_CPU": "True", "LMCACHE_MAX_LOCAL_CPU_SIZE": "5.0"}
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
}
"""SmolLM2-135M's."""


def make_prompts(num_tokens: int) -> list[list[int]]:
    """Long, another, the first again."""
    first, second = ([random.Random(seed).randrange(10, 10_000) for _ in range(num_tokens)] for seed in (1, 2))
    return [first, second, first]


def ask(model: str, dtype: str, num_tokens: int, connector: KvCacheConnectorConfig | None) -> list[RequestOutput]:
    """The prompts' outputs, one after the other, by an engine whose pool holds one of them."""
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    pool_tokens = (num_tokens + params.max_tokens + BLOCK_TOKENS) // BLOCK_TOKENS * BLOCK_TOKENS
    cache = KvCacheConfig(tokens_per_block=BLOCK_TOKENS, max_tokens=pool_tokens)
    with LLM(model, dtype=dtype, device="cuda", kv_cache_config=cache, kv_connector_config=connector) as llm:
        outputs = [llm.generate(prompt, params) for prompt in make_prompts(num_tokens)]
        if llm.connector_manager is not None:
            print(f"  errors by hook: {llm.connector_manager.num_errors or 'none'}")
    return outputs


@contextlib.contextmanager
def lmcache_server(port: int) -> Iterator[str]:
    """LMCache's server; yields its URL."""
    options = ["--l1-size-gb", "5", "--eviction-policy", "LRU", "--max-workers", "4"]
    options += ["--chunk-size", os.environ["LMCACHE_CHUNK_SIZE"]]
    command = [sys.executable, "-m", "lmcache.v1.multiprocess.server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([*command, *options])
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def report(name: str, outputs: list[RequestOutput], reference: list[RequestOutput]) -> bool:
    """Print a connector's hits; true if the last prompt had one and all tokens are the reference's."""
    for output in outputs:
        metrics = output.metrics
        print(
            f"  {name}: {metrics.num_prompt_tokens} tokens, {metrics.num_pool_tokens} from the pool, "
            f"{metrics.num_connector_tokens} from the connector, first token after {metrics.ttft_seconds or 0:.4f} s"
        )
    equal = [output.token_ids for output in outputs] == [output.token_ids for output in reference]
    print(f"  {name}: tokens {'equal' if equal else 'DIFFER from'} those without a connector")
    return equal and outputs[-1].metrics.num_connector_tokens > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name (default: random weights in SmolLM2-135M's shape)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=4000, help="length of a prompt (default %(default)s)")
    parser.add_argument("--server", action="store_true", help="also lmcache-mp")
    parser.add_argument("--port", type=int, default=5555)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or importlib.util.find_spec("lmcache") is None:
        print("skipped: needs a CUDA device and lmcache")
        return 0
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or str(make_model("llama", Path(folder), **SHAPE))
        reference = ask(model, arguments.dtype, arguments.tokens, None)
        outputs = ask(model, arguments.dtype, arguments.tokens, KvCacheConnectorConfig(connector="lmcache"))
        report("none", reference, reference)
        good = [report("lmcache", outputs, reference)]
        if arguments.server:
            with lmcache_server(arguments.port) as url:
                connector = KvCacheConnectorConfig(connector="lmcache-mp", server_url=url)
                outputs = ask(model, arguments.dtype, arguments.tokens, connector)
            good.append(report("lmcache-mp", outputs, reference))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
