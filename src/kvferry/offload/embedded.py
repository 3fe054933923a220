"""The stores that live inside engines of this process, one an engine, shared by the connector's two halves.

Knows how a store and its tiers are put together; not what is stored.
"""

from __future__ import annotations

import atexit
import logging
import threading
from dataclasses import dataclass

from kvferry.blocks import Tier
from kvferry.config import StoreOptions
from kvferry.errors import ArenaError
from kvferry.store.disk import DiskStore
from kvferry.store.store import Store
from kvferry.store.tier import ByteTier

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """An engine's store, or None if it could not be made, and how many halves use it."""

    store: Store | None
    num_users: int = 0


class EmbeddedStores:
    """Stores by engine id, counted by their users. Thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def acquire(self, engine_id: str, options: StoreOptions) -> Store | None:
        """The engine's store, made for its first user. None: it cannot be made, which was logged once.

        Each call is to be paired with a `release`.
        """
        with self._lock:
            entry = self._entries.get(engine_id)
            if entry is None:
                entry = self._entries[engine_id] = _Entry(_make_store(options))
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
        if entry.store is not None:
            entry.store.close()

    def close(self) -> None:
        """Close every store that is left: of engines that were never shut down."""
        with self._lock:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            if entry.store is not None:
                entry.store.close()


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


EMBEDDED = EmbeddedStores()
atexit.register(EMBEDDED.close)
