"""The stores that live inside engines of this process, one an engine, shared by the connector's two halves.

Where an engine's ranks are processes of their own, the store lives in that of rank 0 and serves the others on a socket.
"""

from __future__ import annotations

import atexit
import logging
import threading
from dataclasses import dataclass

from kvferry.config import StoreOptions
from kvferry.errors import StoreError
from kvferry.server.answers import Answerer
from kvferry.server.endpoint import Endpoint
from kvferry.server.server import StoreServer
from kvferry.store.assembly import open_store
from kvferry.store.managed import ManagedStore
from kvferry.store.store import Store

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """An engine's store, or None if it could not be made, and how many halves use it."""

    store: ManagedStore | None
    server: StoreServer | None = None
    num_users: int = 0

    def serve(self, url: str, options: StoreOptions) -> None:
        """Let the other ranks in, also if there is no store, which they are then told. Without them there is none."""
        answerer = Answerer(self.store, options, is_private=True) if self.store is not None else None
        try:
            self.server = StoreServer(answerer, Endpoint.parse(url))
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

    def acquire(self, engine_id: str, options: StoreOptions, ranks_url: str | None = None) -> Store | None:
        """The engine's store, made for its first user. None: it cannot be made, which was logged once.

        ranks_url: where it serves the other ranks. Each call is to be paired with a `release`.
        """
        with self._lock:
            entry = self._entries.get(engine_id)
            if entry is None:
                entry = self._entries[engine_id] = _Entry(_make_store(options))
                if ranks_url is not None:
                    entry.serve(ranks_url, options)
                elif entry.store is not None:
                    entry.store.mapping.hide()
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


def _make_store(options: StoreOptions) -> ManagedStore | None:
    try:
        return open_store(options)
    except StoreError as error:
        logger.warning("KV is not kept beyond the engine's pool: %s", error)
        return None


EMBEDDED = EmbeddedStores()
atexit.register(EMBEDDED.close)
