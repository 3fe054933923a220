"""Loads and saves beside the passes: nobody waits for them, and however they end, nothing is wrong and none is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry.blocks import Slot
from kvferry.engine.sequence import SequenceStatus
from kvferry.store import assembly
from kvferry.store.disk import DiskStore
from kvferry.testing.fake_engine import FakeEngine
from kvferry.testing.faults import FaultyByteStore
from kvferry.transfer.copy import CopyEngine
from kvferry.transfer.plan import Direction

from .test_connector import NO_REUSE, check_idle, prompt, store_of

MakeEngine = Callable[..., FakeEngine]
LONG_SECONDS = 60.0
"""Longer than any test: who waits for this fails it."""


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FaultyByteStore]]:
    """The disk tiers that engines make from now on, each with faults at command."""
    made: list[FaultyByteStore] = []

    def make(*arguments: Any) -> FaultyByteStore:
        made.append(FaultyByteStore(DiskStore(*arguments)))
        return made[-1]

    monkeypatch.setattr(assembly, "DiskStore", make)
    yield made
    for backend in made:
        backend.gate.set()


@pytest.fixture
def make_cold_engine(make_engine: MakeEngine, backends: list[FaultyByteStore], tmp_path: Path) -> MakeEngine:
    """An engine that finds `prompt(100)` on disk alone; `backends[-1]` is its disk."""

    def make(**options: Any) -> FakeEngine:
        disk = {"disk_path": str(tmp_path / "disk"), "disk_size_gb": 0.01}
        earlier = make_engine(args=NO_REUSE, **disk)
        earlier.run(prompt(100))
        earlier.shutdown()
        return make_engine(num_blocks=256, args=NO_REUSE, **{**disk, "load_deadline_seconds": LONG_SECONDS, **options})

    return make


def test_others_decode_while_a_request_waits_for_disk(
    make_cold_engine: MakeEngine, backends: list[FaultyByteStore]
) -> None:
    engine = make_cold_engine()
    backends[-1].gate.clear()
    loading = engine.add(prompt(100), max_tokens=4)
    other = engine.add(prompt(30, seed=1), max_tokens=20)
    while not other.is_finished:
        engine.step()
    assert loading.status is SequenceStatus.LOADING
    backends[-1].gate.set()
    while not loading.is_finished:
        engine.step()
    assert loading.num_connector_matched_tokens == 96
    assert engine.num_failed_loads == 0
    engine.settle()
    check_idle(engine)


def test_a_read_that_fails_after_the_match_is_a_failed_load(
    make_cold_engine: MakeEngine, backends: list[FaultyByteStore]
) -> None:
    engine = make_cold_engine()
    backends[-1].get_error = OSError("no such luck")
    sequence = engine.run(prompt(100), max_tokens=4)
    assert sequence.num_connector_matched_tokens == 0
    assert engine.num_failed_loads == 1
    check_idle(engine)


def test_a_tier_that_never_answers_costs_its_deadline(
    make_cold_engine: MakeEngine, backends: list[FaultyByteStore]
) -> None:
    engine = make_cold_engine(load_deadline_seconds=0.05)
    backends[-1].gate.clear()
    sequence = engine.run(prompt(100), max_tokens=4)
    assert sequence.num_connector_matched_tokens == 0
    assert engine.num_failed_loads == 1
    assert store_of(engine).stats()["leases"] == 0
    backends[-1].gate.set()
    check_idle(engine)


def test_aborting_while_loading_ends_the_wait_with_the_next_pass(
    make_cold_engine: MakeEngine, backends: list[FaultyByteStore]
) -> None:
    engine = make_cold_engine()
    backends[-1].gate.clear()
    loading = engine.add(prompt(100))
    engine.step()
    assert loading.status is SequenceStatus.LOADING
    engine.abort(loading)
    assert engine.blocks.pools[0].num_free < engine.blocks.num_blocks
    engine.run(prompt(10, seed=1), max_tokens=2)
    engine.settle()
    assert engine.blocks.pools[0].num_free == engine.blocks.num_blocks
    assert store_of(engine).stats()["leases"] == 0
    backends[-1].gate.set()
    check_idle(engine)


@pytest.mark.parametrize("mode", ["auto", "always"])
def test_a_load_from_memory_leaves_the_batch_if_it_is_large(make_engine: MakeEngine, mode: str) -> None:
    large_bytes = 6 * 16 * 192 if mode == "auto" else 1 << 40
    engine = make_engine(num_blocks=256, args=NO_REUSE, async_load=mode, async_load_bytes=large_bytes)
    engine.run(prompt(100))
    large, small = engine.add(prompt(100)), engine.add(prompt(80))
    engine.step()
    assert large.status is SequenceStatus.LOADING
    assert (small.status is SequenceStatus.LOADING) == (mode == "always")
    while not (large.is_finished and small.is_finished):
        engine.step()
    assert (large.num_connector_matched_tokens, small.num_connector_matched_tokens) == (96, 76)
    engine.settle()
    check_idle(engine)


@pytest.fixture
def held_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While clear, copies out of the pool wait for it."""
    may_copy = threading.Event()
    submit = CopyEngine.submit

    def held(self: CopyEngine, direction: Direction, *arguments: Any) -> Any:
        if direction is Direction.FROM_POOL:
            assert may_copy.wait(LONG_SECONDS)
        return submit(self, direction, *arguments)

    may_copy.set()
    monkeypatch.setattr(CopyEngine, "submit", held)
    yield may_copy
    may_copy.set()


