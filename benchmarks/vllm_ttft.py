"""What a KV connector does to a real vLLM: time to first token cold, from vLLM's pool and from outside it, and a batch.

    python benchmarks/vllm_ttft.py MODE [MODEL] [--lengths 2048,8192,32768] [--rounds 3]

MODE: none, native (vLLM's OffloadingConnector) or lmcache (both on CUDA), example (vLLM's ExampleConnector), kvferry,
server (kvferry with a cache server, which is started), or JSON of a KVTransferConfig. MODEL: a folder; without one,
random weights in the shape of Llama 3 8B, for a GPU. The pool has room for one long prompt: another one pushes it out,
and what is hit then came from outside.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvferry.testing.servers import ServerProcess

MODES: dict[str, Any] = {
    "none": None,
    "native": {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"cpu_bytes_to_use": 40 << 30}},
    "example": {"kv_connector": "ExampleConnector"},
    "lmcache": {"kv_connector": "LMCacheConnectorV1"},
    "kvferry": {"kv_connector": "KVFerryConnector", "kv_connector_extra_config": {"l1_size_gb": 40.0}},
}
LLAMA_8B = """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "head_dim": 128,
"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0, "torch_dtype": "bfloat16"}"""
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "PYTHONHASHSEED": "0",
    "LMCACHE_LOCAL_CPU": "True",
    "LMCACHE_MAX_LOCAL_CPU_SIZE": "40",
    "LMCACHE_CHUNK_SIZE": "256",
}
TIMES = ("cold", "pool", "outside")


def make_engine(mode: str, model: str | None, longest: int, block_tokens: int) -> Any:
    from vllm import LLM

    transfer = MODES[mode] if mode in MODES else json.loads(mode)
    if mode == "example":
        transfer = transfer | {"kv_connector_extra_config": {"shared_storage_path": tempfile.mkdtemp()}}
    settings: dict[str, Any] = {"max_num_batched_tokens": 8192, "enforce_eager": True, "skip_tokenizer_init": True}
    if model is None:
        model = tempfile.mkdtemp()
        Path(model, "config.json").write_text(LLAMA_8B, encoding="utf-8")
        settings |= {"load_format": "dummy", "dtype": "bfloat16", "gpu_memory_utilization": 0.6}
    if transfer is not None:
        settings["kv_transfer_config"] = {"kv_role": "kv_both", **transfer}
    room = longest + 8 * block_tokens
    return LLM(model, max_model_len=room, num_gpu_blocks_override=room // block_tokens + 2, **settings)


class Prompts:
    def __init__(self, llm: Any, vocabulary: int) -> None:
        self._llm, self._vocabulary, self._choose = llm, vocabulary, random.Random(0)

    def draw(self, num_tokens: int) -> dict[str, list[int]]:
        return {"prompt_token_ids": [self._choose.randrange(10, self._vocabulary) for _ in range(num_tokens)]}

    def run(self, prompts: list[dict[str, list[int]]], num_tokens: int = 1) -> tuple[float, list[Any]]:
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=num_tokens, temperature=0, detokenize=False, ignore_eos=True)
        start = time.perf_counter()
        answers = self._llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, [(list(of.outputs[0].token_ids), of.num_cached_tokens) for of in answers]


def measure(prompts: Prompts, num_tokens: int, evictor: dict[str, list[int]], settle: float) -> dict[str, Any]:
    """Seconds and cached tokens of one new prompt: cold, from the pool, and after an eviction."""
    prompt = prompts.draw(num_tokens)
    row: dict[str, Any] = {}
    answers = []
    for name in TIMES:
        if name == "outside":
            prompts.run([evictor])
            time.sleep(settle)
        row[name], [(tokens, row[f"{name}_cached_tokens"])] = prompts.run([prompt])
        answers.append(tokens)
        time.sleep(settle)
    return row | {"same_tokens": all(tokens == answers[0] for tokens in answers)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", default="kvferry")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-tokens", type=int, default=16, help="of vLLM's blocks: 128 on a CPU")
    parser.add_argument("--vocabulary", type=int, default=40000)
    parser.add_argument("--batch", type=int, default=32, help="requests of the batch; 0: none")
    parser.add_argument("--settle", type=float, default=1.0, help="seconds that saves have after each request")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("needs vLLM beside kvferry: see docs/vllm.md")
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    lengths = [int(text) for text in given.lengths.split(",")]
    with serving(given.mode) as mode:
        measure_mode(mode, lengths, given)


@contextmanager
def serving(mode: str) -> Iterator[str]:
    """The mode, with a cache server where it needs one."""
    if mode != "server":
        yield mode
        return
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        ServerProcess(Path(folder), "--l1-size-gb", "40") as server,
    ):
        extra = {"server_url": server.url}
        yield json.dumps({"kv_connector": "KVFerryConnector", "kv_connector_extra_config": extra})


def measure_mode(mode: str, lengths: list[int], given: argparse.Namespace) -> None:
    start = time.perf_counter()
    llm = make_engine(mode, given.model, max(lengths), given.block_tokens)
    prompts = Prompts(llm, given.vocabulary)
    result: dict[str, Any] = {"mode": given.mode, "start_seconds": time.perf_counter() - start, "rows": []}
    prompts.run([prompts.draw(min(lengths))], 4)
    evictor = prompts.draw(max(lengths) + 4 * given.block_tokens)
    print("  tokens   cold ms   pool ms  outside ms  hit tokens  same")
    for length in lengths:
        rows = [measure(prompts, length, evictor, given.settle) for _ in range(given.rounds)]
        times = {name: statistics.median(row[name] for row in rows) for name in TIMES}
        hits, same = min(row["outside_cached_tokens"] for row in rows), all(row["same_tokens"] for row in rows)
        cells = [f"{1e3 * seconds:9.1f}" for seconds in times.values()]
        print(f"{length:8}", *cells[:2], f"  {cells[2]}", f"{hits:11}", f" {same}", flush=True)
        result["rows"].append({"num_tokens": length, "median_seconds": times, "rounds": rows})
    if given.batch:
        prompts.run([prompts.draw(512) for _ in range(given.batch)], 8)
        result["batch_seconds"], _ = prompts.run([prompts.draw(512) for _ in range(given.batch)], 128)
        print(f"{given.batch} x 512 tokens, 128 new ones each: {result['batch_seconds']:.2f} s")
    llm.llm_engine.engine_core.shutdown()  # At its end Python waits for vLLM's processes before it ends them.
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
