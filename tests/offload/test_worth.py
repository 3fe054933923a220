"""Hits that are not worth loading: what the planner does with them, and how what movers measure gets to it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvferry.blocks import GroupKind, GroupSpec, Tier
from kvferry.config import StoreOptions
from kvferry.connector.api import NO_BLOCK, SchedulerOutput
from kvferry.offload import cost
from kvferry.offload.metadata import LoadEnd
from kvferry.offload.planner import Offer, Planner
from kvferry.store import assembly
from kvferry.store.disk import DiskStore
from kvferry.store.keys import chunk_keys, root_key
from kvferry.store.store import Store
from kvferry.store.tier import ByteTier
from kvferry.testing.fake_engine import FakeEngine
from kvferry.testing.faults import FaultyByteStore

from .test_connector import NO_REUSE, check_idle
from .test_connector import prompt as engine_prompt
from .test_planner import BLOCK, CHUNK, GEOMETRY, FakeRequest, Hand, prompt

PART_BYTES = 2_000_000
WINDOW = GroupSpec(GroupKind.WINDOW, (1,), PART_BYTES, window_tokens=CHUNK)


@pytest.fixture(autouse=True)
def parts_are_evident(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a small arena."""
    monkeypatch.setattr(cost, "_EVIDENT_BYTES", PART_BYTES)


class Case(Hand):
    """A planner with a clock of its own, whose loads run beside the passes and take as long as the test says."""

    def __init__(self, folder: Path, *, windows: bool = False, **options: Any) -> None:
        full = GroupSpec(GroupKind.FULL, (0,), PART_BYTES)
        geometry = replace(GEOMETRY, groups=(full, WINDOW) if windows else (full,))
        given = StoreOptions(chunk_tokens=CHUNK, l1_size_gb=0.1, arena_dir=str(folder), async_load="always", **options)
        store = Store(given, tiers=[ByteTier(DiskStore(folder / "parts", 100_000_000), Tier.DISK)])
        store.register("engine", 0, geometry)
        self.now = 0.0
        super().__init__(store, Planner(store, geometry, BLOCK, given, clock=lambda: self.now))
        self.geometry = geometry

    def keep(self, tokens: list[int], salt: str | None = None, lora: str | None = None) -> None:
        assert salt is lora is None
        keys = chunk_keys(root_key(self.geometry), tokens, CHUNK)
        job = self.store.begin_store(self.geometry, keys, 0)
        assert job is not None
        self.store.done(job.job_id, 0, ok=True)

    def admit(self, request: FakeRequest, num_pool_tokens: int = 0) -> int:
        request.num_connector_matched_tokens = self.planner.match(request, num_pool_tokens).num_tokens
        self.planner.allocated(request, [self.blocks_for(len(request.tokens)) for _ in self.geometry.groups])
        return request.num_connector_matched_tokens

    def prefill(self, num_tokens: int, seconds: float) -> None:
        for tokens in (num_tokens, 1, 1):
            self.planner.plan(SchedulerOutput(), {"prompt": tokens})
            self.now += seconds if tokens > 1 else 0.001

    def load(self, tokens: list[int], seconds: float) -> int:
        """The whole life of a request whose load takes so long; returns the tokens loaded."""
        request = FakeRequest(7, tokens)
        if (matched := self.admit(request)) == 0:
            self.planner.finished(7)
            return 0
        (order,) = self.planner.plan(SchedulerOutput()).async_loads
        job = order.job
        while not job.ready and job.job_id not in self.store.poll(10.0).ready:
            pass
        self.store.done(job.job_id, 0, ok=True)
        self.now += seconds
        self.planner.loads_ended([LoadEnd(job.job_id, seconds, ok=True)])
        self.planner.finished(7)
        return matched

    def counted(self, name: str) -> float:
        return self.planner.meter.snapshot().get(name, 0)

    def close(self) -> None:
        self.planner.close()
        assert self.counted("load_bytes_in_flight") == 0
        assert self.store.stats()["leases"] == 0
        self.store.check()
        self.store.close()


