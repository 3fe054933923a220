"""One store an engine, for as long as one of its halves uses it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kvferry.config import StoreOptions
from kvferry.offload.embedded import EmbeddedStores


def arenas(folder: Path) -> int:
    """Those that are mapped. None has a name, which would be left if this process were killed."""
    assert not list(folder.rglob("*.arena"))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return len({line.split(maxsplit=5)[5] for line in maps if str(folder) in line})


def test_halves_share_a_store_until_the_last_lets_go(tmp_path: Path) -> None:
    stores = EmbeddedStores()
    options = StoreOptions(l1_size_gb=0.001, arena_dir=str(tmp_path))
    first, second, other = (stores.acquire(engine, options) for engine in ("a", "a", "b"))
    assert first is second
    assert first is not other
    assert arenas(tmp_path) == 2
    stores.release("a")
    assert arenas(tmp_path) == 2
    stores.release("a")
    assert arenas(tmp_path) == 1
    again = stores.acquire("a", options)
    assert again is not first
    stores.close()
    assert arenas(tmp_path) == 0


def test_a_store_that_cannot_be_made_is_said_once_and_tried_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    stores = EmbeddedStores()
    options = StoreOptions(
        l1_size_gb=0.001, arena_dir=str(tmp_path / "file" / "arena"), disk_path=str(tmp_path / "disk")
    )
    assert stores.acquire("a", options) is None
    assert stores.acquire("a", options) is None
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    stores.release("a")
    stores.release("a")
