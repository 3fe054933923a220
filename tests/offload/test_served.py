"""The connector over a cache server: engines share it, come before it, and outlive it."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry.config import KvCacheConfig, KvCacheConnectorConfig
from kvferry.errors import ConfigError
from kvferry.offload.connector import KVFerryConnectorScheduler, KVFerryConnectorWorker
from kvferry.store.arena import Arena
from kvferry.testing.fake_engine import FakeEngine, fake_llm_args
from kvferry.testing.servers import PATIENT, Served, ServerProcess, serve, wait_until

from .test_connector import prompt

CHUNK = 16
NO_REUSE = KvCacheConfig(tokens_per_block=4, enable_block_reuse=False)
MakeEngine = Callable[..., FakeEngine]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """`make_engine(url, arguments of LlmArgs, **options of the store)`, patient unless told otherwise; shut down at the
    end."""
    engines: list[FakeEngine] = []

    def make(url: str, args: dict[str, Any] | None = None, **options: Any) -> FakeEngine:
        known = {**PATIENT, "chunk_tokens": CHUNK}
        connector = KvCacheConnectorConfig(connector="kvferry-server", server_url=url, options=known | options)
        llm_args = fake_llm_args(connector, **{"kv_cache_config": NO_REUSE, **(args or {})})
        engines.append(FakeEngine(llm_args, KVFerryConnectorWorker(llm_args), KVFerryConnectorScheduler))
        return engines[-1]

    yield make
    for engine in engines:
        if not engine.is_shut_down:
            engine.shutdown()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = serve(tmp_path)
    yield served
    served.close()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path, "--chunk-size", "16", "--l1-size-gb", "0.002") as process:
        yield process


def is_on(engine: FakeEngine) -> bool:
    """Whether both halves have a server that knows the engine."""
    scheduler, worker = engine.manager.scheduler, engine.manager.worker
    return scheduler._store.is_alive() and worker._store.is_alive()  # type: ignore[union-attr, attr-defined]


def hit(engine: FakeEngine, num_tokens: int = 100, seed: int = 0) -> int:
    """Tokens that a request found in the store. The engine itself proves that they are the right ones."""
    return engine.run(prompt(num_tokens, seed), max_tokens=3).num_connector_matched_tokens


def assert_saved(engine: FakeEngine, seed: int = 0) -> None:
    """What was saved is hit, as soon as the worker's word has come to the server."""
    wait_until(lambda: hit(engine, seed=seed) == 96)


def test_what_one_engine_saved_the_next_one_hits(served: Served, make_engine: MakeEngine) -> None:
    first, second = make_engine(served.url), make_engine(served.url)
    assert hit(first) == 0
    assert_saved(first)
    assert_saved(second)
    assert hit(second, seed=1) == 0
    first.shutdown()
    assert_saved(second, seed=1)
    assert_saved(make_engine(served.url))
    other_weights = make_engine(served.url, {"model_identity": "others"})
    assert hit(other_weights) == 0
    wait_until(lambda: served.store.stats()["leases"] == 0)


@pytest.mark.parametrize("windows", [(24, None, 24), (10, 10, 10)])
@pytest.mark.parametrize("async_load", ["never", "always"])
def test_groups_of_layers(
    served: Served, make_engine: MakeEngine, windows: tuple[int | None, ...], async_load: str
) -> None:
    args = {"sliding_windows": windows, "max_num_tokens": 32}
    assert hit(make_engine(served.url, args, async_load=async_load)) == 0
    assert hit(make_engine(served.url, args, async_load=async_load)) > 0


def test_a_later_server_reads_what_an_earlier_one_left_on_disk(tmp_path: Path, make_engine: MakeEngine) -> None:
    disk = {"disk_path": str(tmp_path / "disk"), "disk_size_gb": 0.01}
    served = serve(tmp_path, **disk)
    engines = [make_engine(served.url, async_load=mode) for mode in ("never", "always")]
    assert hit(engines[0]) == 0
    assert_saved(engines[0])
    served.close()
    for engine in engines:
        served = serve(tmp_path, **disk)
        wait_until(lambda engine=engine: is_on(engine))  # type: ignore[misc]
        assert_saved(engine)
        assert engine.manager.scheduler.stats()["load_tokens_disk"] == 96  # type: ignore[union-attr]
        served.close()


