"""Where the halves find their store: a cache server's, or one inside the engine, which serves workers that are other
processes. Knows neither half.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from kvferry.config import StoreOptions
from kvferry.offload.stores import RankStore, open_rank_store, open_store
from kvferry.server.endpoint import Endpoint, remove_stale
from kvferry.store.base import BlockStore

_SCHEDULER_SECONDS: Final = 600.0
"""When a worker complains that the scheduler's process serves no store: compiling comes first, and takes minutes."""

_SOCKET_PREFIX: Final = "engine-"
"""Of the names of sockets of engines, among those of other servers."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One of vLLM's engines as one of its processes sees it. num_ranks: of all `num_stages` stages of its pipeline.
    is_one_process: scheduler and the only worker share it."""

    engine_id: str
    model: str
    rank: int
    num_ranks: int
    num_stages: int
    is_one_process: bool

    @property
    def ranks_url(self) -> str | None:
        """Where the scheduler's process serves its own store to the workers, if they are other processes."""
        if self.is_one_process:
            return None
        name = hashlib.sha256(self.engine_id.encode()).hexdigest()[:16]  # Of any length and letters; paths are not.
        return f"ipc://{Path(tempfile.gettempdir(), f'kvferry-{os.getuid()}', f'{_SOCKET_PREFIX}{name}.sock')}"


def open_for_scheduler(engine: Engine, options: StoreOptions) -> tuple[BlockStore | None, Callable[[], None]]:
    """The store, or None if it cannot be made, which was logged; and what to call in the end."""
    if options.server_url is not None or engine.is_one_process:
        return open_store(engine.engine_id, engine.model, options, options.server_url, None)
    assert engine.ranks_url is not None
    # vLLM kills its processes when they take long to end, and then nobody removes their files.
    remove_stale(Endpoint.parse(engine.ranks_url), _SOCKET_PREFIX)
    return open_store(engine.engine_id, engine.model, options, None, engine.ranks_url)


def open_for_worker(engine: Engine, options: StoreOptions) -> tuple[RankStore | None, Callable[[], None]]:
    """The same for a worker. It starts before the scheduler, so only what may wait may call `register`."""
    url = options.server_url
    if url is None and engine.ranks_url is not None:
        url = engine.ranks_url
        options = replace(options, connect_deadline_seconds=_SCHEDULER_SECONDS)
    return open_rank_store(engine.engine_id, engine.model, options, url)
