"""Two ranks of tensor parallelism, which are processes: vLLM's tokens, hits on both, and nothing left of the store."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch
from vllm_engines import BLOCK, Expected, running, tokens

PROMPTS = [tokens(600 + 37 * seed, 80 + seed) for seed in range(5)]
NUM_TOKENS = 12
HITS = "vllm:external_prefix_cache_hits"


def test_two_ranks(gemma: Path, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's answers of one rank, as sums of floats are hardly ever so close that their order decides."""
    reference = expected(gemma, PROMPTS, NUM_TOKENS)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "30")
    with running(gemma, tensor_parallel_size=2, num_gpu_blocks_override=40) as engine:
        assert engine.generate(PROMPTS, NUM_TOKENS) == reference
        assert engine.metric(HITS) == 0
        engine.clear_pool()
        assert engine.generate(PROMPTS, NUM_TOKENS) == reference
        assert engine.metric(HITS) >= len(PROMPTS) * 2 * BLOCK
        engine.check()
        socket = Path(engine.half._engine.ranks_url.removeprefix("ipc://"))
        assert socket.exists()
    assert not list(socket.parent.glob(f"{socket.name}*"))


def zero_blocks(worker: Any) -> None:
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def digest_blocks(worker: Any) -> list[bytes]:
    """Of the bytes that each block has in all layers, if they are not zeros. Runs in a rank."""
    caches = [cache.view(torch.uint8).flatten(1) for cache in worker.model_runner.kv_caches]
    blocks = torch.cat(caches, dim=1).numpy()
    return [hashlib.sha256(block.tobytes()).digest() for block in blocks if block.any()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for vLLM's attention backend for CPUs: run it on one")
def test_two_ranks_keep_latents_once(deepseek: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLA's, which both ranks compute whole: each loads what the first has saved. Bytes are compared, not tokens, as
    vLLM's MLA on CPUs has no prefix caching of its own to compare with."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "30")
    num_chunks, settings = 2, {"attention_backend": "CPU_MLA", "num_gpu_blocks_override": 200}
    stored = {}
    for num_ranks in (1, 2):
        with running(deepseek, tensor_parallel_size=num_ranks, **settings) as engine:
            engine.llm.collective_rpc(zero_blocks)
            engine.generate(PROMPTS[:1], 1)
            saved = {*engine.llm.collective_rpc(digest_blocks)[0]}
            engine.clear_pool()
            engine.llm.collective_rpc(zero_blocks)
            engine.generate(PROMPTS[:1], 1)
            assert engine.metric(HITS) == num_chunks * 2 * BLOCK
            for loaded in engine.llm.collective_rpc(digest_blocks):
                num_loaded_blocks = num_chunks * 2 * BLOCK // engine.scheduler.cache_config.block_size
                assert len(saved.intersection(loaded)) >= num_loaded_blocks > 0
            stored[num_ranks] = engine.count("stored_bytes")
            engine.check()
    assert stored[1] == stored[2] > 0
