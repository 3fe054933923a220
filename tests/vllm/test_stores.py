"""What one engine kept, the next one finds: on disk after a restart, in a cache server. What fails is computed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_engines import BLOCK, Engine, Expected, running, tokens

from kvferry.transfer.plan import Direction

PROMPTS = [tokens(600 + 37 * seed, 50 + seed) for seed in range(4)]
NUM_TOKENS = 12
PATIENT = {"match_deadline_seconds": 2.0, "job_deadline_seconds": 2.0}
"""So that a busy machine is no reason for a miss."""

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
    """Damaged files are computed again, whatever vLLM's own policy for failed loads."""
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


@pytest.mark.parametrize("policy", ["fail", "recompute"])
def test_a_load_that_fails_is_computed(model: Path, reference: list[list[int]], policy: str) -> None:
    with running(model, policy=policy, num_gpu_blocks_override=40) as engine:
        assert engine.generate(PROMPTS, NUM_TOKENS) == reference
        engine.clear_pool()
        break_next_load(engine)
        assert engine.generate(PROMPTS, NUM_TOKENS) == reference
        assert engine.metric("vllm:kvferry_failed_loads") == engine.worker.stats()["jobs_failed"] == 1
        engine.check()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    url = f"ipc://{tmp_path / 'server' / 'server.sock'}"
    (tmp_path / "server").mkdir(mode=0o700)
    command = [sys.executable, "-m", "kvferry", "server", "--socket", url, "--l1-size-gb", "0.2"]
    process = subprocess.Popen([*command, "--arena-dir", str(tmp_path / "server")])
    deadline = time.monotonic() + 30
    while not (tmp_path / "server" / "server.sock").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield url, process
    process.terminate()
    process.wait(30)


def test_a_cache_server(llama: Path, expected: Expected, server: tuple[str, subprocess.Popen[bytes]]) -> None:
    """Killed, it is missed by nobody."""
    reference = expected(llama, PROMPTS, NUM_TOKENS)
    url, process = server
    settings: dict[str, Any] = {"extra": {"server_url": url, **PATIENT}, "num_gpu_blocks_override": 40}
    with running(llama, **settings) as engine:
        assert engine.generate(PROMPTS, NUM_TOKENS) == reference
        engine.settle()
    with running(llama, **settings) as engine:
        assert engine.generate(PROMPTS, NUM_TOKENS) == reference
        assert engine.metric(HITS) >= len(PROMPTS) * 2 * BLOCK
        engine.clear_pool()
        process.send_signal(signal.SIGKILL)
        assert engine.generate(PROMPTS, NUM_TOKENS) == reference
        engine.settle()
