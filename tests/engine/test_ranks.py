"""Ranks as processes: the tokens of one rank, and no hang and no leftovers when one of them is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, SamplingParams
from kvferry.errors import EngineDeadError, RequestError
from kvferry.testing.shelf import SHELVES, Shelf, shelf_config

from .conftest import make_prompt

Reference = Callable[[str, list[int], int], list[int]]
BLOCK = 8
LENGTHS = [1, 2, BLOCK, 31, 33, 65]
LOST_WITHIN_SECONDS = 60.0


@contextmanager
def two_ranks(model: str, **options: Any) -> Iterator[LLM]:
    """An engine of two ranks, which must leave no process and no file, however it ends."""
    cache = {"tokens_per_block": BLOCK, "max_tokens": 2048} | options.pop("kv_cache", {})
    with LLM(model, tensor_parallel_size=2, kv_cache_config=KvCacheConfig(**cache), **options) as llm:
        yield llm
    assert_nothing_left(llm)


def assert_nothing_left(llm: LLM) -> None:
    assert llm._ranks is not None
    assert all(process.popen.returncode is not None for process in llm._ranks._processes)
    assert not Path(llm._ranks.runtime_dir).exists()
    assert not engine_threads()


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kvferry-")]


@pytest.mark.parametrize(("family", "chunked"), [("llama", True), ("qwen3", False), ("mistral", True)], ids=str)
def test_tokens_equal_those_of_one_rank(
    family: str, chunked: bool, models: dict[str, Path], reference: Reference
) -> None:
    model = str(models[family])
    prompts = [make_prompt(length, seed=length) for length in LENGTHS]
    num_tokens = 20 if chunked else 128
    with two_ranks(model, max_batch_size=4, max_num_tokens=num_tokens, enable_chunked_prefill=chunked) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=12))
        again = llm.generate(prompts, SamplingParams(max_tokens=12))
        llm.check()
    expected = [reference(model, prompt, 12) for prompt in prompts]
    assert [list(output.token_ids) for output in outputs] == expected
    assert [list(output.token_ids) for output in again] == expected
    assert [output.metrics.num_pool_tokens for output in again] == [(n - 1) // BLOCK * BLOCK for n in LENGTHS]


def test_each_rank_loads_and_saves_its_part(llama: str, reference: Reference) -> None:
    shelf = SHELVES["ranks"] = Shelf()
    prompt = make_prompt(50)
    outputs = []
    try:
        with two_ranks(llama, kv_connector_config=shelf_config("ranks"), kv_cache={"enable_block_reuse": False}) as llm:
            for is_async in (False, False, True, True):
                shelf.asynchronous_loads = shelf.asynchronous_saves = is_async
                outputs.append(llm.generate(prompt, SamplingParams(max_tokens=8)))
            llm.check()
            assert llm.connector_manager is not None
            assert not llm.connector_manager.num_errors
    finally:
        del SHELVES["ranks"]
    assert [output.metrics.num_connector_tokens for output in outputs] == [0, 48, 48, 48]
    expected = reference(llama, prompt, 8)
    assert [list(output.token_ids) for output in outputs] == [expected] * 4
    block_bytes = {block.nbytes for block in shelf.blocks.values()}
    assert block_bytes == {3 * 2 * 1 * BLOCK * 8 * 4}, "three layers, keys and values, half of the KV heads, float32"


@pytest.mark.parametrize(("how", "is_busy"), [("SIGKILL", True), ("SIGKILL", False), ("SIGSTOP", True)])
def test_a_lost_rank_ends_the_engine_and_tells_everyone(how: str, is_busy: bool, llama: str) -> None:
    rng = random.Random()
    with two_ranks(llama, rank_timeout_seconds=4.0, max_num_tokens=16) as llm:
        params = SamplingParams(max_tokens=1000, ignore_eos=True)
        handles = [llm.generate_async(make_prompt(40, seed), params) for seed in range(4 if is_busy else 0)]
        # The moment is random on purpose: in a pass, in a sum, between messages.
        threading.Event().wait(rng.random() * 0.3)
        assert llm._ranks is not None
        os.kill(llm._ranks._processes[0].popen.pid, getattr(signal, how))
        started = time.monotonic()
        why = r"the engine ended during request \d+: the engine has ended: rank 1 " + (
            "was ended by SIGKILL" if how == "SIGKILL" else "showed no life for 4 s and was killed"
        )
        for handle in handles:
            with pytest.raises(EngineDeadError, match=why):
                handle.result(LOST_WITHIN_SECONDS)
        llm._core._thread.join(LOST_WITHIN_SECONDS)
        assert time.monotonic() - started < LOST_WITHIN_SECONDS
        with pytest.raises(EngineDeadError, match="the engine has ended: rank 1"):
            llm.generate([5, 6])
        with pytest.raises(EngineDeadError, match="the engine has ended: rank 1"):
            llm.check()


def test_the_other_ranks_end_with_the_first(llama: str) -> None:
    code = f"""
