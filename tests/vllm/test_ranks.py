"""Two ranks of tensor parallelism, which are processes: vLLM's tokens, hits on both, and nothing left of the store."""

from __future__ import annotations

from pathlib import Path

import pytest
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
