"""What one engine kept, the next one finds: on disk after a restart, in a cache server. What fails is computed."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from vllm_engines import BLOCK, Engine, Expected, running, tokens

from kvferry.errors import ConfigError
from kvferry.testing.servers import PATIENT, ServerProcess, wait_until
from kvferry.transfer.plan import Direction

PROMPTS = [tokens(600 + 37 * seed, 50 + seed) for seed in range(4)]
NUM_TOKENS = 12
HITS = "vllm:external_prefix_cache_hits"


@pytest.fixture(scope="module", params=["llama", "gemma"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def reference(model: Path, expected: Expected) -> list[list[int]]:
    return expected(model, PROMPTS, NUM_TOKENS)


def damage(folder: Path) -> None:
    """Flip a byte in the middle of every file."""
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 4096:
            with path.open("r+b") as file:
                file.seek(path.stat().st_size // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 0xFF]))


def break_next_load(engine: Engine) -> None:
    """The copy of the next load cannot be made: that is what a device's error looks like."""
    copies = engine.worker._mover._engines[0]
    submit = copies.submit

    def broken(direction: Direction, *rest: Any) -> Any:
        if direction is Direction.TO_POOL:
            copies.submit = submit
            raise RuntimeError("injected")
        return submit(direction, *rest)

    copies.submit = broken


def test_from_disk_after_a_restart(
    model: Path, reference: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Damaged files are computed again."""
    disk = tmp_path_factory.mktemp("disk")
    settings: dict[str, Any] = {"extra": {"disk_path": str(disk)}, "num_gpu_blocks_override": 40}
    with running(model, **settings) as engine:
        assert engine.generate(PROMPTS, NUM_TOKENS) == reference
        engine.check()
    with running(model, **settings, policy="fail") as engine:
        assert engine.generate(PROMPTS[:2], NUM_TOKENS) == reference[:2]
        assert engine.count("load_tokens_disk") == engine.metric(HITS) >= 2 * 2 * BLOCK
        damage(disk)
        assert engine.generate(PROMPTS[2:], NUM_TOKENS) == reference[2:]
        engine.check()


def test_a_load_that_fails_is_computed(model: Path, reference: list[list[int]]) -> None:
    """Whatever vLLM's own policy for failed loads, which is to fail the request."""
    with running(model, policy="fail", num_gpu_blocks_override=40) as engine:
        assert engine.generate(PROMPTS, NUM_TOKENS) == reference
        engine.clear_pool()
        break_next_load(engine)
        assert engine.generate(PROMPTS, NUM_TOKENS) == reference
        assert engine.metric("vllm:kvferry_failed_loads") == engine.worker.stats()["jobs_failed"] == 1
        engine.check()


def ask_while_dying(engine: Engine, server: ServerProcess, delay_seconds: float) -> list[list[int]]:
    """The answers, while the server is killed after the delay."""
    dying = threading.Timer(delay_seconds, server.kill)
    dying.start()
    try:
        return engine.generate(PROMPTS, NUM_TOKENS)
    finally:
        dying.join()


def test_a_cache_server_killed_at_any_moment(model: Path, reference: list[list[int]], tmp_path: Path) -> None:
    """What one engine left there the next one finds, and the server's end is missed by nobody: neither when what it had
    in memory is loaded, nor when it was just reading its disk, as after a reboot."""
    choose = random.Random(0)
    tmp_path.chmod(0o700)
    settings: dict[str, Any] = {"num_gpu_blocks_override": 40}
    disk = ["--disk-path", str(tmp_path / "disk")]
    with ServerProcess(tmp_path, "--l1-size-gb", "0.2", *disk) as server:
        settings["extra"] = {"server_url": server.url, **PATIENT}
        with running(model, **settings) as engine:
            assert engine.generate(PROMPTS, NUM_TOKENS) == reference
            engine.settle()
        with running(model, **settings) as engine:
            began = time.monotonic()
            assert engine.generate(PROMPTS, NUM_TOKENS) == reference
            longest = time.monotonic() - began
            assert engine.metric(HITS) >= len(PROMPTS) * 2 * BLOCK
            hits = []
            for round_number in range(6):
                engine.clear_pool()
                before = engine.metric(HITS)
                assert ask_while_dying(engine, server, choose.uniform(0, longest)) == reference
                engine.settle()
                assert not (engine.half._held or engine.half._loading or engine.half._followed)
                hits.append(engine.metric(HITS) - before)
                if round_number % 2 == 0:
                    shutil.rmtree(tmp_path / "arena")
                server.start()
                wait_until(engine.half._store.is_alive)
            assert max(hits) >= len(PROMPTS) * 2 * BLOCK, "no server that came back was used"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"server_url": "ipc:///nowhere/server.sock"}, "no cache server at ipc:///nowhere/server.sock"),
        ({"arena_dir": "/proc/nowhere"}, "no arena can be made in /proc/nowhere"),
    ],
)
def test_without_a_store_vllm_serves_and_says_why(
    llama: Path, expected: Expected, caplog: pytest.LogCaptureFixture, extra: dict[str, Any], said: str
) -> None:
    """And says nothing else, as nobody is waited for."""
    reference = expected(llama, PROMPTS, NUM_TOKENS)
    with running(llama, num_gpu_blocks_override=40, extra=extra) as engine:
        assert engine.generate(PROMPTS, NUM_TOKENS) == reference
        engine.settle()
    ours = {record.getMessage() for record in caplog.records if record.name.startswith("kvferry")}
    assert len(ours) == 1 and said in ours.pop()


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"l1_size": 1}, "unknown option 'l1_size'.* did you mean 'l1_size_gb'"),
        ({"server_url": "http://host:1"}, "neither ipc:///PATH nor tcp://HOST:PORT"),
    ],
)
def test_a_wrong_option_is_refused(llama: Path, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said), running(llama, extra=extra):
        pass
