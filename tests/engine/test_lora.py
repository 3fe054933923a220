"""LoRA adapters: the right weights for each request, and no KV shared between adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, SamplingParams
from kvferry.errors import RequestError

from .conftest import make_prompt

peft = pytest.importorskip("peft", reason="needs the package peft: pip install kvferry[lora]")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PROMPT = make_prompt(70)
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def adapters(llama: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters with random weights."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
        folder = tmp_path_factory.mktemp(f"adapter-{seed}")
        model.save_pretrained(folder)
        folders.append(str(folder))
    return folders


def merged_tokens(llama: str, adapter: str | None, prompt: list[int]) -> list[int]:
    """transformers' greedy tokens with the adapter merged into the weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
    return out[0, len(prompt) :].tolist()


def open_llm(llama: str, disk: Path) -> LLM:
    options = {"chunk_tokens": 32, "l1_size_gb": 0.02, "disk_path": str(disk)}
    return LLM(
        llama,
        kv_cache_config=KvCacheConfig(tokens_per_block=8, max_tokens=512),
        kv_connector_config=KvCacheConnectorConfig(connector="kvferry", options=options),
    )


def test_adapters_take_turns_and_share_nothing(llama: str, adapters: list[str], tmp_path: Path) -> None:
    wanted = [None, *adapters]
    expected = {adapter: merged_tokens(llama, adapter, PROMPT) for adapter in wanted}
    assert len({tuple(tokens) for tokens in expected.values()}) == 3, "the adapters make a difference"
    with open_llm(llama, tmp_path) as llm:
        handles = [(adapter, llm.generate_async(PROMPT, PARAMS, adapter)) for adapter in wanted * 3]
        for adapter, handle in handles:
            assert list(handle.result(60).token_ids) == expected[adapter]
        for adapter in wanted:
            output = llm.generate(PROMPT, PARAMS, adapter)
            assert list(output.token_ids) == expected[adapter]
            assert output.metrics.num_pool_tokens == 64
        llm.check()
    with open_llm(llama, tmp_path) as llm:
        for adapter in reversed(wanted):
            output = llm.generate(PROMPT, PARAMS, adapter)
            assert list(output.token_ids) == expected[adapter]
            assert output.metrics.num_connector_tokens == 64


def test_a_folder_that_is_no_adapter_is_refused(llama: str, adapters: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    with LLM(llama, kv_cache_config=KvCacheConfig(max_tokens=256)) as llm:
        with pytest.raises(RequestError, match=r"no LoRA adapter: it has no adapter_config\.json"):
            llm.generate(PROMPT, PARAMS, str(tmp_path))
        with pytest.raises(RequestError, match="cannot be loaded"):
            llm.generate(PROMPT, PARAMS, str(broken))
        assert list(llm.generate(PROMPT, PARAMS, adapters[0]).token_ids) == merged_tokens(llama, adapters[0], PROMPT)
        assert list(llm.generate(PROMPT, PARAMS).token_ids) == merged_tokens(llama, None, PROMPT)
