"""The check of `benchmarks/vllm_ttft.py` that a hit from outside answers as a cold run does: it can fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from vllm_engines import BLOCK, tokens

from kvferry.testing.vllm_modes import EngineShape, Mode, measure_batch, measure_prompt

SHAPE = EngineShape("small", 8 * BLOCK, 12 * BLOCK, BLOCK, 0.3, 0.2)


@pytest.fixture(scope="module")
def modes() -> Iterator[list[Mode]]:
    """kvferry and a connector that loads nothing of what it says it has. To start may take them longer. vLLM is in a
    process of its own, as when it serves: then saves are planned late."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as ending:
        patch.setenv("KVFERRY_LOAD_WHEN", "always")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        yield [ending.enter_context(closing(Mode(name, SHAPE, 20.0))) for name in ("kvferry", "liar")]


def test_who_loads_nothing_is_called_out(modes: list[Mode]) -> None:
    for seed in range(3):
        row = measure_prompt(modes, {"prompt_token_ids": tokens(4 * BLOCK + 9, seed)}, settle=0)
        assert {name: of["hit_tokens"] for name, of in row.items()} == {"kvferry": 4 * BLOCK, "liar": 4 * BLOCK}
        assert {name: of["is_same"] for name, of in row.items()} == {"kvferry": True, "liar": False}


def test_a_batch_tells_what_it_hit(modes: list[Mode]) -> None:
    prompts = [{"prompt_token_ids": tokens(2 * BLOCK + 9, 10 + at)} for at in range(3)]
    row = measure_batch(modes, prompts, 2, settle=0)
    assert {name: of["hit_tokens"] for name, of in row.items()} == {"kvferry": 6 * BLOCK, "liar": 6 * BLOCK}