@pytest.mark.parametrize("load_when", ["auto", "always"])
def test_a_hit_that_is_slower_than_computing_is_computed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, load_when: str
) -> None:
    case = Case(tmp_path, load_when=load_when)
    case.keep(prompt(65))
    for _ in range(3):
        case.prefill(1000, 0.1)
        assert case.load(prompt(65), 4.0) == 64
    asked, matched = FakeRequest(1, prompt(65)), case.store.stats()["matched_chunks_memory"]
    with caplog.at_level(logging.DEBUG, "kvferry.offload"):
        offers = [case.planner.match(asked, 0) for _ in range(3)]
    assert offers == [Offer(0 if load_when == "auto" else 64, load_when == "always")] * 3
    assert case.store.stats()["matched_chunks_memory"] == matched + 4, "a request that waits for room asks once"
    (line,) = caplog.messages
    if load_when == "auto":
        assert line == "request 1: loads 0 of 64 tokens (slower): 4002.0 ms to load all, 6.4 ms to compute them"
        assert case.num_leases() == 0
        assert case.counted("hits_computed_slower") == 1
        case.now += 31
        assert case.planner.match(asked, 0).num_tokens == 64, "it is looked again how fast the tier is"
    case.close()


@pytest.mark.parametrize("windows", [False, True])
def test_a_hit_is_cut_to_what_lies_in_memory(tmp_path: Path, windows: bool) -> None:
    earlier = Case(tmp_path, windows=windows)
    others = [prompt(CHUNK + 1, seed) for seed in (1, 2)]
    for tokens in [prompt(2 * CHUNK + 1), prompt(4 * CHUNK + 1), *others]:
        earlier.keep(tokens)
    earlier.close()
    case = Case(tmp_path, windows=windows)
    for tokens in (prompt(2 * CHUNK + 1), *others):
        case.prefill(1000, 1.0)
        assert case.load(tokens, 10.0) == len(tokens) - 1
    for _ in range(3):
        assert case.load(prompt(2 * CHUNK + 1), 0.004) == 2 * CHUNK
    assert case.load(prompt(4 * CHUNK + 2), 0.004) == 2 * CHUNK
    assert case.counted("hits_cut") == 1
    case.close()


def test_a_storm_beyond_the_limit_computes(tmp_path: Path) -> None:
    case = Case(tmp_path, max_load_bytes_in_flight=3 * PART_BYTES)
    case.keep(prompt(2 * CHUNK + 1))
    requests = [FakeRequest(number, prompt(2 * CHUNK + 1)) for number in range(3)]
    assert [case.admit(request) for request in requests] == [2 * CHUNK, 0, 0]
    assert case.counted("load_bytes_in_flight") == 2 * PART_BYTES
    assert case.counted("hits_computed_in_flight") == 2
    case.planner.finished(0)
    assert case.admit(FakeRequest(4, prompt(2 * CHUNK + 1))) == 2 * CHUNK
    case.planner.finished(4)
    case.close()


def test_a_storm_is_loaded_as_far_as_that_is_quicker_than_to_queue(tmp_path: Path) -> None:
    """64 hits at once, loaded 4 times as fast as computed, and waits for loads count half: both queues end within the
    time of computing one."""
    case = Case(tmp_path)
    tokens = prompt(40 * CHUNK + 1)
    case.keep(tokens)
    compute_seconds, load_seconds = 0.64, 0.64 / 4
    for _ in range(3):
        case.prefill(1000, 1.0)
        assert case.load(tokens, load_seconds) == 40 * CHUNK
    requests = [FakeRequest(number, tokens) for number in range(64)]
    loaded = sum(case.admit(request) > 0 for request in requests)
    assert abs(loaded * load_seconds / 2 - (64 - loaded) * compute_seconds) <= compute_seconds
    assert case.counted("load_bytes_in_flight") == loaded * 40 * PART_BYTES
    assert case.counted("tokens_to_compute") == (64 - loaded) * len(tokens) + loaded
    for request in requests[:32]:
        for order in case.planner.plan(SchedulerOutput(), {request.request_id: len(tokens)}).async_loads:
            case.store.done(order.job.job_id, 0, ok=True)
            case.planner.loads_ended([LoadEnd(order.job.job_id, load_seconds, ok=True)])
    for request in requests:
        case.planner.finished(request.request_id)
    assert case.counted("tokens_to_compute") == 0
    case.close()


