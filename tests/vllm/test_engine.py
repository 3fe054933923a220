"""Tokens are those of vLLM alone: cold, from its pool, from memory after eviction, in chunked prefills, after
preemptions, for many requests at once, and whatever is aborted meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_engines import BLOCK, Engine, Expected, running, tokens

PROMPTS = [tokens(700 + 37 * seed, seed) for seed in range(6)]
NUM_TOKENS = 120


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def many() -> list[Any]:
    """Prompts of all lengths, with common beginnings, salted and not."""
    choose = random.Random(1)
    prompts: list[Any] = []
    for seed in range(32):
        common = PROMPTS[choose.randrange(3)][: choose.randrange(0, 700)]
        prompt: dict[str, Any] = {"prompt_token_ids": common + tokens(choose.randrange(1, 300), 100 + seed)}
        prompts.append(prompt | ({"cache_salt": "s"} if seed % 4 == 0 else {}))
    return prompts


@pytest.fixture(scope="module")
def answers(model: Path, many: list[Any], expected: Expected) -> list[list[int]]:
    """vLLM alone's to `PROMPTS` and to `many`."""
    return expected(model, [*PROMPTS, *many], NUM_TOKENS)


@pytest.fixture(scope="module")
def reference(answers: list[list[int]]) -> list[list[int]]:
    return answers[: len(PROMPTS)]


@pytest.fixture(scope="module")
def engine(model: Path, answers: list[list[int]]) -> Iterator[Engine]:
    """Its pool has room for three of the six requests, and for fewer once they grow."""
    assert answers  # before this engine is there: the process can have one at a time
    with running(model, num_gpu_blocks_override=40 if "gemma" in model.name else 22) as engine:
        yield engine


def test_cold_and_from_memory(engine: Engine, reference: list[list[int]]) -> None:
    for hits in (False, True, True):
        before = engine.metric("vllm:external_prefix_cache_hits")
        assert engine.generate(PROMPTS, NUM_TOKENS) == reference
        assert (engine.metric("vllm:external_prefix_cache_hits") > before) == hits
        engine.check()
    assert engine.metric("vllm:num_preemptions") > 0, "the pool is too large to show what preemption does"
    assert engine.metric("vllm:kvferry_hit_tokens") == engine.count("load_tokens_memory") > 0
    assert engine.metric("vllm:kvferry_loaded_bytes") == engine.count("loaded_bytes") > 0
    assert engine.metric("vllm:kvferry_saved_bytes") == engine.count("stored_bytes") > 0
    assert engine.metric("vllm:kvferry_failed_loads") == 0
    assert engine.count("load_bytes_in_flight") == 0, "all loads are reported with their end"


def test_one_by_one_each_evicts_another(engine: Engine, reference: list[list[int]]) -> None:
    for prompt, answer in zip(PROMPTS, reference, strict=True):
        before = engine.metric("vllm:external_prefix_cache_hits")
        hits_of_pool = engine.metric("vllm:prefix_cache_hits")
        assert engine.generate([prompt], NUM_TOKENS) == [answer]
        found = engine.metric("vllm:external_prefix_cache_hits") - before
        found += engine.metric("vllm:prefix_cache_hits") - hits_of_pool
        assert found >= (len(prompt) - 1) // (2 * BLOCK) * 2 * BLOCK
    engine.check()


def test_what_was_generated_is_kept_as_well(engine: Engine, reference: list[list[int]]) -> None:
    """The next turn of a conversation goes on from the answer's last full chunk."""
    engine.clear_pool()
    before = engine.metric("vllm:external_prefix_cache_hits")
    conversation = PROMPTS[0] + reference[0]
    engine.generate([conversation], 1)
    found = engine.metric("vllm:external_prefix_cache_hits") - before
    assert found >= (len(conversation) - 1) // (2 * BLOCK) * 2 * BLOCK > len(PROMPTS[0])


def test_salts_do_not_share(engine: Engine, reference: list[list[int]]) -> None:
    for salt, hits in (("a", False), ("b", False), ("a", True)):
        engine.clear_pool()
        before = engine.metric("vllm:external_prefix_cache_hits")
        prompt = {"prompt_token_ids": PROMPTS[0], "cache_salt": salt}
        assert engine.generate([prompt], NUM_TOKENS) == reference[:1]
        assert (engine.metric("vllm:external_prefix_cache_hits") > before) == hits


def test_a_reset_forgets(engine: Engine, reference: list[list[int]]) -> None:
    engine.clear_pool(connector=True)
    before = engine.metric("vllm:external_prefix_cache_hits")
    assert engine.generate(PROMPTS[:1], NUM_TOKENS) == reference[:1]
    assert engine.metric("vllm:external_prefix_cache_hits") == before
    engine.clear_pool()
    assert engine.generate(PROMPTS[:1], NUM_TOKENS) == reference[:1]
    assert engine.metric("vllm:external_prefix_cache_hits") > before
    engine.check()


def test_aborts_at_any_moment(engine: Engine, reference: list[list[int]]) -> None:
    """Every request is aborted after some steps; loads and saves under way end, and nothing stays leased or held."""
    from vllm import SamplingParams

    choose = random.Random(0)
    core: Any = engine.llm.llm_engine
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    for round_number in range(6):
        engine.clear_pool()
        names = [f"{round_number}-{index}" for index in range(len(PROMPTS))]
        for name, prompt in zip(names, PROMPTS, strict=True):
            core.add_request(name, {"prompt_token_ids": prompt}, sampling)
        waiting = list(names)
        while waiting:
            for _ in range(choose.randrange(4)):
                core.step()
            core.abort_request([waiting.pop(choose.randrange(len(waiting)))])
        while core.has_unfinished_requests() or engine.scheduler.has_finished_requests():
            core.step()
        engine.check()
    assert engine.generate(PROMPTS, NUM_TOKENS) == reference


def test_32_requests_at_once(engine: Engine, many: list[Any], answers: list[list[int]]) -> None:
    for _ in range(2):
        assert engine.generate(many, 20) == [answer[:20] for answer in answers[len(PROMPTS) :]]
    engine.check()
