"""What a store says of options that cannot be right, when it is put together."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvferry.config import StoreOptions
from kvferry.store.assembly import open_store


@pytest.mark.parametrize(("total", "warns"), [(500_000, True), (5_000_000, False)])
def test_an_arena_larger_than_all_shared_memory_is_said_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, total: int, warns: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=total))
    open_store(StoreOptions(l1_size_gb=0.001, arena_dir=str(tmp_path / "arena"))).close()
    assert ("does not fit" in caplog.text) == warns
    assert ("set l1_size_gb lower" in caplog.text) == warns
