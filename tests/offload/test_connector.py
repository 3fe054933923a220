"""The connector through whole lives of an engine whose KV is known, so that every wrong byte shows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvferry.config import KvCacheConfig
from kvferry.errors import ConfigError
from kvferry.testing.fake_engine import FakeEngine
from kvferry.transfer.copy import CopyEngine
from kvferry.transfer.plan import Direction

MakeEngine = Callable[..., FakeEngine]
CHUNK = 16
NO_REUSE = {"kv_cache_config": KvCacheConfig(tokens_per_block=4, enable_block_reuse=False)}


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [(i * 7 + seed * 1001) % 5000 for i in range(num_tokens)]


def store_of(engine: FakeEngine) -> Any:
    return engine.manager.scheduler._store  # type: ignore[union-attr]


def check_idle(engine: FakeEngine) -> None:
    """Once all copies have ended nothing is leased or half-written, and the store's books are right."""
    store, worker = store_of(engine), engine.manager.worker
    while worker._beside.saves or worker._beside.loads:  # type: ignore[attr-defined]
        worker._beside.take_in(worker._mover.take_ended())  # type: ignore[attr-defined]
    assert store.stats()["leases"] == store.stats()["slots_withdrawn"] == 0
    store.check()
    assert engine.manager.scheduler.stats().get("tokens_to_compute", 0) == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("num_tokens", [1, 4, 15, 16, 17, 31, 32, 33, 63, 64, 65, 150])
