"""Real vLLM engines in this process, so that tests can look into the connector. Not part of `make test`.

Tokens are compared with an engine that has no connector, greedily, on models whose wide random weights make equal
tokens mean equal computing: in float32, on a GPU with Triton's attention, which has it.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

BLOCK = 128
"""Tokens of a block of vLLM's, which a CPU's default is; two make a chunk."""

Expected = Callable[[Path, Sequence[Any], int], list[list[int]]]
"""Of a model, prompts and a number of tokens: what vLLM alone answers."""


@dataclass(frozen=True)
class Engine:
    """An engine and, if it has one, the scheduler's and the worker's side of its connector."""

    llm: Any

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def half(self) -> Any:
        return self.scheduler.connector._scheduler

    @property
    def worker(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()._worker

    def generate(self, prompts: Sequence[Any], num_tokens: int = 8) -> list[list[int]]:
        """Prompts are token ids, or dicts of vLLM's."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, detokenize=False)
        given = [prompt if isinstance(prompt, dict) else {"prompt_token_ids": prompt} for prompt in prompts]
        return [list(done.outputs[0].token_ids) for done in self.llm.generate(given, sampling, use_tqdm=False)]

    def metric(self, name: str) -> float:
        """A counter of vLLM's own, summed over labels."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)

    def count(self, name: str) -> float:
        """A counter or gauge of kvferry's."""
        return self.half.stats().get(name, 0)

    def settle(self) -> None:
        """Let saves of requests that have ended end as well."""
        while self.scheduler.has_finished_requests():
            self.llm.llm_engine.step()

    def clear_pool(self, *, connector: bool = False) -> None:
        """Forget what vLLM's own pool keeps, and perhaps what kvferry does."""
        self.settle()
        assert self.scheduler.reset_prefix_cache(reset_connector=connector)

    def check(self) -> None:
        """Nothing is under way, and the store's books agree."""
        self.settle()
        self.half._store.check()
        assert self.count("leases") == 0
        assert not (self.half._followed or self.half._held or self.half._loading)


def make_engine(model: Path, *, connector: bool = True, policy: str = "fail", **settings: Any) -> Engine:
    """An engine of small pool and passes. Settings are vLLM's, and `extra` for kvferry's options."""
    from vllm import LLM

    # Every hit is loaded, so that tests know which: with these small models computing it may well be as fast.
    extra = {"l1_size_gb": 0.2, "load_when": "always", **settings.pop("extra", {})}
    given = {
        "dtype": "float32",
        "block_size": BLOCK,
        **({"attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.3} if torch.cuda.is_available() else {}),
        "max_model_len": 2048,
        "enforce_eager": True,
        "num_gpu_blocks_override": 22,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 16,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        **settings,
    }
    if connector:
        given["kv_transfer_config"] = {
            "kv_connector": "KVFerryConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": extra,
            "kv_load_failure_policy": policy,
        }
    return Engine(LLM(str(model), **given))


@contextmanager
def running(model: Path, **settings: Any) -> Iterator[Engine]:
    """An engine that is gone afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    engine = make_engine(model, **settings)
    try:
        yield engine
    finally:
        engine.llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def tokens(count: int, seed: int) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(2, 500) for _ in range(count)]
