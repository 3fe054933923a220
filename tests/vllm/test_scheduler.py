"""vLLM's own scheduler with random requests, completion orders, aborts, preemptions and failed loads, and no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import BLOCK, CHUNK, LAYERS, Simulation

from kvferry.integrations.vllm_messages import FerryMetadata
from kvferry.testing.late_device import LateDevice, Stream
from kvferry.testing.servers import wait_until
from kvferry.transfer.plan import Direction

GROUPS = {
    "full": ("full",),
    "windows": ("full", "window"),
    "states": ("full", "state"),
    "all": ("full", "window", "state"),
}


def drive(simulation: Simulation, *, failing: float) -> None:
    choose = simulation.choose
    # No longer: in pools this small one that vLLM preempted and one that has loaded would wait for each other's blocks.
    stems = [[choose.randrange(2, 50) for _ in range(44)] for _ in range(3)]
    waiting: list[str] = []
    for number in range(14):
        stem = choose.choice(stems)[: choose.randrange(1, 44)]
        prompt = stem + [choose.randrange(2, 50) for _ in range(choose.randrange(1, 12))]
        name = f"request {number}"
        simulation.add(name, prompt, choose.randrange(1, 24), "salt" if choose.random() < 0.2 else None)
        waiting.append(name)
        for _ in range(choose.randrange(8)):
            simulation.step(failing=failing)
        if choose.random() < 0.15:
            simulation.abort(waiting.pop(choose.randrange(len(waiting))))
        if choose.random() < 0.2:
            finish(simulation, failing)  # so that the next one finds an idle engine
        if choose.random() < 0.3:
            simulation.scheduler.reset_prefix_cache()
    finish(simulation, failing)
    last = [choose.randrange(2, 50) for _ in range(5 * CHUNK + 1)]
    for name in ("last", "last again"):
        simulation.add(name, last, 1)
        finish(simulation, failing)
        simulation.scheduler.reset_prefix_cache()


def load_ahead(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> tuple[LateDevice, Stream]:
    """Request "again" has begun to load on a device that stands still, into blocks of zeros."""
    prompt = [7 * at % 48 + 2 for at in range(5 * CHUNK)]
    simulation.add("first", prompt, 1)
    finish(simulation)
    assert simulation.scheduler.reset_prefix_cache()
    device, stream = simulation.device, simulation.stream
    assert device is not None
    assert stream is not None
    monkeypatch.setattr(device, "run", lambda _share: None)
    monkeypatch.setattr(simulation.copies, "run", lambda *_: None)  # which waits for copies
    simulation.add("again", prompt, 1)
    while not simulation.num_ahead:
        simulation.step()
    device.prefer(stream)
    simulation.raw[:] = 0
    return device, stream


@pytest.mark.parametrize(
    ("hook", "writes"),
    [("handle_preemptions", True), ("bind_connector_metadata", True), ("bind_connector_metadata", False)],
)
def test_what_comes_after_a_hook_finds_what_was_loaded_ahead(
    llama: Path, hook: str, writes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = Simulation(llama, GROUPS["full"], 32, 0, is_late=True)
    _, stream = load_ahead(simulation, monkeypatch)
    (blocks,) = simulation.scheduler.kv_cache_manager.get_block_ids("again")
    getattr(simulation.worker, hook)(FerryMetadata(writes=writes))
    seen: list[bool] = []
    stream.enqueue(lambda: seen.append(bool(simulation.raw[:, blocks[: 4 * CHUNK // BLOCK]].all())))
    stream.synchronize()
    assert seen == [True]
    monkeypatch.undo()
    finish(simulation)
    simulation.close()


@pytest.mark.parametrize("silent", [(), (1,)], ids=["", "a layer calls no hook"])
def test_a_layer_is_computed_once_its_own_load_has_ended(
    llama: Path, silent: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = Simulation(llama, GROUPS["full"], 32, 0, is_late=True, silent=silent)
    simulation.share_of_graphs = 0
    load_ahead(simulation, monkeypatch)
    left: dict[int, int] = {}
    attend = simulation._attend

    def look(name: str, layer: int, *rest: Any) -> None:
        left[layer] = sum(not of[-1].query() for copy in copies for of in copy.steps)
        attend(name, layer, *rest)

    copies = simulation.worker._worker._mover._ahead
    monkeypatch.setattr(simulation, "_attend", look)
    finish(simulation)
    assert left == (
        dict.fromkeys(range(LAYERS), 0) if silent else {layer: LAYERS - layer - 1 for layer in range(LAYERS)}
    )
    monkeypatch.undo()
    simulation.close()


@pytest.mark.parametrize("how", ["was aborted", "was aborted some steps ago", "could not load on another rank"])
def test_blocks_that_are_loaded_for_who_does_not_use_them_are_written_to_later(
    llama: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = Simulation(llama, GROUPS["full"], 12, 0, is_late=True, is_second_runner=False)
    simulation.share_of_graphs = 0
    if how == "could not load on another rank":
        half = simulation.worker._worker
        assert half is not None
        end_load = half._end_load
        monkeypatch.setattr(half, "_end_load", lambda number, *, ok: end_load(number, ok=False))
    load_ahead(simulation, monkeypatch)
    if how != "could not load on another rank":
        simulation.abort("again")
    for _ in range(2 * (how == "was aborted some steps ago")):
        simulation.step()
    simulation.add("other", [5 * at % 48 + 2 for at in range(3 * CHUNK)], 1)
    while "other" not in simulation.answers:
        simulation.step()
    monkeypatch.undo()
    finish(simulation)
    simulation.close()


@pytest.mark.parametrize(
    ("is_deferred", "is_alone"), [(True, True), (False, True), (False, False)], ids=["", "not so", "another's part"]
)
def test_vllm_gives_no_block_that_a_pass_under_way_uses(
    llama: Path, is_deferred: bool, is_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loads wait for no pass, so it must not: it would break the check of bytes here. It may where another connector
    has this one inside, whose role is another; there loads wait."""
    monkeypatch.setattr("kvferry.integrations.vllm.has_kv_transfer_group", lambda: not is_alone)
    monkeypatch.setattr("kvferry.integrations.vllm.get_kv_transfer_group", object)
    simulation, prompt = stalled(llama, 11, monkeypatch)
    assert simulation.scheduler.defer_block_free
    simulation.scheduler.defer_block_free = is_deferred
    simulation.add("ended", [5] * (CHUNK - 1), 1)  # it has nothing to save, which would keep its blocks
    simulation.step()
    simulation.abort("ended")
    simulation.add("again", prompt, 1)
    if is_deferred or not is_alone:
        finish(simulation)
        assert simulation.half.stats()["load_tokens_memory"] == 5 * CHUNK - BLOCK
    else:
        with pytest.raises(AssertionError, match="full lacks token 0 of"):
            finish(simulation)
    simulation.close()