def test_saves_overlap_later_passes_and_hold_their_blocks(
    make_engine: MakeEngine, held_copies: threading.Event
) -> None:
    engine = make_engine(num_blocks=40, args=NO_REUSE)
    held_copies.clear()
    saving = engine.add(prompt(100), max_tokens=9)
    while not saving.is_finished:
        engine.step()
    assert engine.scheduler.has_transfers
    waiting = engine.add(prompt(100, seed=1))
    for _ in range(20):
        engine.step()
    assert waiting.status is SequenceStatus.WAITING
    held_copies.set()
    while not waiting.is_finished:
        engine.step()
    engine.settle()
    check_idle(engine)
    assert engine.run(prompt(100)).num_connector_matched_tokens == 96


def test_a_load_does_not_wait_for_saves_under_way(make_engine: MakeEngine, held_copies: threading.Event) -> None:
    engine = make_engine(num_blocks=256, args=NO_REUSE, async_load="always")
    engine.run(prompt(100))
    engine.settle()
    held_copies.clear()
    saving = engine.add(prompt(100, seed=1), max_tokens=2)
    while not saving.is_finished:
        engine.step()
    assert engine.scheduler.has_transfers
    loading = engine.add(prompt(100), max_tokens=2)

    def step() -> bool:
        engine.step()
        return loading.is_finished

    wait_until(step)
    assert loading.num_connector_matched_tokens == 96
    held_copies.set()
    engine.settle()
    check_idle(engine)


def test_a_window_s_blocks_are_saved_before_the_pass_ends(
    make_engine: MakeEngine, held_copies: threading.Event
) -> None:
    engine = make_engine(args={**NO_REUSE, "sliding_windows": (24, None, 24)})
    held_copies.clear()
    engine.add(prompt(60))
    timer = threading.Timer(0.05, held_copies.set)
    timer.start()
    engine.step()
    assert held_copies.is_set(), "the pass waited for the window's copies"
    timer.join()
    engine.settle()
    check_idle(engine)


def test_slots_of_a_save_under_way_are_nobody_else_s_whatever_the_store_believes(
    make_engine: MakeEngine, held_copies: threading.Event
) -> None:
    """The store takes the engine for dead while it copies."""
    engine = make_engine(num_blocks=256, args=NO_REUSE)
    store = store_of(engine)
    held_copies.clear()
    saving = engine.add(prompt(100), max_tokens=2)
    while not saving.is_finished:
        engine.step()
    wait_until(lambda: any(store.mapping.is_locked(slot) for slot in reserved_slots(engine)))
    store.release("local")
    store.check()
    num_withdrawn = store.stats()["slots_withdrawn"]
    assert num_withdrawn > 0
    assert not reserved_slots(engine)
    held_copies.set()
    engine.settle()
    wait_until(lambda: store.poll() is not None and not store.stats()["slots_withdrawn"])
    assert engine.run(prompt(100), max_tokens=2).num_connector_matched_tokens == 0
    check_idle(engine)


def reserved_slots(engine: FakeEngine) -> list[Slot]:
    return [slot for entry in store_of(engine)._index for slot in entry.slots]


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it did not come about")


@pytest.mark.parametrize("during", ["load", "save"])
def test_shutdown_in_the_middle_leaves_nothing(
    make_cold_engine: MakeEngine, backends: list[FaultyByteStore], held_copies: threading.Event, during: str
) -> None:
    engine = make_cold_engine()
    if during == "load":
        backends[-1].gate.clear()
        engine.add(prompt(100))
    else:
        held_copies.clear()
        engine.add(prompt(100, seed=1), max_tokens=2)
    engine.step()
    release = backends[-1].gate if during == "load" else held_copies
    timer = threading.Timer(0.05, release.set)
    timer.start()
    engine.shutdown()
    timer.join()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvferry")]


def test_a_pass_that_breaks_off_before_its_async_load_begins_fails_it(make_engine: MakeEngine) -> None:
    engine = make_engine(args=NO_REUSE, async_load="always")
    engine.run(prompt(40))
    sequence = engine.add(prompt(40))
    plan = engine.scheduler.schedule()
    engine.manager.exchange_metadata(plan.output)
    assert store_of(engine).stats()["leases"] == 1
    engine.scheduler.update(plan.batch, {}, engine.manager.collect())
    assert sequence.status is not SequenceStatus.FINISHED
    assert sequence.num_connector_matched_tokens == 0
    while not sequence.is_finished:
        engine.step()
    engine.settle()
    check_idle(engine)
