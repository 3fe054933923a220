"""The engine as its users meet it: limits named before anything runs, streaming, stopping, giving up, sampling."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, SamplingParams
from kvferry.engine.handle import follow
from kvferry.engine.kv_pool import free_bytes, most_pool_bytes
from kvferry.engine.outputs import FinishReason, RequestOutput
from kvferry.errors import EngineDeadError, RequestError, UnknownPresetError
from kvferry.testing.models import VOCAB_SIZE, make_model

from .conftest import make_prompt


@pytest.fixture(scope="module")
def llm(llama: str) -> Iterator[LLM]:
    with LLM(llama, kv_cache_config=KvCacheConfig(tokens_per_block=8, max_tokens=256), max_num_tokens=512) as llm:
        yield llm
        llm.check()


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        (
            [5, VOCAB_SIZE],
            {},
            f"{VOCAB_SIZE} is no token id of this model; ids are integers from 0 to {VOCAB_SIZE - 1}",
        ),
        ([5, -1], {}, "-1 is no token id"),
        ([5, "x"], {}, "a prompt is a string or a list of token ids|no tokenizer"),
        ([[5, None]], {}, "None is no token id"),
        ("text", {}, "no tokenizer: give the prompt as a list of token ids"),
        ([5] * 300, {}, "300 tokens and max_tokens=32 exceed the pool's limit of 256 tokens"),
        ([5] * 5000, {}, "exceed the model's limit of 4096 tokens"),
        ([5], {"stop": "x"}, "stop strings need a tokenizer"),
    ],
)
def test_bad_request_is_refused_by_the_limit_it_breaks(llm: LLM, prompt: Any, params: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(prompt, SamplingParams(**params))
    assert llm.generate([5, 6], SamplingParams(max_tokens=1)).finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, not 0"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"temperature": -0.1}, "temperature must be a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": ""}, "stop must be non-empty strings"),
        ({"stop": ["a", 3]}, "stop"),
        ({"cache_salt": ""}, "cache_salt must be a non-empty string"),
        ({"cache_salt": "a\ud800"}, "cache_salt must be Unicode text"),
    ],
)
def test_bad_sampling_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values)


def test_one_bad_prompt_of_many_means_none_runs(llm: LLM) -> None:
    before = next(llm._request_ids)
    with pytest.raises(RequestError, match="empty"):
        llm.generate([[5, 6], []])
    assert llm.generate([5]).request_id > before
    assert not llm._scheduler.has_requests


@pytest.mark.parametrize("name", ["/no/such/folder", "nonsense", "a/b/c"])
def test_path_that_is_no_model_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is no model"):
        LLM(name)


def test_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        LLM(str(tmp_path))


def test_model_of_another_attention_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not use transformers' attention interface"):
        LLM(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_batch_size": 9, "max_num_tokens": 8}, "max_num_tokens"),
        ({"dtype": "int8"}, "dtype must be auto or a floating-point type"),
        ({"device": "toaster"}, "no device"),
        ({"device": "meta"}, "not to be had"),
        ({"kv_cache_config": KvCacheConfig(tokens_per_block=32, max_tokens=8)}, "holds no block of 32 tokens"),
    ],
)
def test_bad_engine_option_is_named(llama: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(llama, **options)


def test_unknown_preset_is_refused_before_the_model_loads() -> None:
    with pytest.raises(UnknownPresetError, match="kvferry"):
        LLM("/no/such/folder", kv_connector_config=KvCacheConnectorConfig(connector="kvfery"))


def test_prompt_over_one_pass_needs_chunked_prefill(llama: str) -> None:
    with LLM(llama, max_num_tokens=16, enable_chunked_prefill=False, max_batch_size=2) as llm:
        with pytest.raises(ValueError, match="exceeds max_num_tokens=16, the limit of one pass without"):
            llm.generate([5] * 17)
        assert llm.generate([5] * 16, SamplingParams(max_tokens=2, ignore_eos=True)).token_ids


def test_single_prompt_gives_one_output_and_a_list_gives_a_list(llm: LLM) -> None:
    one = llm.generate([5, 6, 7], SamplingParams(max_tokens=3))
    assert isinstance(one, RequestOutput)
    assert one.outputs[0].token_ids == one.token_ids
    many = llm.generate([[5, 6, 7], [9]], [SamplingParams(max_tokens=3), SamplingParams(max_tokens=1)])
    assert many[0].token_ids == one.token_ids
    assert len(many[1].token_ids) == 1
    assert one.metrics.ttft_seconds is not None
    assert one.metrics.duration_seconds is not None
    assert 0 < one.metrics.ttft_seconds <= one.metrics.duration_seconds


def test_streams_grow_to_the_same_end(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    expected = llm.generate(make_prompt(20), params).token_ids
    seen = [output.token_ids for output in llm.generate_async(make_prompt(20), params)]

    async def read() -> list[tuple[int, ...]]:
        return [output.token_ids async for output in llm.generate_async(make_prompt(20), params)]

    for stream in (seen, asyncio.run(read())):
        assert stream[-1] == expected
        assert all(longer[: len(shorter)] == shorter for shorter, longer in pairwise(stream))
        assert len(stream) > 1


def test_eos_ends_unless_ignored(tmp_path: Path, llm: LLM) -> None:
    eos = llm.generate([7, 8, 9], SamplingParams(max_tokens=4, ignore_eos=True)).token_ids[0]
    model = make_model("llama", tmp_path / "model", eos_token_id=[eos])
    with LLM(str(model)) as other:
        stopped = other.generate([7, 8, 9], SamplingParams(max_tokens=4))
        assert (stopped.finish_reason, stopped.token_ids) == (FinishReason.STOP, (eos,))
        assert len(other.generate([7, 8, 9], SamplingParams(max_tokens=4, ignore_eos=True)).token_ids) == 4


def test_abort_ends_a_request_and_spares_others(llm: LLM) -> None:
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    doomed, other = llm.generate_async([5, 6], params), llm.generate_async([7], SamplingParams(max_tokens=30))
    next(iter(doomed))
    doomed.abort()
    output = doomed.result(timeout=60)
    assert output.finish_reason is FinishReason.ABORT
    assert 1 <= len(output.token_ids) < 200
    assert other.result(timeout=60).finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    doomed.abort()


def test_a_reader_whose_event_loop_is_gone_harms_nobody(llm: LLM) -> None:
    handle = llm.generate_async([5, 6], SamplingParams(max_tokens=100, ignore_eos=True))
    loop, outputs = asyncio.new_event_loop(), aiter(handle)
    loop.run_until_complete(anext(outputs))
    loop.close()
    assert len(handle.result(timeout=60).token_ids) == 100
    assert llm.failure is None


def test_several_requests_are_followed_at_once(llm: LLM) -> None:
    prompts = [[5, 6], [7], [8, 9, 10]]
    expected = [llm.generate(prompt, SamplingParams(max_tokens=4 + len(prompt))) for prompt in prompts]

    async def follow_all() -> list[list[RequestOutput]]:
        handles = [llm.generate_async(prompt, SamplingParams(max_tokens=4 + len(prompt))) for prompt in prompts]
        seen: list[list[RequestOutput]] = [[] for _ in handles]
        async for index, output in follow(handles):
            seen[index].append(output)
        return seen

    for outputs, output in zip(asyncio.run(follow_all()), expected, strict=True):
        assert outputs[-1].token_ids == output.token_ids
        assert outputs[-1].finished
        assert all(len(earlier.token_ids) < len(later.token_ids) for earlier, later in pairwise(outputs))


@pytest.mark.parametrize("num_prompt", [1, 200, 255])
def test_the_largest_max_tokens_fits_and_one_more_does_not(llm: LLM, num_prompt: int) -> None:
    most = llm.max_new_tokens(num_prompt)
    prompt = make_prompt(num_prompt)
    assert llm.generate(prompt, SamplingParams(max_tokens=most)).finished
    with pytest.raises(RequestError, match="exceed the pool's limit"):
        llm.generate(prompt, SamplingParams(max_tokens=most + 1))


def test_shutdown_aborts_what_runs_and_refuses_more(llama: str) -> None:
    llm = LLM(llama, kv_cache_config=KvCacheConfig(max_tokens=2048))
    handle = llm.generate_async([5], SamplingParams(max_tokens=1500, ignore_eos=True))
    next(iter(handle))
    llm.shutdown()
    llm.shutdown()
    assert handle.result(timeout=60).finish_reason is FinishReason.ABORT
    with pytest.raises(EngineDeadError):
        llm.generate([5])


def test_an_error_in_the_forward_pass_reaches_every_caller(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(llama)
    monkeypatch.setattr(llm._core._executor, "forward", lambda *_: torch.zeros(1)[5])
    with pytest.raises(EngineDeadError) as caught:
        llm.generate([5])
    assert isinstance(caught.value.__cause__, IndexError)
    with pytest.raises(EngineDeadError):
        llm.generate([5])
    llm.shutdown()


def test_a_seed_repeats_its_draw_in_any_batch(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, top_k=50, top_p=0.95, seed=11, ignore_eos=True)
    alone = llm.generate([5, 6], params).token_ids
    others = SamplingParams(max_tokens=12, temperature=2.0, ignore_eos=True)
    assert llm.generate([[9, 9], [5, 6], [8]], [others, params, others])[1].token_ids == alone
    assert llm.generate([5, 6], SamplingParams(max_tokens=12, ignore_eos=True)).token_ids != alone


def test_the_sequence_limit_bounds_requests_and_the_default_pool(llama: str) -> None:
    with LLM(Path(llama), kv_cache_config=KvCacheConfig(tokens_per_block=8), max_seq_len=64, max_batch_size=2) as llm:
        assert llm._pool.num_blocks * 8 == 2 * 64
        assert len(llm.generate(make_prompt(60), SamplingParams(max_tokens=4, ignore_eos=True)).token_ids) == 4
        with pytest.raises(RequestError, match="exceed max_seq_len, the limit of 64 tokens"):
            llm.generate(make_prompt(60), SamplingParams(max_tokens=5))
        assert llm.max_new_tokens(60) == 4
    with LLM(llama, kv_cache_config=KvCacheConfig(max_tokens=256), max_seq_len=1 << 20) as llm:
        assert llm._max_positions == 4096, "the model's own limit stands"


@pytest.mark.parametrize(
    ("max_tokens", "fraction", "num_blocks"),
    [
        (None, None, 8 * 4096 // 8),
        (None, 0.25, 125),
        (None, 1.0, 500),
        (400, 0.25, 50),
        (4000, 0.25, 125),
        (4000, None, 500),
    ],
)
def test_a_share_of_the_memory_bounds_the_pool(
    max_tokens: int | None,
    fraction: float | None,
    num_blocks: int,
    llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token_bytes = 3 * 2 * 2 * 8 * 4  # three layers, keys and values, two heads of eight float32
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {4000 * token_bytes // 1024} kB\n")
    monkeypatch.setattr("kvferry.engine.kv_pool._MEMORY_INFO", tmp_path / "meminfo")
    cache = KvCacheConfig(tokens_per_block=8, max_tokens=max_tokens, free_gpu_memory_fraction=fraction)
    with LLM(llama, kv_cache_config=cache) as llm:
        assert llm._pool.num_blocks == num_blocks


def test_ranks_on_a_cpu_share_its_memory() -> None:
    cpu = torch.device("cpu")
    assert most_pool_bytes(1000, 0.5, cpu, 1) == 2 * most_pool_bytes(1000, 0.5, cpu, 2) == 500
    assert most_pool_bytes(1000, 0.5, torch.device("cuda"), 2) == 500
    assert most_pool_bytes(1000, None, torch.device("cuda"), 2) == 800
    assert free_bytes(cpu) > 1 << 20


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ([16, 16, 4096, 16], None),
        ([16, 16, 8192], None),
        ([16, 4096], "layer 1 a window of 4096 tokens, but it attends to a window of 16,"),
        ([16, 16, 512], "layer 2 a window of 512 tokens, but it attends to all of up to 4096,"),
        ([15], "layer 0 a window of 15 tokens"),
    ],
)
def test_windows_that_are_given_are_the_model_s(given: list[int], wrong: str | None, models: dict[str, Path]) -> None:
    cache = KvCacheConfig(max_tokens=256, max_attention_window=given)  # type: ignore[arg-type]
    assert cache.max_attention_window == tuple(given)
    if wrong is None:
        with LLM(str(models["gemma3"]), kv_cache_config=cache) as llm:
            assert len(llm._pool.groups) == 2
        return
    with pytest.raises(RequestError, match=wrong):
        LLM(str(models["gemma3"]), kv_cache_config=cache)


@pytest.mark.gpu
def test_a_pool_on_a_gpu_begins_an_allocation_of_its_own(models: dict[str, Path]) -> None:
    """CUDA IPC shares allocations from their beginning, whatever address in them is named."""
    with LLM(str(models["gemma3"]), device="cuda", kv_cache_config=KvCacheConfig(max_tokens=256)) as llm:
        begins = {segment["address"] for segment in torch.cuda.memory_snapshot()}
        addresses = {pool.data_ptr() for pool in llm._pool.tensors}
        assert len(addresses) == 2
        assert addresses <= begins
        assert llm.generate(make_prompt(40), SamplingParams(max_tokens=2)).token_ids
