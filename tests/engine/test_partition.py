"""The parts of a model, summed, compute what the whole does. Ranks are threads here: no process is started."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

from kvferry.engine.partition import RankGroup, partition
from kvferry.errors import RequestError
from kvferry.testing.models import VOCAB_SIZE, make_model

CPU = torch.device("cpu")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("family", "num_ranks", "overrides"),
    [
        ("llama", 2, {}),
        ("llama", 2, {"attention_bias": True, "mlp_bias": True}),
        ("llama", 4, {"num_key_value_heads": 4}),
        ("qwen2", 2, {}),
        ("qwen3", 2, {}),
        ("mistral", 2, {}),
    ],
)
def test_parts_add_up(family: str, num_ranks: int, overrides: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(family, tmp_path / "model", **overrides)
    ids = torch.arange(2, 40)[None] % VOCAB_SIZE
    whole = load(folder)
    for parameter in whole.parameters():  # biases are made as zeros, which would hide one that is added twice
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, generator=torch.Generator().manual_seed(len(parameter)))
    whole.save_pretrained(folder)
    parts = [load(folder) for _ in range(num_ranks)]

    def compute(rank: int) -> torch.Tensor:
        group = RankGroup(rank, num_ranks, tmp_path, CPU)
        partition(parts[rank], group)
        group.join()
        with torch.inference_mode():
            logits: torch.Tensor = parts[rank](ids).logits
        group.leave()
        return logits

    with ThreadPoolExecutor(num_ranks) as threads:
        found = list(threads.map(compute, range(num_ranks)))
    with torch.inference_mode():
        expected = whole(ids).logits
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    sizes = [sum(weight.numel() for weight in part.model.layers.parameters()) for part in parts]
    assert max(sizes) < sum(weight.numel() for weight in whole.model.layers.parameters()) / num_ranks * 1.2


@pytest.mark.parametrize(
    ("num_ranks", "overrides", "numbers"),
    [
        (3, {}, r"4 attention heads and 2 KV heads, .* tensor_parallel_size=3"),
        (4, {}, r"4 attention heads and 2 KV heads, .* tensor_parallel_size=4"),
        (2, {"intermediate_size": 63}, r"mlp.*_proj is 63 wide, .* tensor_parallel_size=2"),
    ],
)
def test_what_does_not_divide_is_refused_with_its_numbers(
    num_ranks: int, overrides: dict[str, Any], numbers: str, tmp_path: Path
) -> None:
    model = load(make_model("llama", tmp_path / "model", **overrides))
    with pytest.raises(RequestError, match=numbers):
        partition(model, RankGroup(0, num_ranks, tmp_path, CPU))


def test_a_plan_that_the_engine_lacks_is_refused_by_name(tmp_path: Path) -> None:
    config = Phi3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with pytest.raises(RequestError, match=r"Phi3ForCausalLM cannot run .*o_proj is a Linear .*rowwise_split_input"):
        partition(AutoModelForCausalLM.from_config(config), RankGroup(0, 2, tmp_path, CPU))


def test_without_a_plan_a_model_is_refused(tmp_path: Path) -> None:
    model = load(make_model("llama", tmp_path / "model"))
    model.config.base_model_tp_plan = None
    with pytest.raises(RequestError, match="no partition plan for LlamaForCausalLM"):
        partition(model, RankGroup(0, 2, tmp_path, CPU))
