"""Models and reference tokens that the engine's tests share."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvferry.testing.models import FAMILIES, VOCAB_SIZE, make_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of a tiny model for each family."""
    root = tmp_path_factory.mktemp("models")
    return {family: make_model(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def llama(models: dict[str, Path]) -> str:
    return str(models["llama"])


@pytest.fixture(scope="session")
def reference() -> Callable[..., list[int]]:
    """transformers' own greedy generation: (model, prompt, max_tokens, ignore_eos=False) to new tokens."""
    loaded: dict[str, torch.nn.Module] = {}

    def generate(model: str, prompt: list[int], max_tokens: int, ignore_eos: bool = False) -> list[int]:
        if model not in loaded:
            loaded[model] = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = loaded[model].generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
                **({"eos_token_id": -1} if ignore_eos else {}),
            )
        return out[0, len(prompt) :].tolist()

    return generate


def make_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Random token ids; prompts of one seed are prefixes of each other."""
    rng = random.Random(seed)
    return [rng.randrange(2, VOCAB_SIZE) for _ in range(num_tokens)]
