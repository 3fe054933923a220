"""The stores that live inside engines of this process, one an engine, shared by the connector's two halves.

Where an engine's ranks are processes of their own, the store lives in that of rank 0 and serves the others on a socket.

Knows how a store and its tiers are put together; not what is stored.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from kvferry.blocks import Tier
from kvferry.config import StoreOptions
from kvferry.connector.config import LlmArgs
from kvferry.errors import ArenaError, StoreError
from kvferry.server.client import StoreClient
from kvferry.server.server import StoreServer
from kvferry.store.arena import Arena
from kvferry.store.disk import DiskStore
from kvferry.store.store import Store
from kvferry.store.tier import ByteTier

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """An engine's store, or None if it could not be made, and how many halves use it."""

    store: Store | None
    server: StoreServer | None = None
    num_users: int = 0

    def serve(self, path: Path) -> None:
        """Let the other ranks in, also if there is no store, which they are then told. Without them there is none."""
        try:
            self.server = StoreServer(self.store, path)
        except StoreError as error:
            logger.warning("KV is not kept beyond the engine's pool: %s", error)
            self.close()
            self.store = None

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
        if self.store is not None:
            self.store.close()


class EmbeddedStores:
    """Stores by engine id, counted by their users. Thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def acquire(self, engine_id: str, options: StoreOptions, runtime_dir: str | None = None) -> Store | None:
        """The engine's store, made for its first user. None: it cannot be made, which was logged once.

        runtime_dir: where it serves the other ranks. Each call is to be paired with a `release`.
        """
        with self._lock:
            entry = self._entries.get(engine_id)
            if entry is None:
                entry = self._entries[engine_id] = _Entry(_make_store(options))
                if runtime_dir is not None:
                    entry.serve(_socket_in(runtime_dir))
            entry.num_users += 1
            return entry.store

    def release(self, engine_id: str) -> None:
        """One user less; after the last the store is closed. Nothing happens if `close` came first."""
        with self._lock:
            entry = self._entries.get(engine_id)
            if entry is None:
                return
            entry.num_users -= 1
            if entry.num_users > 0:
                return
            del self._entries[engine_id]
        entry.close()

    def close(self) -> None:
        """Close every store that is left: of engines that were never shut down."""
        with self._lock:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            entry.close()


def _make_store(options: StoreOptions) -> Store | None:
    """Without its disk folder a store still serves from memory; without memory there is none."""
    tiers: list[ByteTier] = []
    if options.disk_path is not None:
        try:
            disk = DiskStore(options.disk_path, int(options.disk_size_gb * 1e9))
            tiers.append(ByteTier(disk, Tier.DISK, num_threads=options.disk_threads))
        except OSError as error:
            logger.warning("no disk tier, KV is kept in memory alone: %s cannot be used: %s", options.disk_path, error)
    try:
        return Store(options, tiers=tiers)
    except ArenaError as error:
        for tier in tiers:
            tier.close(options.close_deadline_seconds)
        logger.warning("KV is not kept beyond the engine's pool: %s", error)
        return None


@dataclass(frozen=True, slots=True)
class RankStore:
    """What a rank's worker has of the engine's store: `store` to register with and to tell of jobs, and the arena that
    this process maps."""

    store: Store | StoreClient
    arena: Arena


def open_for_rank(llm_args: LlmArgs, options: StoreOptions) -> tuple[RankStore | None, Callable[[], None]]:
    """The engine's store for one rank, or None if there is none, which was logged; and what to call in the end."""
    if llm_args.rank == 0 or llm_args.runtime_dir is None:
        store = EMBEDDED.acquire(llm_args.engine_id, options, llm_args.runtime_dir)
        opened = RankStore(store, store.mapping) if store is not None else None
        return opened, partial(EMBEDDED.release, llm_args.engine_id)
    try:
        client = StoreClient(_socket_in(llm_args.runtime_dir))
    except StoreError as error:
        logger.warning("KV is not kept beyond the engine's pool: %s", error)
        return None, lambda: None
    try:
        arena = Arena.attach(client.arena())
    except ArenaError as error:
        logger.warning("KV is not kept beyond the engine's pool: %s", error)
        return None, client.close

    def close() -> None:
        client.close()
        arena.close()

    return RankStore(client, arena), close


def _socket_in(runtime_dir: str) -> Path:
    return Path(runtime_dir, "store.sock")


EMBEDDED = EmbeddedStores()
atexit.register(EMBEDDED.close)