def test_a_hit_is_the_kv_that_would_have_been_computed(make_engine: MakeEngine, num_tokens: int) -> None:
    engine = make_engine(args=NO_REUSE)
    cold = engine.run(prompt(num_tokens), max_tokens=5)
    assert cold.num_connector_matched_tokens == 0
    warm = engine.run(prompt(num_tokens), max_tokens=5)
    assert warm.tokens == cold.tokens
    assert warm.num_connector_matched_tokens == min(num_tokens // CHUNK * CHUNK, (num_tokens - 1) // 4 * 4)
    check_idle(engine)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a CUDA build of torch")
def test_a_hit_in_a_pool_on_a_gpu(make_engine: MakeEngine, tmp_path: Path) -> None:
    disk = {"disk_path": str(tmp_path / "disk"), "disk_size_gb": 0.01}
    engine = make_engine(args=NO_REUSE, device="cuda", **disk)
    cold = engine.run(prompt(150), max_tokens=5)
    warm = engine.run(prompt(150), max_tokens=5)
    engine.shutdown()
    other = make_engine(args=NO_REUSE, device="cuda", **disk).run(prompt(150), max_tokens=5)
    assert warm.tokens == cold.tokens == other.tokens
    assert warm.num_connector_matched_tokens == other.num_connector_matched_tokens == 144


def test_generated_tokens_are_saved_too(make_engine: MakeEngine) -> None:
    engine = make_engine(args=NO_REUSE)
    first = engine.run(prompt(10), max_tokens=60)
    following = engine.run([*first.tokens, 1, 2, 3])
    assert following.num_connector_matched_tokens == 64
    check_idle(engine)


def test_a_hit_goes_on_where_the_pools_hit_ends_inside_a_chunk(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=16)
    engine.run(prompt(60))
    engine.run(prompt(26, seed=1))
    again = engine.run(prompt(60))
    assert 0 < again.num_pool_tokens < 48
    assert again.num_pool_tokens % CHUNK
    assert again.num_connector_matched_tokens == 48 - again.num_pool_tokens
    check_idle(engine)


def test_requests_at_once_share_what_the_first_one_saves(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=256, args=NO_REUSE)
    sequences = [engine.add(prompt(40) + prompt(30, seed=i), max_tokens=9) for i in range(8)]
    while not all(sequence.is_finished for sequence in sequences):
        engine.step()
        worker: Any = engine.manager.worker
        worker._mover.flush(list(worker._beside.saves))
    assert any(sequence.num_connector_matched_tokens for sequence in sequences)
    check_idle(engine)


def test_salts_do_not_share(make_engine: MakeEngine) -> None:
    engine = make_engine(args=NO_REUSE)
    engine.run(prompt(40), salt="a")
    assert engine.run(prompt(40), salt="b").num_connector_matched_tokens == 0
    assert engine.run(prompt(40)).num_connector_matched_tokens == 0
    assert engine.run(prompt(40), salt="a").num_connector_matched_tokens == 32


def test_a_later_engine_reads_from_disk_what_an_earlier_one_saved(make_engine: MakeEngine, tmp_path: Path) -> None:
    disk = {"disk_path": str(tmp_path / "disk"), "disk_size_gb": 0.01}
    earlier = make_engine(args=NO_REUSE, **disk)
    cold = earlier.run(prompt(100), max_tokens=5)
    earlier.shutdown()

    later = make_engine(args=NO_REUSE, **disk)
    warm = later.run(prompt(100), max_tokens=5)
    assert warm.num_connector_matched_tokens == 96
    assert warm.tokens == cold.tokens
    assert later.manager.scheduler.stats()["load_tokens_disk"] == 96  # type: ignore[union-attr]
    check_idle(later)

    other_weights = make_engine(args={**NO_REUSE, "model_identity": "others"}, **disk)
    assert other_weights.run(prompt(100)).num_connector_matched_tokens == 0


def test_a_file_that_was_damaged_shortens_the_hit(make_engine: MakeEngine, tmp_path: Path) -> None:
    disk = {"disk_path": str(tmp_path / "disk"), "disk_size_gb": 0.01}
    earlier = make_engine(args=NO_REUSE, **disk)
    earlier.run(prompt(100))
    earlier.shutdown()
    files = [file for file in (tmp_path / "disk").rglob("*") if file.is_file() and file.stat().st_size > 3000]
    assert len(files) == 6
    for file in files[2:4]:
        damaged = bytearray(file.read_bytes())
        damaged[-5] ^= 1
        file.write_bytes(damaged)

    later = make_engine(args=NO_REUSE, **disk)
    first = later.run(prompt(100))
    assert first.num_connector_matched_tokens < 96
    assert later.run(prompt(100)).num_connector_matched_tokens == 96
    check_idle(later)


def test_a_full_store_evicts_and_goes_on(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=128, args=NO_REUSE, l1_size_gb=0.0001)
    for seed in range(12):
        engine.run(prompt(200, seed=seed), max_tokens=3)
        check_idle(engine)
    assert store_of(engine).stats()["evicted_entries"] > 0
    assert engine.run(prompt(200, seed=11)).num_connector_matched_tokens > 0


def test_a_request_that_is_aborted_at_any_step_leaves_nothing_leased(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=128, args={**NO_REUSE, "max_num_tokens": 20})
    engine.run(prompt(40))
    for num_steps in range(9):
        sequence = engine.add(prompt(90), max_tokens=8)
        other = engine.add(prompt(50), max_tokens=8)
        for _ in range(num_steps):
            engine.step()
        engine.abort(sequence)
        check_idle(engine)
        engine.abort(other)
    check_idle(engine)


def overwrite_leased_slots(engine: FakeEngine) -> None:
    """As if the pass came so late that the load's lease lapsed and its slots went to others, as far as they can."""
    store, clock = store_of(engine), store_of(engine)._clock
    store._clock = lambda: clock() + 1e6
    geometry = store.geometry(engine.args.engine_id)
    assert store.stats()["leases"] == 1
    while job := store.begin_store(geometry, [bytes([store._meter.snapshot().get("stored_bytes", 0) % 251]) * 32], 0):
        for part in job.parts:
            store.mapping.view(part.slots[0])[:] = b"\xee" * part.slots[0].num_bytes
        store.done(job.job_id, 0, True)
        if store.stats()["evicted_entries"] > 8:
            break


@pytest.mark.parametrize(("when", "num_failed"), [("before the copy", 1), ("during the copy", 0)])
def test_slots_change_hands_before_a_copy_and_never_during_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, when: str, num_failed: int
) -> None:
    engine = make_engine(args=NO_REUSE, l1_size_gb=0.0001)
    cold = engine.run(prompt(40), max_tokens=3)
    submit = CopyEngine.submit

    def lose_once(*_: object) -> None:
        engine.before_pass = lambda: None
        overwrite_leased_slots(engine)

    def submit_late(self: CopyEngine, *arguments: Any) -> Any:
        monkeypatch.undo()
        lose_once()
        return submit(self, *arguments)

    if when == "before the copy":
        engine.before_pass = lose_once
    else:
        monkeypatch.setattr(CopyEngine, "submit", submit_late)
    assert engine.run(prompt(40), max_tokens=3).tokens == cold.tokens
    assert engine.num_failed_loads == num_failed
    engine.run(prompt(40), max_tokens=3)
    while store_of(engine).poll() is not None and store_of(engine).stats()["slots_withdrawn"]:
        pass  # They are looked at again each tenth of a second.
    check_idle(engine)


