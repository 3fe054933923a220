"""Where the halves find their store: a cache server's, or one inside the engine, which serves workers that are other
processes. Knows neither half.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from kvferry.config import StoreOptions
from kvferry.offload.stores import RankStore, open_rank_store, open_store
from kvferry.store.base import BlockStore

_SCHEDULER_SECONDS: Final = 600.0
"""When a worker complains that the scheduler's process serves no store: compiling comes first, and takes minutes."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One of vLLM's engines as one of its processes sees it. is_one_process: scheduler and the only worker share it."""

    engine_id: str
    model: str
    rank: int
    num_ranks: int
    is_one_process: bool

    @property
    def runtime_dir(self) -> Path:
        """Where the scheduler's process serves its own store: a folder that only this user may enter."""
        return Path(tempfile.gettempdir(), f"kvferry-{os.getuid()}", self.engine_id)

    @property
    def ranks_url(self) -> str | None:
        return None if self.is_one_process else f"ipc://{self.runtime_dir / 'store.sock'}"


def open_for_scheduler(engine: Engine, options: StoreOptions) -> tuple[BlockStore | None, Callable[[], None]]:
    """The store, or None if it cannot be made, which was logged; and what to call in the end."""
    if options.server_url is not None or engine.is_one_process:
        return open_store(engine.engine_id, engine.model, options, options.server_url, None)
    engine.runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine.runtime_dir.parent.chmod(0o700)
    store, close_store = open_store(engine.engine_id, engine.model, options, None, engine.ranks_url)

    def close() -> None:
        close_store()
        shutil.rmtree(engine.runtime_dir, ignore_errors=True)

    return store, close


def open_for_worker(engine: Engine, options: StoreOptions) -> tuple[RankStore | None, Callable[[], None]]:
    """The same for a worker. It starts before the scheduler, so only what may wait may call `register`."""
    url = options.server_url
    if url is None and engine.ranks_url is not None:
        url = engine.ranks_url
        options = replace(options, connect_deadline_seconds=_SCHEDULER_SECONDS)
    return open_rank_store(engine.engine_id, engine.model, options, url)