def test_engines_that_come_before_their_server(tmp_path: Path, make_engine: MakeEngine) -> None:
    engine = make_engine(f"ipc://{tmp_path / 'server.sock'}", connect_deadline_seconds=0.05)
    assert hit(engine) == 0
    served = serve(tmp_path)
    scheduler = engine.manager.scheduler
    wait_until(lambda: scheduler._store.geometry(engine.args.engine_id) is not None)  # type: ignore[union-attr]
    wait_until(lambda: is_on(engine))
    assert hit(engine) == 0
    assert_saved(engine)
    served.close()


def test_chunks_of_another_size_are_an_error_at_the_start(served: Served, make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match="set chunk_tokens=16"):
        make_engine(served.url, chunk_tokens=32)


def test_an_arena_that_is_too_small_is_an_error_at_the_start(tmp_path: Path, make_engine: MakeEngine) -> None:
    served = serve(tmp_path, l1_size_gb=0.000004)
    with pytest.raises(ConfigError, match="does not fit the arena"):
        make_engine(served.url)
    served.close()


def test_a_server_that_is_killed_and_started_again(process: ServerProcess, make_engine: MakeEngine) -> None:
    engine = make_engine(process.url)
    hit(engine)
    assert_saved(engine)
    process.kill()
    assert hit(engine, seed=1) == 0
    process.start()
    wait_until(lambda: is_on(engine))
    assert_saved(engine)
    hit(engine, seed=1)
    assert_saved(engine, seed=1)


def test_a_server_that_leaves_its_memory_to_the_next(tmp_path: Path, make_engine: MakeEngine) -> None:
    with ServerProcess(tmp_path, "--chunk-size", "16", "--l1-size-gb", "0.002") as process:
        plainly, process.arguments = process.arguments, [*process.arguments, "--keep-arena"]
        process.kill()
        process.start()
        engine = make_engine(process.url)
        assert_saved(engine)
        process.popen.terminate()
        assert process.popen.wait(30) == 0
        process.kill()
        process.arguments = plainly
        process.start()
        wait_until(lambda: is_on(engine))
        assert hit(engine) == 96


def test_a_server_that_is_stopped_is_not_waited_for(process: ServerProcess, make_engine: MakeEngine) -> None:
    engine = make_engine(process.url, match_deadline_seconds=0.02, job_deadline_seconds=0.05)
    wait_until(lambda: hit(engine) == 96)
    process.signal(signal.SIGSTOP)
    start = time.monotonic()
    for seed in range(20):
        hit(engine, seed=seed)
    assert time.monotonic() - start < 30.0
    assert engine.manager.scheduler.stats()["client_unanswered"] < 10, "soon it is not asked"  # type: ignore[union-attr]
    process.signal(signal.SIGCONT)
    wait_until(lambda: hit(engine) == 96)


def kill_in_pass(engine: FakeEngine, process: ServerProcess) -> None:
    def kill() -> None:
        engine.before_pass = lambda: None
        process.kill()

    engine.before_pass = kill


@pytest.mark.usefixtures("real_limits")
@pytest.mark.parametrize("async_load", ["never", "always"])
def test_killed_between_the_decision_and_the_copy(
    process: ServerProcess, make_engine: MakeEngine, async_load: str
) -> None:
    """Its memory is still mapped and nobody else writes to it, so loads are good; or they fail, and are computed."""
    engine = make_engine(process.url, async_load=async_load)
    assert_saved(engine)
    kill_in_pass(engine, process)
    assert hit(engine) in {0, 96}
    process.start()
    wait_until(lambda: is_on(engine))
    kill_in_pass(engine, process)
    assert hit(engine, seed=1) == 0
    process.start()
    wait_until(lambda: is_on(engine))
    assert hit(engine, seed=1) == 0
    assert_saved(engine, seed=1)


