"""Whatever a connector does wrong, the engine goes on with the right tokens, and the log says who did it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvferry import LLM, KvCacheConfig, SamplingParams
from kvferry.config import KvCacheConnectorConfig
from kvferry.connector.api import Request
from kvferry.engine.outputs import FinishReason
from kvferry.testing.shelf import SHELVES, Shelf, ShelfScheduler, ShelfWorker

from .conftest import make_prompt

Reference = Callable[..., list[int]]
BLOCK = 8
PROMPT = make_prompt(5 * BLOCK + 3)
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
FAULTS: dict[str, Any] = {}
"""Hook name to what is called in its place."""


def faulty(base: type) -> type:
    """The class with its hooks looked up in FAULTS first."""

    def wrap(name: str) -> Callable[..., Any]:
        def hook(self: Any, *arguments: Any) -> Any:
            instead = FAULTS.get(name)
            return instead(self, *arguments) if instead is not None else getattr(super(cls, self), name)(*arguments)

        return hook

    names = [name for name in dir(base) if not name.startswith("_") and callable(getattr(base, name))]
    cls = type(f"Faulty{base.__name__}", (base,), {name: wrap(name) for name in names})
    return cls


FaultyScheduler: Any = faulty(ShelfScheduler)
FaultyWorker: Any = faulty(ShelfWorker)


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    SHELVES["test"] = Shelf()
    FAULTS.clear()
    yield SHELVES["test"]
    FAULTS.clear()
    del SHELVES["test"]


def make_llm(model: str, *, max_tokens: int = 64, deadline_seconds: float = 30.0, reuse: bool = False) -> LLM:
    return LLM(
        model,
        kv_cache_config=KvCacheConfig(
            tokens_per_block=BLOCK,
            max_tokens=max_tokens,
            enable_block_reuse=reuse,
            transfer_deadline_seconds=deadline_seconds,
        ),
        kv_connector_config=KvCacheConnectorConfig(
            connector_module=__name__,
            connector_scheduler_class="FaultyScheduler",
            connector_worker_class="FaultyWorker",
            options={"shelf": "test"},
        ),
    )


def fail(*_: Any) -> Any:
    raise RuntimeError("on purpose")


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "kvferry.connector"]


HOOKS = {
    "get_num_new_matched_tokens": 0,
    "update_state_after_alloc_by_layer_group": 0,
    "build_connector_meta": 0,
    "bind_connector_meta": 0,
    "start_load_kv": 0,
    "wait_for_layer_load": 0,
    "save_kv_layer": 40,
    "wait_for_save": 40,
    "get_finished": 40,
    "take_failed_loads": 40,
    "request_finished_by_layer_group": 40,
}
"""Each hook of a request's life, and how many tokens may still count as loaded when it raises."""


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_raises_is_a_miss(
    hook: str, llama: str, shelf: Shelf, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    with make_llm(llama) as llm:
        llm.generate(PROMPT, PARAMS)
        FAULTS[hook] = fail
        outputs = llm.generate([PROMPT, make_prompt(20, seed=2)], PARAMS)
        errors = dict(llm.connector_manager.num_errors)
        FAULTS.clear()
        after = llm.generate(PROMPT, PARAMS)
        llm.check()
    expected = [reference(llama, prompt, 6, True) for prompt in (PROMPT, make_prompt(20, seed=2), PROMPT)]
    assert [list(output.token_ids) for output in (*outputs, after)] == expected
    assert outputs[0].metrics.num_connector_tokens == HOOKS[hook]
    assert after.metrics.num_connector_tokens == 5 * BLOCK
    name = hook.removesuffix("_by_layer_group")
    assert errors[name] > 0
    said = [line for line in complaints(caplog) if "on purpose" in line]
    assert all(f"connector FaultyShelfWorker, hook {name}" in line for line in said)
    assert len(said) == len(set(said)) <= 2, "once per hook and request"


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ((5 * BLOCK + 3 + BLOCK, False), "matched 51 tokens after 0 of a prompt of 43"),
        ((10**9, True), "matched 1000000000 tokens"),
        ((-BLOCK, False), "matched -8 tokens"),
        ((BLOCK + 1, False), "not a multiple of the block size 8"),
        ((0, True), "promised an asynchronous load of 0 tokens"),
        (None, "answered None where"),
        ((1.5, False), "where (tokens, is_async) was asked for"),
    ],
)
def test_a_match_that_makes_no_sense_is_no_match(
    answer: Any, complaint: str, llama: str, shelf: Shelf, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    FAULTS["get_num_new_matched_tokens"] = lambda *_: answer
    FAULTS["update_state_after_alloc_by_layer_group"] = lambda *_: None
    with make_llm(llama) as llm:
        output = llm.generate(PROMPT, PARAMS)
        llm.check()
    assert list(output.token_ids) == reference(llama, PROMPT, 6, True)
    assert output.metrics.num_connector_tokens == 0
    (line,) = complaints(caplog)
    assert complaint in line
    assert "hook get_num_new_matched_tokens for request 1" in line


def test_a_match_of_the_whole_prompt_leaves_its_last_token_to_compute(
    llama: str, shelf: Shelf, reference: Reference
) -> None:
    prompt = make_prompt(5 * BLOCK)

    def match_all(self: Any, request: Request, num_computed: int) -> tuple[int, bool]:
        count, is_async = ShelfScheduler.get_num_new_matched_tokens(self, request, num_computed)
        first, found = self._planned_loads[request.request_id]
        whole = self._hashes(request.get_tokens(0), None)[-1]
        if count and self._is_whole(whole):
            self._planned_loads[request.request_id] = (first, [*found, whole])
            count += BLOCK
        return count, is_async

    FAULTS["get_num_new_matched_tokens"] = match_all
    with make_llm(llama) as llm:
        llm.generate(prompt, PARAMS)
        output = llm.generate(prompt, PARAMS)
    assert output.metrics.num_connector_tokens == 5 * BLOCK - 1
    assert output.metrics.num_computed_tokens == 1
    assert list(output.token_ids) == reference(llama, prompt, 6, True)


def test_a_load_that_never_ends_is_computed_elsewhere_and_its_blocks_stay_taken(
    llama: str, shelf: Shelf, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    with make_llm(llama, max_tokens=256, deadline_seconds=0.1) as llm:
        llm.generate(PROMPT, PARAMS)
        shelf.asynchronous_loads, shelf.may_end_loads = True, False
        output = llm.generate(PROMPT, PARAMS)
        llm.check()
        assert llm._blocks.pools[0].num_free == llm._blocks.num_blocks - 6
        shelf.may_end_loads = True
        while llm._blocks.pools[0].num_free < llm._blocks.num_blocks:
            llm._core.call(lambda: None)
        llm.check()
    assert list(output.token_ids) == reference(llama, PROMPT, 6, True)
    assert output.metrics.num_connector_tokens == 0
    (line,) = complaints(caplog)
    assert "hook get_finished for request 2: has not ended its load after 0.1 s" in line


def test_late_transfers_that_hold_the_pool_end_who_waits_for_it(llama: str, shelf: Shelf) -> None:
    shelf.asynchronous_saves, shelf.may_end_saves = True, False
    with make_llm(llama, max_tokens=64, deadline_seconds=0.1) as llm:
        llm.generate(PROMPT, PARAMS)
        assert llm.generate(PROMPT, PARAMS).finish_reason is FinishReason.ABORT
        shelf.may_end_saves = True
        while llm._scheduler.has_transfers:
            llm._core.call(lambda: None)
        assert llm.generate(PROMPT, PARAMS).finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("kind", [0, 1], ids=["saved", "loaded"])
def test_ids_that_were_never_offered_are_counted(
    kind: int, llama: str, shelf: Shelf, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    answer: tuple[list[int], list[int]] = ([], [])
    answer[kind].append(77)
    FAULTS["get_finished"] = lambda *_: answer
    with make_llm(llama) as llm:
        output = llm.generate(PROMPT, PARAMS)
        assert llm.connector_manager.num_errors == {"get_finished": 6}
        llm.check()
    assert list(output.token_ids) == reference(llama, PROMPT, 6, True)
    (line,) = complaints(caplog)
    assert "request 77 was never offered or is already done" in line


def test_a_hook_that_blocks_is_named_and_the_rest_goes_on(
    llama: str, shelf: Shelf, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    FAULTS["start_load_kv"] = lambda *_: now.append(now[-1] + 100.0)
    with make_llm(llama) as llm:
        llm.connector_manager._clock = lambda: now[-1]
        output = llm.generate(PROMPT, SamplingParams(max_tokens=2))
    assert list(output.token_ids) == reference(llama, PROMPT, 2)
    (line,) = complaints(caplog)
    assert "hook start_load_kv: held the engine up for 100.0 s" in line


def test_loads_may_hold_a_share_of_the_pool_and_no_more(llama: str, shelf: Shelf) -> None:
    prompts = [make_prompt(5 * BLOCK + 3, seed=seed) for seed in range(4)]
    with make_llm(llama, max_tokens=40 * BLOCK) as llm:
        llm.generate(prompts, SamplingParams(max_tokens=1))
        shelf.asynchronous_loads, shelf.may_end_loads = True, False
        shelf.calls.clear()
        handles = [llm.generate_async(prompt, SamplingParams(max_tokens=1)) for prompt in prompts]
        while len(shelf.called("update_state_after_alloc")) < 3:
            llm._core.call(lambda: None)
        for _ in range(20):
            llm._core.call(lambda: None)
        assert len(shelf.called("update_state_after_alloc")) == 3, "18 of 40 blocks; 24 would be more than half"
        shelf.may_end_loads = True
        assert [handle.result(30).metrics.num_connector_tokens for handle in handles] == [5 * BLOCK] * 4


def test_the_log_does_not_repeat_itself(llama: str, shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    FAULTS["wait_for_save"] = fail
    with make_llm(llama) as llm:
        llm.generate(make_prompt(10), SamplingParams(max_tokens=20, ignore_eos=True))
        assert llm.connector_manager.num_errors["wait_for_save"] == 20
    assert len(complaints(caplog)) == 1


def test_halves_of_a_start_that_fails_are_shut_down(llama: str, shelf: Shelf) -> None:
    ended: list[str] = []
    FAULTS["wait_for_initialization"] = fail
    FAULTS["shutdown"] = lambda half: ended.append(type(half).__name__)
    with pytest.raises(RuntimeError):
        make_llm(llama)
    assert ended == ["FaultyShelfWorker", "FaultyShelfScheduler"]