import time
from kvferry import LLM, KvCacheConfig, SamplingParams
llm = LLM({llama!r}, tensor_parallel_size=2, kv_cache_config=KvCacheConfig(max_tokens=4096))
llm.generate_async([5] * 10, SamplingParams(max_tokens=3000, ignore_eos=True))
print(llm._ranks._processes[0].popen.pid, llm._ranks.runtime_dir, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as leader:
        assert leader.stdout is not None
        pid, folder = leader.stdout.readline().decode().split()
        leader.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and (Path(folder).exists() or is_running(int(pid))):
        threading.Event().wait(0.05)
    assert not is_running(int(pid))
    assert not Path(folder).exists()


def is_running(pid: int) -> bool:
    """A process whose parent does not collect it stays as a zombie: that is over."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


PICKY = """
from kvferry.testing.shelf import ShelfScheduler, ShelfWorker

class PickyWorker(ShelfWorker):
    def __init__(self, llm_args):
        super().__init__(llm_args)
        if llm_args.rank == 1:
            raise RuntimeError("no place for me on rank 1")
"""


def test_a_rank_that_cannot_start_says_why(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picky_connector.py").write_text(PICKY)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = KvCacheConnectorConfig(
        connector_module="picky_connector",
        connector_scheduler_class="ShelfScheduler",
        connector_worker_class="PickyWorker",
        options={"shelf": "picky"},
    )
    SHELVES["picky"] = Shelf()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(EngineDeadError, match="rank 1 cannot start: RuntimeError: no place for me on rank 1"):
        LLM(llama, tensor_parallel_size=2, kv_connector_config=config)
    del SHELVES["picky"]
    assert not list((tmp_path / "temporary").iterdir())
    assert not engine_threads()


@pytest.mark.parametrize("size", [0, -1, 1.5, "2", True])
def test_a_number_of_ranks_that_makes_no_sense_is_refused(size: Any, llama: str) -> None:
    with pytest.raises(RequestError, match="tensor_parallel_size"):
        LLM(llama, tensor_parallel_size=size)


def test_heads_that_do_not_divide_are_refused_and_nothing_is_left(llama: str) -> None:
    with pytest.raises(RequestError, match=r"4 attention heads and 2 KV heads, .* tensor_parallel_size=3"):
        LLM(llama, tensor_parallel_size=3)
    assert not engine_threads()


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.gpu
@needs_two_gpus
def test_tokens_on_two_gpus_equal_those_of_one(llama: str) -> None:
    prompts = [make_prompt(length, seed=length) for length in LENGTHS]
    outputs = []
    for size in (1, 2):
        with LLM(
            llama,
            tensor_parallel_size=size,
            device="cuda",
            max_num_tokens=20,
            kv_cache_config=KvCacheConfig(tokens_per_block=BLOCK, max_tokens=2048),
        ) as llm:
            outputs.append([output.token_ids for output in llm.generate(prompts, SamplingParams(max_tokens=12))])
    assert outputs[0] == outputs[1]


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_lost_rank_on_a_gpu_ends_the_engine(how: str, llama: str) -> None:
    with two_ranks(llama, device="cuda", rank_timeout_seconds=4.0) as llm:
        handle = llm.generate_async(make_prompt(40), SamplingParams(max_tokens=1000, ignore_eos=True))
        next(iter(handle))
        assert llm._ranks is not None
        os.kill(llm._ranks._processes[0].popen.pid, getattr(signal, how))
        with pytest.raises(EngineDeadError, match="rank 1"):
            handle.result(LOST_WITHIN_SECONDS)


@pytest.mark.gpu
def test_more_ranks_than_gpus_are_refused(llama: str) -> None:
    with pytest.raises(RequestError, match="needs more GPUs"):
        LLM(llama, tensor_parallel_size=1 + torch.cuda.device_count(), device="cuda")