@pytest.mark.parametrize("async_load", ["never", "auto"])
def test_killed_while_a_load_waits_for_the_disk(tmp_path: Path, make_engine: MakeEngine, async_load: str) -> None:
    """The request is computed as soon as the server's end is known, not when its own deadline comes."""
    served = serve(tmp_path, disk_path=str(tmp_path / "disk"), disk_size_gb=0.01)
    engine = make_engine(served.url, async_load=async_load, load_deadline_seconds=30.0)
    assert_saved(engine)
    served.close()
    served = serve(tmp_path, disk_path=str(tmp_path / "disk"), disk_size_gb=0.01, load_deadline_seconds=30.0)
    wait_until(lambda: is_on(engine))
    promote = served.store._tiers.promote
    served.store._tiers.promote = lambda *_: None  # type: ignore[method-assign, assignment] # the disk hangs
    threading.Timer(0.1, served.server.close).start()
    start = time.monotonic()
    assert hit(engine) == 0
    assert time.monotonic() - start < 15.0
    served.store._tiers.promote = promote  # type: ignore[method-assign]
    served.store.close()


def test_a_worker_copies_nothing_to_the_arena_of_another_boot(tmp_path: Path, make_engine: MakeEngine) -> None:
    """A new server's arena lies where the last one's lay, and has slots with the same offsets."""
    served = serve(tmp_path)
    engine = make_engine(served.url)
    hit(engine)

    def restart() -> None:
        nonlocal served
        engine.before_pass = lambda: None
        served.close()
        shutil.rmtree(tmp_path / "arena")
        served = serve(tmp_path)
        wait_until(lambda: is_on(engine))
        other = serve_another(served.url)
        other.run(prompt(100, seed=7))
        other.shutdown()

    def serve_another(url: str) -> FakeEngine:
        return make_engine(url, {"engine_id": "another"})

    engine.before_pass = restart
    engine.run(prompt(100, seed=1), max_tokens=3)
    engine.settle()
    assert_saved(engine, seed=7)
    arena = Arena.attach(served.store.arena())
    arena.close()
    served.close()


def test_without_a_mover_loads_fail_and_nothing_stays_leased(served: Served, make_engine: MakeEngine) -> None:
    """As when a new server's arena cannot be used for copies."""
    engine = make_engine(served.url)
    hit(engine)
    worker: Any = engine.manager.worker
    worker._mover.close()
    worker._mover = None
    for number in range(1, 4):
        assert hit(engine) == 0
        assert engine.num_failed_loads == number
        assert hit(engine, seed=number) == 0
    wait_until(lambda: served.store.stats()["leases"] == 0)


def test_two_ranks_over_one_server(served: Served) -> None:
    """In one process, driven by hand, as in a host that gives each rank its worker."""
    connector = KvCacheConnectorConfig(
        connector="kvferry-server", server_url=served.url, options={"chunk_tokens": CHUNK}
    )
    args = [fake_llm_args(connector, engine_id="two", tensor_parallel_size=2, rank=rank) for rank in range(2)]
    assert {arg.engine_id for arg in args} == {"two"}
    import torch

    workers = [KVFerryConnectorWorker(arg) for arg in args]
    workers[0].register_kv_caches(torch.zeros(8, 3, 2, 4 * 4))
    scheduler = KVFerryConnectorScheduler(args[0])
    scheduler.wait_for_initialization()
    assert scheduler._planner is None
    workers[1].register_kv_caches(torch.zeros(8, 3, 2, 4 * 4))

    def agreed() -> bool:
        scheduler.wait_for_initialization()
        return scheduler._planner is not None

    wait_until(agreed)
    for half in (*workers, scheduler):
        half.shutdown()
