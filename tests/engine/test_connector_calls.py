"""The engine drives a connector in the order and with the arguments that the API promises."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, SamplingParams
from kvferry.connector.api import NO_BLOCK, SchedulerOutput
from kvferry.engine.outputs import FinishReason
from kvferry.errors import ConnectorError
from kvferry.testing.shelf import SHELVES, Shelf, ShelfScheduler, shelf_config

from .conftest import make_prompt

Reference = Callable[[str, list[int], int], list[int]]
BLOCK = 8
NUM_LAYERS = 3


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    SHELVES["test"] = Shelf()
    yield SHELVES["test"]
    del SHELVES["test"]


def make_llm(model: str, *, max_tokens: int = 512, max_num_tokens: int = 256, reuse: bool = True) -> LLM:
    return LLM(
        model,
        kv_cache_config=KvCacheConfig(tokens_per_block=BLOCK, max_tokens=max_tokens, enable_block_reuse=reuse),
        kv_connector_config=shelf_config("test"),
        max_num_tokens=max_num_tokens,
    )


def outputs_built(shelf: Shelf) -> list[SchedulerOutput]:
    return [call.arguments[0] for call in shelf.called("build_connector_meta")]


def test_pool_is_registered_once_in_the_promised_shape(llama: str, shelf: Shelf) -> None:
    with make_llm(llama):
        pass
    assert shelf.calls[0].hook == "register_kv_cache_layout"
    pool = shelf.calls[0].arguments[0].as_single_pool_tensor()
    assert tuple(pool.shape) == (512 // BLOCK, NUM_LAYERS, 2, 2 * BLOCK * 8)
    assert [call.hook for call in shelf.calls[1:]] == ["worker.shutdown", "scheduler.shutdown"]


def test_n_tokens_are_n_passes_and_a_request_is_new_once(llama: str, shelf: Shelf) -> None:
    prompt = make_prompt(BLOCK * 2 + 6)
    with make_llm(llama) as llm:
        output = llm.generate(prompt, SamplingParams(max_tokens=5, ignore_eos=True))
    built = outputs_built(shelf)
    assert len(built) == 5
    (first,) = built[0].new_requests
    assert (first.new_tokens, first.computed_position, first.num_scheduled_tokens) == (prompt, 0, len(prompt))
    assert len(first.new_block_ids) == 3 == len(set(first.new_block_ids))
    assert len(first.block_hashes) == 2
    assert [len(one.new_requests) for one in built] == [1, 0, 0, 0, 0]
    steps = [one.cached_requests[0] for one in built[1:]]
    assert [step.new_tokens for step in steps] == [[token] for token in output.token_ids[:-1]]
    assert [step.computed_position for step in steps] == [22, 23, 24, 25]
    assert [step.num_scheduled_tokens for step in steps] == [1, 1, 1, 1]
    assert [len(step.new_block_ids) for step in steps] == [0, 0, 1, 0]
    (finished,) = shelf.called("request_finished")
    assert finished.arguments[1] == ((*first.new_block_ids, *steps[2].new_block_ids),)


def test_further_prefill_chunks_bring_nothing_new(llama: str, shelf: Shelf) -> None:
    prompt = make_prompt(50)
    with make_llm(llama, max_num_tokens=20) as llm:
        llm.generate(prompt, SamplingParams(max_tokens=1))
    built = outputs_built(shelf)
    (first,) = built[0].new_requests
    assert (first.new_tokens, len(first.new_block_ids)) == (prompt, 7)
    chunks = [one.cached_requests[0] for one in built[1:]]
    assert [(one.new_tokens, one.new_block_ids) for one in chunks] == [([], [])] * 2
    assert [(one.computed_position, one.num_scheduled_tokens) for one in chunks] == [(20, 20), (40, 10)]


def test_hooks_of_a_pass_come_in_order(llama: str, shelf: Shelf) -> None:
    with make_llm(llama) as llm:
        llm.generate(make_prompt(10), SamplingParams(max_tokens=1))
    layers = [(hook, layer) for layer in range(NUM_LAYERS) for hook in ("wait_for_layer_load", "save_kv_layer")]
    expected = [
        ("get_num_new_matched_tokens", 0),
        ("update_state_after_alloc", None),
        ("build_connector_meta", None),
        ("bind_connector_meta", None),
        ("start_load_kv", None),
        *layers,
        ("wait_for_save", None),
        ("get_finished", None),
        ("request_finished", None),
    ]
    made = shelf.calls[1 : 1 + len(expected)]
    assert [call.hook for call in made] == [hook for hook, _ in expected]
    assert [call.arguments[0] for call in made if call.hook.endswith(("_load", "_layer"))] == [
        layer for _, layer in layers
    ]
    assert made[0].arguments == (1, 0)
    assert [len(of_group) for of_group in made[1].arguments[1]] == [2]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_evicted_prompt_is_loaded_and_tokens_stay(
    asynchronous: bool, llama: str, shelf: Shelf, reference: Reference
) -> None:
    shelf.asynchronous_loads = asynchronous
    prompt = make_prompt(5 * BLOCK + 3)
    with make_llm(llama, max_tokens=64) as llm:
        llm.generate(prompt, SamplingParams(max_tokens=4))
        llm.generate(make_prompt(56, seed=9), SamplingParams(max_tokens=4))  # takes the whole pool
        shelf.calls.clear()
        output = llm.generate(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
        llm.check()
    assert output.metrics.num_connector_tokens == 5 * BLOCK
    assert output.metrics.num_computed_tokens == 3
    expected = reference(llama, prompt, 8)
    assert list(output.token_ids)[: len(expected)] == expected
    news = [data for built in outputs_built(shelf) for data in built.new_requests]
    assert [(data.computed_position, data.num_scheduled_tokens) for data in news] == [(0, 3)]
    assert len(shelf.called("get_num_new_matched_tokens")) == 1
    if asynchronous:
        assert outputs_built(shelf)[0].new_requests == []
        assert shelf.called("get_finished")[0].arguments[1] == (output.request_id,)


def test_others_run_while_a_request_loads(llama: str, shelf: Shelf) -> None:
    prompt = make_prompt(5 * BLOCK + 3)
    with make_llm(llama, max_tokens=256, reuse=False) as llm:
        llm.generate(prompt, SamplingParams(max_tokens=1))
        shelf.asynchronous_loads, shelf.may_end_loads = True, False
        loading = llm.generate_async(prompt, SamplingParams(max_tokens=4))
        other = llm.generate(make_prompt(20, seed=3), SamplingParams(max_tokens=20, ignore_eos=True))
        assert len(other.token_ids) == 20
        assert loading.output.token_ids == ()
        shelf.may_end_loads = True
        assert loading.result(timeout=30).metrics.num_connector_tokens == 5 * BLOCK
        llm.check()


def test_saving_request_keeps_its_blocks_and_the_next_waits(llama: str, shelf: Shelf) -> None:
    shelf.asynchronous_saves, shelf.may_end_saves = True, False
    with make_llm(llama, max_tokens=64) as llm:
        first = llm.generate(make_prompt(50), SamplingParams(max_tokens=2))
        second = llm.generate_async(make_prompt(50, seed=4), SamplingParams(max_tokens=2))
        with pytest.raises(TimeoutError):
            second.result(timeout=0.2)
        assert not shelf.called("update_state_after_alloc")[1:]
        shelf.may_end_saves = True
        assert second.result(timeout=30).finish_reason is FinishReason.LENGTH
        offered = [call.arguments[0] for call in shelf.called("get_finished") if call.arguments[0]]
        assert offered[0] == (first.request_id,)


def test_aborting_a_loading_request_frees_its_blocks_once_the_copy_ends(llama: str, shelf: Shelf) -> None:
    prompt = make_prompt(5 * BLOCK + 3)
    with make_llm(llama, max_tokens=256, reuse=False) as llm:
        llm.generate(prompt, SamplingParams(max_tokens=1))
        shelf.asynchronous_loads, shelf.may_end_loads = True, False
        handle = llm.generate_async(prompt, SamplingParams(max_tokens=4))
        loading = threading.Event()
        while not loading.is_set():
            llm._core.call(lambda: loading.set() if shelf.called("update_state_after_alloc")[1:] else None)
        handle.abort()
        assert handle.result(timeout=30).finish_reason is FinishReason.ABORT
        llm._core.call(lambda: None)
        assert llm._blocks.pools[0].num_free == llm._blocks.num_blocks - 6
        assert [call.arguments for call in shelf.called("cancel_load")] == [(handle.request_id, 0, 5 * BLOCK)]
        shelf.may_end_loads = True
        while llm._blocks.pools[0].num_free < llm._blocks.num_blocks:
            llm._core.call(lambda: None)
        llm.check()


def test_a_model_of_two_layer_groups_is_served_by_group(
    models: dict[str, Path], shelf: Shelf, reference: Reference
) -> None:
    model = str(models["gemma3"])
    prompt = make_prompt(9 * BLOCK + 3)
    expected = reference(model, prompt, 8)
    with make_llm(model, max_tokens=96) as llm:
        layout = shelf.calls[0].arguments[0]
        assert [(group.layer_ids, group.window_size) for group in layout.groups] == [((0, 1, 3), 16), ((2,), None)]
        assert layout.as_single_pool_tensor() is None
        first = llm.generate(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
        llm.generate(make_prompt(88, seed=9), SamplingParams(max_tokens=2))
        shelf.calls.clear()
        loaded = llm.generate(prompt, SamplingParams(max_tokens=8, ignore_eos=True))
        llm.check()
    for output in (first, loaded):
        assert list(output.token_ids)[: len(expected)] == expected
    assert loaded.metrics.num_connector_tokens == 9 * BLOCK
    (new,) = [data for built in outputs_built(shelf) for data in built.new_requests]
    assert new.new_block_ids == []
    assert [len(of_group) for of_group in new.new_block_ids_by_layer_group] == [10, 10]
    (finished,) = shelf.called("request_finished")
    window, full = finished.arguments[1]
    assert [block_id == NO_BLOCK for block_id in window] == [True] * 8 + [False] * 3
    assert NO_BLOCK not in full


def test_blocks_behind_the_window_at_a_pool_hit_do_not_exist(models: dict[str, Path], shelf: Shelf) -> None:
    prompt = make_prompt(9 * BLOCK + 3)
    with make_llm(str(models["gemma3"])) as llm:
        llm.generate(prompt, SamplingParams(max_tokens=1))
        shelf.calls.clear()
        assert llm.generate(prompt, SamplingParams(max_tokens=1)).metrics.num_pool_tokens == 9 * BLOCK
        llm.check()
    (allocated,) = shelf.called("update_state_after_alloc")
    window, full = allocated.arguments[1]
    assert window[:7] == (NO_BLOCK,) * 7
    assert NO_BLOCK not in (*window[7:], *full)


def test_flat_forms_alone_are_refused_by_name_where_there_are_groups(models: dict[str, Path], tmp_path: Path) -> None:
    config = KvCacheConnectorConfig(connector="persistent", options={"folder": str(tmp_path)})
    with pytest.raises(ConnectorError, match=r"PersistentConnectorScheduler lacks update_state_after_alloc_by_layer"):
        LLM(str(models["gemma3"]), kv_connector_config=config)


def test_a_class_with_the_grouped_form_alone_says_so_when_asked_for_the_flat_one() -> None:
    class Grouped(ShelfScheduler):
        pass

    with pytest.raises(NotImplementedError, match="request_finished_by_layer_group, not request_finished"):
        Grouped.request_finished(object.__new__(Grouped), None, [])  # type: ignore[arg-type]


def test_salts_and_priorities_reach_the_connector_and_keep_kv_apart(llama: str, shelf: Shelf) -> None:
    prompt = make_prompt(40)
    found = []
    with make_llm(llama) as llm:
        for salt in ("a", "a", "b", None, None, "b"):
            output = llm.generate(prompt, SamplingParams(max_tokens=1, cache_salt=salt, retention_priority=70))
            found.append(output.metrics.num_pool_tokens)
    assert found == [0, 32, 0, 0, 32, 32]
    news = [data for built in outputs_built(shelf) for data in built.new_requests]
    assert [data.cache_salt for data in news] == ["a", "a", "b", None, None, "b"]
    assert {tuple(data.priorities or ()) for data in news} == {(70,) * 5}
    assert len({tuple(data.block_hashes) for data in news}) == 3