def test_a_load_waits_for_no_pass(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation, prompt = stalled(llama, 32, monkeypatch)
    simulation.add("other", [2, 3], 12)
    simulation.step()
    assert simulation.stream is not None
    passed = simulation.stream.record_event()
    loaded: list[bool] = []
    run, end = simulation.copies.run, simulation.copies._end

    def load(job_id: int, **how: bool) -> None:
        end(job_id, **how)
        loaded.append(passed.is_past)

    monkeypatch.setattr(simulation.copies, "_end", load)
    monkeypatch.setattr(simulation.copies, "run", lambda *_: run(1.0))
    simulation.add("again", prompt, 1)
    simulation.step()
    assert loaded == [False]
    monkeypatch.undo()
    finish(simulation)
    simulation.close()


def stalled(llama: Path, num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Simulation, list[int]]:
    """Passes happen when they are waited for, and loads before them if they may. The prompt that is returned can be
    loaded, and is in no block."""
    simulation = Simulation(llama, GROUPS["full"], num_blocks, 0, overlap=True, is_late=True, is_second_runner=False)
    prompt = [7 * at % 48 + 2 for at in range(5 * CHUNK)]
    simulation.add("first", prompt, 1)
    finish(simulation)
    assert simulation.scheduler.reset_prefix_cache()
    mover, device = simulation.worker._worker._mover, simulation.device
    assert device is not None
    device.prefer(mover._copier.cuda.streams[Direction.TO_POOL])
    monkeypatch.setattr(device, "run", lambda _share: None)
    return simulation, prompt


def test_blocks_of_a_request_that_has_ended_stay_until_its_last_pass_is_saved(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planner hears of its end before it plans these saves."""
    simulation = Simulation(llama, GROUPS["full"], 32, 0, saves_late=True)
    pool, half = simulation.scheduler.kv_cache_manager.block_pool, simulation.half
    num_free = pool.get_num_free_blocks()
    prompt = [7 * at % 48 + 2 for at in range(2 * CHUNK + 1)]
    with monkeypatch.context() as patch:
        patch.setattr(simulation.copies, "run", lambda *_: None)
        simulation.add("first", prompt, 1)
        while "first" not in simulation.answers:
            simulation.step()
        for num_leases in (0, 1, 1):
            assert half.stats()["leases"] == num_leases
            assert pool.get_num_free_blocks() < num_free
            simulation.step()
    finish(simulation)
    assert pool.get_num_free_blocks() == num_free
    assert simulation.scheduler.reset_prefix_cache()
    simulation.add("again", prompt, 1)
    finish(simulation)
    assert half.stats()["load_tokens_memory"] == 2 * CHUNK
    simulation.close()


@pytest.mark.parametrize("is_aborted", [False, True], ids=["goes on", "aborted"])
@pytest.mark.parametrize("saves_late", [False, True])
def test_what_loses_its_blocks_between_two_steps_is_not_saved_from_them(
    llama: Path, saves_late: bool, is_aborted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM says who was preempted with the next step, by which the request may have ended."""
    simulation = Simulation(llama, GROUPS["full"], 8, 0, saves_late=saves_late, is_second_runner=False)
    prompt = [7 * at % 48 + 2 for at in range(2 * CHUNK + 1)]
    with monkeypatch.context() as patch:
        patch.setattr(simulation.copies, "run", lambda *_: None)
        simulation.add("first", prompt, 5)
        simulation.step()
        assert simulation.scheduler.reset_prefix_cache(reset_running_requests=True)
        if is_aborted:
            simulation.abort("first")
        simulation.add("other", [11 * at % 48 + 3 for at in range(2 * CHUNK + 1)], 3)
        for _ in range(2):
            simulation.step()
    finish(simulation)
    assert simulation.scheduler.reset_prefix_cache()
    simulation.add("again", prompt, 1)
    finish(simulation)
    simulation.close()


@pytest.mark.parametrize("is_second_runner", [False, True])
def test_saves_end_in_their_pass_where_blocks_are_written_to_before_any_hook(
    llama: Path, is_second_runner: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = Simulation(llama, GROUPS["states"], 46, 0, is_second_runner=is_second_runner)
    prompt = [7 * at % 48 + 2 for at in range(2 * CHUNK)]
    with monkeypatch.context() as patch:
        patch.setattr(simulation.copies, "run", lambda *_: None)
        simulation.add("first", [*prompt, 2], 1)
        while "first" not in simulation.answers:
            simulation.step()
        simulation.raw[:] = 0  # as if "first" had been preempted, and others had its blocks
    finish(simulation)
    assert simulation.scheduler.reset_prefix_cache()
    simulation.add("again", [*prompt, 2], 1)
    if is_second_runner:
        finish(simulation)
        assert simulation.half.stats()["load_tokens_memory"] == 2 * CHUNK
    else:
        with pytest.raises(AssertionError, match="full lacks token 0 of"):
            finish(simulation)
    simulation.close()


def finish(simulation: Simulation, failing: float = 0.0) -> None:
    steps = 0
    while simulation.is_busy:
        simulation.step(failing=failing)
        steps += 1
        assert steps < 3000, "requests hang"
    simulation.copies.run(1.0)  # A load ahead may end after its request has.


@pytest.mark.parametrize("overlap", [False, True], ids=["one step at a time", "overlapping steps"])
@pytest.mark.parametrize("failing", [0.0, 0.2], ids=["", "some loads fail"])
@pytest.mark.parametrize("is_late", [False, True], ids=["", "late device"])
@pytest.mark.parametrize("groups", GROUPS)
def test_every_step_reads_what_was_computed(
    llama: Path, groups: str, is_late: bool, failing: float, overlap: bool
) -> None:
    seen = {"loaded": 0.0, "preempted": 0.0, "failed": 0.0, "ahead": 0, "by layer": 0, "waits": 0}

    @settings(max_examples=16, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.integers(0, 2**32 - 1))
    def run(seed: int) -> None:
        num_blocks = {"full": 32, "windows": 40, "states": 46, "all": 50}[groups]
        simulation = Simulation(llama, GROUPS[groups], num_blocks, seed, overlap=overlap, is_late=is_late)
        try:
            drive(simulation, failing=failing)
            wait_until(lambda: simulation.half.stats()["leases"] == 0)  # The worker's word of an end is on its way.
            stats = simulation.half.stats()
            simulation.half._store.check()
            assert stats["leases"] == stats["tokens_to_compute"] == 0
            assert not (simulation.half._followed or simulation.half._held or simulation.half._loading)
            seen["loaded"] += stats.get("load_tokens_memory", 0)
            seen["preempted"] += simulation.num_preempted
            seen["failed"] += simulation.copies.failures
            seen["ahead"] += simulation.num_ahead
            seen["by layer"] += simulation.num_by_layer
            seen["waits"] += simulation.copies.num_waits
        finally:
            simulation.close()

    run()
    assert seen["loaded"] > 0
    assert seen["preempted"] > 0
    assert (seen["failed"] > 0) == (failing > 0)
    assert (seen["ahead"] > 0) == is_late
    assert (seen["by layer"] > 0) == (is_late and groups == "full")
    assert seen["waits"] > 0 or groups in {"states", "all"}
