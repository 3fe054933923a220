"""Servers with a store of the test's own, and their clients."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry.config import StoreOptions
from kvferry.server.client import StoreClient
from kvferry.testing.servers import PATIENT, Served, serve


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = serve(tmp_path)
    yield served
    served.close()
    assert [path.name for path in tmp_path.iterdir()] == ["arena"]
    assert not [thread for thread in threading.enumerate() if thread.name == "kvferry-server"]


@pytest.fixture
def make_client() -> Iterator[Callable[..., StoreClient]]:
    """`make_client(url, maps_arena, **options)`, patient unless told otherwise; closed at the end."""
    clients: list[StoreClient] = []

    def make(url: str, *, maps_arena: bool = False, **options: Any) -> StoreClient:
        known: dict[str, Any] = {**PATIENT, **options}
        clients.append(StoreClient(url, StoreOptions(**known), name="test", maps_arena=maps_arena))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
