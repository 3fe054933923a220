"""An engine that is dropped without a word: it ends, with its connector, its threads and its memory."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, SamplingParams
from kvferry.testing.shelf import SHELVES, Shelf, shelf_config

from .conftest import make_prompt

CACHE = KvCacheConfig(tokens_per_block=8, max_tokens=256)
PARAMS = SamplingParams(max_tokens=4)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """The end must not wait for the collector of cycles."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvferry-")]


def test_dropping_an_engine_ends_it_and_frees_its_pool(llama: str) -> None:
    shelf = SHELVES["dropped"] = Shelf()
    try:
        llm = LLM(llama, kv_cache_config=CACHE, kv_connector_config=shelf_config("dropped"))
        llm.generate(make_prompt(40), PARAMS)
        pool = weakref.ref(llm._pool.tensors[0])
        del llm
        assert [call.hook for call in shelf.calls][-2:] == ["worker.shutdown", "scheduler.shutdown"]
        shelf.calls.clear()  # the shelf notes what its worker was given to register
        assert pool() is None
        assert not engine_threads()
    finally:
        del SHELVES["dropped"]


def test_engines_follow_each_other_on_one_name(llama: str) -> None:
    connector = KvCacheConnectorConfig(connector="kvferry", options={"chunk_tokens": 32, "l1_size_gb": 0.05})
    llm = None
    for _ in range(3):
        llm = LLM(llama, kv_cache_config=CACHE, kv_connector_config=connector)
        llm.generate(make_prompt(100), PARAMS)
        # The old engine ends when the new one takes its name.
    assert len([name for name in engine_threads() if name == "kvferry-engine"]) == 1
    del llm
    assert not engine_threads()


def test_a_request_under_way_ends_with_an_engine_that_nobody_holds(llama: str) -> None:
    llm = LLM(llama, kv_cache_config=CACHE)
    handle = llm.generate_async(make_prompt(8), SamplingParams(max_tokens=200, ignore_eos=True))
    del llm
    assert handle.result(timeout=60).finish_reason is not None


def test_an_engine_in_a_cycle_ends_with_the_collector(llama: str) -> None:
    llm = LLM(llama, kv_cache_config=CACHE)
    llm.cycle = llm  # type: ignore[attr-defined]
    del llm
    assert engine_threads()
    gc.collect()
    assert not engine_threads()