@pytest.mark.parametrize("when", ["submit", "wait"])
@pytest.mark.parametrize("direction", Direction)
def test_a_copy_that_fails_costs_its_job_alone(
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    direction: Direction,
    when: str,
) -> None:
    engine = make_engine(args=NO_REUSE)
    cold = engine.run(prompt(40))
    submit = CopyEngine.submit
    failures = iter([True])

    class BrokenCopy:
        def wait(self) -> None:
            raise OSError("the bus is on fire")

    def broken(self: CopyEngine, way: Direction, *arguments: Any) -> Any:
        if way is not direction or not next(failures, False):
            return submit(self, way, *arguments)
        if when == "submit":
            raise OSError("the bus is on fire")
        return BrokenCopy()

    monkeypatch.setattr(CopyEngine, "submit", broken)
    longer = engine.run(prompt(40) + prompt(30, seed=2))
    assert longer.num_connector_matched_tokens == (0 if direction is Direction.TO_POOL else 32)
    assert longer.tokens[:40] == cold.tokens[:40]
    assert engine.num_failed_loads == (1 if direction is Direction.TO_POOL else 0)
    assert "the bus is on fire" in caplog.text
    check_idle(engine)
    engine.run(prompt(40) + prompt(30, seed=2))
    assert engine.run(prompt(40) + prompt(30, seed=2)).num_connector_matched_tokens == 64
    check_idle(engine)


def test_a_pass_that_broke_off_is_given_up(make_engine: MakeEngine) -> None:
    engine = make_engine(args=NO_REUSE)
    engine.run(prompt(40))
    sequence = engine.add(prompt(70), max_tokens=4)
    plan = engine.scheduler.schedule()
    engine.manager.exchange_metadata(plan.output)
    assert store_of(engine).stats()["leases"] == 2
    engine.abort(sequence)
    engine.run(prompt(20, seed=3))
    check_idle(engine)
    assert engine.run(prompt(70)).num_connector_matched_tokens == 32


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_identity": None}, "cannot name"),
        ({"kv_dtype": "float16"}, "element type"),
        ({"num_layers": 2}, "layers"),
        ({"num_kv_heads": 1}, "page"),
    ],
)
def test_what_cannot_be_named_or_is_unknown_is_not_kept(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture, change: dict[str, Any], word: str
) -> None:
    engine = make_engine(args={**NO_REUSE, **change})
    for _ in range(3):
        assert engine.run(prompt(40)).num_connector_matched_tokens == 0
    (message,) = said(caplog)
    assert word in message


