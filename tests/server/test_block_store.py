"""A store behind a socket does what every store does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry.blocks import Tier
from kvferry.config import StoreOptions
from kvferry.server.answers import Answerer
from kvferry.server.client import StoreClient
from kvferry.server.endpoint import Endpoint
from kvferry.server.server import StoreServer
from kvferry.store.base import BlockStore, ByteStore
from kvferry.store.managed import ManagedStore
from kvferry.store.tier import ByteTier
from kvferry.testing.block_store import BlockStoreSuite
from kvferry.testing.servers import PATIENT


class ServedStore(StoreClient):
    """A client that takes its server and store with it."""

    def __init__(self, url: str, options: StoreOptions, byte_store: ByteStore | None) -> None:
        tiers = [ByteTier(byte_store, Tier.DISK)] if byte_store is not None else []
        self._store = ManagedStore(options, tiers=tiers)
        self._server = StoreServer(Answerer(self._store, options), Endpoint.parse(url))
        # What a deadline does is tested elsewhere.
        super().__init__(url, dataclasses.replace(options, load_deadline_seconds=60, **PATIENT))

    def close(self) -> None:
        super().close()
        self._server.close()
        self._store.check()
        self._store.close()


class TestServedStore(BlockStoreSuite):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> Iterator[None]:
        self.url = f"ipc://{tmp_path / 'server.sock'}"
        yield
        assert not list(tmp_path.iterdir())

    def make(self, options: StoreOptions, byte_store: ByteStore | None) -> BlockStore:
        return ServedStore(self.url, options, byte_store)
