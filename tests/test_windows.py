"""Sliding windows: blocks leave the pool behind the window while a request runs, and no cache may keep what is left."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, SamplingParams
from kvferry.testing.models import make_model

from .engine.conftest import make_prompt

BLOCK = 8
PARAMS = SamplingParams(max_tokens=30, ignore_eos=True)
SHORT = SamplingParams(max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module", params=["mistral", "gemma3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(request.param, tmp_path_factory.mktemp("windows") / request.param)


def open_llm(model: Path, connector: KvCacheConnectorConfig | None, **options: Any) -> LLM:
    pool = {"tokens_per_block": BLOCK, "max_tokens": 320, "enable_block_reuse": connector is not None, **options}
    return LLM(str(model), kv_cache_config=KvCacheConfig(**pool), kv_connector_config=connector, max_num_tokens=48)


def prompts_of_a_conversation(plain: LLM) -> list[list[int]]:
    """Turns that each begin with all that was said before, and others in between."""
    said = make_prompt(30)
    prompts = []
    for turn in range(3):
        prompts += [list(said), make_prompt(150, seed=100 + turn)]
        answer = plain.generate(said, PARAMS if turn == 0 else SHORT).token_ids
        said = [*said, *answer, *make_prompt(20 + turn, seed=turn)]
    return prompts


@pytest.mark.parametrize("chunk_tokens", [8, 64])
def test_kvferry_keeps_a_conversation(chunk_tokens: int, model: Path, tmp_path: Path) -> None:
    """Chunks shorter and longer than the window; filled by prompts, by prefill chunks and by decoding.

    A chunk longer than the window is gone in part before it is full, unless one pass fills it: then there is no hit.
    """
    options = {"chunk_tokens": chunk_tokens, "l1_size_gb": 0.02, "disk_path": str(tmp_path / "disk")}
    num_loaded = converse(model, KvCacheConnectorConfig(connector="kvferry", options=options))
    assert num_loaded > 0 or chunk_tokens > 8


def test_persistent_keeps_a_conversation(tmp_path: Path) -> None:
    """Its flat forms serve one layer group alone."""
    options = {"folder": str(tmp_path / "blocks")}
    config = KvCacheConnectorConfig(connector="persistent", options=options)
    assert converse(make_model("mistral", tmp_path / "model"), config) > 0


def converse(model: Path, connector: KvCacheConnectorConfig) -> int:
    """The same tokens with and without the connector, in two runs, prompts in any order; returns the tokens loaded."""
    with open_llm(model, None) as plain:
        prompts = prompts_of_a_conversation(plain)
        expected = [plain.generate(prompt, PARAMS).token_ids for prompt in prompts]
    num_loaded = 0
    for num_rounds in (2, 1):
        with open_llm(model, connector) as llm:
            order = list(range(len(prompts)))
            for round_number in range(num_rounds):
                random.Random(round_number).shuffle(order)
                for index in order:
                    output = llm.generate(prompts[index], PARAMS)
                    assert output.token_ids == expected[index], f"prompt {index}"
                    num_loaded += output.metrics.num_connector_tokens
                llm.check()
    return num_loaded


def test_a_window_frees_the_blocks_behind_it(model: Path) -> None:
    """A request of 30 blocks decodes in a pool in which its window's group needs few of them."""
    with open_llm(model, None, max_tokens=320) as llm:
        handle = llm.generate_async(make_prompt(200), PARAMS)
        next(iter(handle))
        held: list[int] = []
        llm._core.call(lambda: held.extend(llm._blocks.num_blocks - pool.num_free for pool in llm._blocks.pools))
        assert list(handle.result(60).token_ids)
        llm.check()
    groups = llm._pool.groups
    for group, num_held in zip(groups, held, strict=True):
        assert num_held <= group.most_live_blocks(300, BLOCK)