def test_a_failed_self_test_keeps_nothing(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvferry.offload.pools.self_test", lambda layout: False)
    engine = make_engine(args=NO_REUSE)
    engine.run(prompt(40))
    assert engine.run(prompt(40)).num_connector_matched_tokens == 0
    assert len(said(caplog)) == 1


def test_chunks_that_cut_blocks_are_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"chunk_tokens=18.*tokens_per_block=4"):
        make_engine(chunk_tokens=18)


def test_an_arena_too_small_for_a_chunk_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="l1_size_gb"):
        make_engine(l1_size_gb=0.000005)
    assert not list(tmp_path.rglob("*.arena"))


def test_without_shared_memory_the_engine_runs_on(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    engine = make_engine(args=NO_REUSE, arena_dir=str(tmp_path / "file" / "arena"))
    engine.run(prompt(40))
    assert engine.run(prompt(40)).num_connector_matched_tokens == 0
    assert len(said(caplog)) == 1


def test_without_a_disk_folder_memory_serves(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    engine = make_engine(args=NO_REUSE, disk_path=str(tmp_path / "file" / "disk"))
    engine.run(prompt(40))
    assert engine.run(prompt(40)).num_connector_matched_tokens == 32
    assert len(said(caplog)) == 1


def test_shutdown_leaves_no_arena_and_no_thread(make_engine: MakeEngine, tmp_path: Path) -> None:
    engine = make_engine(args=NO_REUSE, disk_path=str(tmp_path / "disk"))
    engine.run(prompt(40))
    maps = Path("/proc/self/maps")
    assert str(tmp_path) in maps.read_text(encoding="utf-8")
    engine.shutdown()
    assert str(tmp_path) not in maps.read_text(encoding="utf-8")
    assert not list(tmp_path.rglob("*.arena"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvferry")]


GEMMA_LIKE = {**NO_REUSE, "sliding_windows": (24, None, 24)}
MISTRAL_LIKE = {**NO_REUSE, "sliding_windows": (24, 24, 24)}


@pytest.mark.parametrize("mode", ["never", "always"])
@pytest.mark.parametrize("max_num_tokens", [64, 20])
@pytest.mark.parametrize("groups", [GEMMA_LIKE, MISTRAL_LIKE], ids=["two groups", "one window"])
def test_windows_hit_at_ends_of_chunks(
    make_engine: MakeEngine, groups: dict[str, Any], max_num_tokens: int, mode: str
) -> None:
    """A window's chunks are saved in the pass that completes them, before the engine takes their blocks back."""
    engine = make_engine(num_blocks=128, args={**groups, "max_num_tokens": max_num_tokens}, async_load=mode)
    for num_tokens in (15, 16, 17, 47, 48, 49, 64, 100):
        cold = engine.run(prompt(num_tokens, seed=num_tokens), max_tokens=30)
        warm = engine.run(prompt(num_tokens, seed=num_tokens), max_tokens=30)
        assert warm.tokens == cold.tokens
        assert warm.num_connector_matched_tokens % CHUNK == 0
        assert warm.num_connector_matched_tokens == (num_tokens - 1) // CHUNK * CHUNK
        following = engine.run([*cold.tokens, 1, 2, 3])
        assert following.num_connector_matched_tokens == (num_tokens + 29) // CHUNK * CHUNK
        check_idle(engine)
    assert engine.num_failed_loads == 0


@pytest.mark.parametrize("mode", ["never", "always"])
def test_blocks_behind_a_window_that_were_not_loaded_are_not_shared(make_engine: MakeEngine, mode: str) -> None:
    """A load brings only what the window covers at its end; the pool must not offer the rest to a shorter prompt."""
    engine = make_engine(num_blocks=32, args={"sliding_windows": (24, None, 24)}, async_load=mode)
    engine.run(prompt(100))
    for seed in range(4):
        engine.run(prompt(100, seed=9 + seed))
    warm = engine.run(prompt(100))
    assert warm.num_connector_matched_tokens == 96
    shorter = engine.run(prompt(60))
    assert shorter.num_pool_tokens == 0
    check_idle(engine)
