"""Where vLLM's halves find their store: one inside the engine, which serves workers that are other processes.

Knows neither half.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kvferry.blocks import Geometry
from kvferry.config import StoreOptions
from kvferry.errors import ArenaError, StoreError
from kvferry.offload.embedded import EMBEDDED
from kvferry.server.client import StoreClient
from kvferry.store.arena import Arena
from kvferry.store.store import Store

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05
"""How often a worker looks whether the scheduler's process serves its store: it starts after the workers."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One of vLLM's engines as one of its processes sees it. is_one_process: scheduler and the only worker share it."""

    engine_id: str
    rank: int
    num_ranks: int
    is_one_process: bool

    @property
    def runtime_dir(self) -> Path:
        """Where the scheduler's process serves the store: a folder that only this user may enter."""
        return Path(tempfile.gettempdir(), f"kvferry-{os.getuid()}", self.engine_id)


class WorkerStore(Protocol):
    """What a worker asks of a store, which may be in another process."""

    def register(self, engine: str, rank: int, geometry: Geometry) -> None: ...

    def done(self, job_id: int, rank: int, ok: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class RankStore:
    """A worker's way to its store and to the arena. close: to be called when no copy runs any more."""

    store: WorkerStore
    arena: Arena
    close: Callable[[], None]


def open_for_scheduler(engine: Engine, options: StoreOptions) -> tuple[Store | None, Callable[[], None]]:
    """The engine's store, or None if it cannot be made, which was logged; and what to call in the end."""
    folder = None if engine.is_one_process else engine.runtime_dir
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.parent.chmod(0o700)
    store = EMBEDDED.acquire(engine.engine_id, options, None if folder is None else str(folder))

    def close() -> None:
        EMBEDDED.release(engine.engine_id)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    return store, close


def open_for_worker(engine: Engine, options: StoreOptions, closing: threading.Event) -> RankStore | None:
    """The same for a worker, which waits until the scheduler's process serves it or `closing` is set.

    StoreError, ArenaError: it cannot be used from here.
    """
    if engine.is_one_process:
        store = EMBEDDED.acquire(engine.engine_id, options)
        if store is None:
            EMBEDDED.release(engine.engine_id)
            return None
        return RankStore(store, store.mapping, lambda: EMBEDDED.release(engine.engine_id))
    socket = engine.runtime_dir / "store.sock"
    while not socket.exists():
        if closing.wait(_LOOK_SECONDS):
            return None
    client = StoreClient(socket)
    try:
        arena = Arena.attach(client.arena())
    except ArenaError as error:
        client.close()
        raise StoreError(f"the engine's arena cannot be mapped: {error}") from error

    def close() -> None:
        client.close()
        arena.close()

    return RankStore(client, arena, close)