def test_a_computed_hit_counts_by_the_pool_at_the_time_of_its_allocation(tmp_path: Path) -> None:
    """While it waits for room, the pool may get more of it, or lose some."""
    case = Case(tmp_path)
    case.keep(prompt(65))
    for _ in range(3):
        case.prefill(1000, 0.1)
        case.load(prompt(65), 4.0)
    request = FakeRequest(1, prompt(65))
    for num_pool_tokens in (0, 32, 16):
        assert case.planner.match(request, num_pool_tokens) == Offer()
        assert case.counted("tokens_to_compute") == 0
    case.planner.allocated(request, [case.blocks_for(65)])
    assert case.counted("tokens_to_compute") == 49
    case.close()


@pytest.mark.parametrize("why", ["taken in part", "no block"])
def test_a_load_that_is_lost_is_computed(tmp_path: Path, why: str) -> None:
    case = Case(tmp_path)
    case.keep(prompt(65))
    request = FakeRequest(1, prompt(65))
    request.num_connector_matched_tokens = case.planner.match(request, 16).num_tokens - (why == "taken in part") * BLOCK
    blocks = case.blocks_for(65)
    case.planner.allocated(request, [[NO_BLOCK] * len(blocks) if why == "no block" else blocks])
    metadata = case.planner.plan(SchedulerOutput())
    assert (metadata.lost_loads, metadata.async_loads) == ([1], [])
    assert case.counted("tokens_to_compute") == 49
    case.close()


def test_what_movers_measure_of_a_slow_disk_reaches_the_planner(
    make_engine: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first three prompts are loaded, and wait a quarter of a second; the fourth, whose tokens take a few
    milliseconds, is computed."""
    monkeypatch.setattr(cost, "_EVIDENT_BYTES", 1)
    monkeypatch.setattr(cost, "_EVIDENT_PASS_SECONDS", 0.0)
    backends: list[FaultyByteStore] = []

    def make_backend(*arguments: Any) -> FaultyByteStore:
        backends.append(FaultyByteStore(DiskStore(*arguments)))
        return backends[-1]

    monkeypatch.setattr(assembly, "DiskStore", make_backend)
    disk = {"disk_path": str(tmp_path / "disk"), "disk_size_gb": 0.01, "disk_threads": 1}
    earlier = make_engine(args=NO_REUSE, **disk)
    for seed in range(4):
        earlier.run(engine_prompt(81, seed))
    earlier.shutdown()
    engine = make_engine(args=NO_REUSE, **disk)
    for seed in range(4, 8):
        engine.run(engine_prompt(81, seed), max_tokens=4)
    backends[-1].latency_seconds = 0.05
    loaded = [engine.run(engine_prompt(81, seed)).num_connector_matched_tokens for seed in range(4)]
    assert loaded == [80, 80, 80, 0]
    stats = engine.manager.scheduler.stats()  # type: ignore[union-attr]
    assert stats["hits_computed_slower"] == 1
    assert stats["load_bytes_in_flight"] == 0
    assert 0 < stats["load_bytes_per_second_disk"] < 81 * 192 / 0.25
    assert stats["prefill_tokens_per_second"] > 81 / 0.25
    check_idle(engine)
