"""The store of a vLLM engine whose workers are other processes: who finds it, and what is left of it. Without vLLM."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry.config import StoreOptions
from kvferry.integrations.vllm_stores import Engine, open_for_scheduler, open_for_worker
from kvferry.testing.servers import PATIENT, wait_until

DYING = """
import os, signal, sys, tempfile
from kvferry.config import StoreOptions
from kvferry.integrations.vllm_stores import Engine, open_for_scheduler
tempfile.tempdir = sys.argv[1]
store, _ = open_for_scheduler(
    Engine("dying", "model", rank=0, num_ranks=2, num_stages=1, is_one_process=False),
    StoreOptions(l1_size_gb=0.001, arena_dir=sys.argv[1] + "/arenas"),
)
assert store is not None
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files. Its name is short, as those of sockets must be."""
    with tempfile.TemporaryDirectory(prefix="kv-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if not path.is_dir())


def test_what_a_killed_engine_left_the_next_start_removes(folder: Path) -> None:
    """And not what belongs to the living."""
    assert subprocess.run([sys.executable, "-c", DYING, str(folder)], check=False).returncode == -signal.SIGKILL
    dead = files(folder)
    assert sorted(Path(name).suffix for name in dead) == [".arena", ".lock", ".sock"]
    options = StoreOptions(l1_size_gb=0.001, arena_dir=str(folder / "arenas"))
    closes, seen = [], []
    for engine_id in ("first", "second"):
        store, close = open_for_scheduler(Engine(engine_id, "model", 0, 2, 1, is_one_process=False), options)
        assert store is not None
        closes.append(close)
        seen.append(files(folder))
    assert not set(seen[0]) & set(dead)
    assert len(seen[0]) == 3
    assert set(seen[0]) < set(seen[1])
    assert len(seen[1]) == 6
    for close in closes:
        close()
    assert files(folder) == []


def test_a_worker_finds_its_engine_s_store_whatever_the_engine_is_called(folder: Path) -> None:
    engine = Engine("a/name " * 20, "model", rank=1, num_ranks=2, num_stages=1, is_one_process=False)
    options = StoreOptions(l1_size_gb=0.001, arena_dir=str(folder / "arenas"), **PATIENT)
    worker, close_worker = open_for_worker(engine, options)
    assert worker is not None
    store, close_store = open_for_scheduler(engine, options)
    try:
        assert store is not None
        wait_until(lambda: worker.has_other_arena)
    finally:
        close_worker()
        close_store()
    assert files(folder) == []
