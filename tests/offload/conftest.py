"""Engines without a model around the connector, with a small store of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry.config import KvCacheConnectorConfig
from kvferry.offload.connector import KVFerryConnectorScheduler, KVFerryConnectorWorker
from kvferry.testing.fake_engine import FakeEngine, fake_llm_args


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A chunk of 16 tokens is 3 KiB here, so the arena holds some hundred."""
    return {"chunk_tokens": 16, "l1_size_gb": 0.001, "arena_dir": str(tmp_path / "arena")}


@pytest.fixture
def make_engine(options: dict[str, Any]) -> Iterator[Callable[..., FakeEngine]]:
    """`make_engine(num_blocks, arguments of LlmArgs, device, **options of the store)`; shut down at the end."""
    engines: list[FakeEngine] = []

    def make(num_blocks: int = 64, args: dict[str, Any] | None = None, device: str = "cpu", **more: Any) -> FakeEngine:
        connector = KvCacheConnectorConfig(connector="kvferry", options={**options, **more})
        llm_args = fake_llm_args(connector, **(args or {}))
        engine = FakeEngine(llm_args, KVFerryConnectorWorker(llm_args), KVFerryConnectorScheduler, num_blocks, device)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        if not engine.is_shut_down:
            engine.shutdown()
