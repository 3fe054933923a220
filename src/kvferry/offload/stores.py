"""Which store a connector's halves use, by the engine's settings: one inside the engine, or a cache server's.

                     scheduler half   worker half of rank 0   of other ranks, processes of their own
inside the engine    the Store        the Store               a StoreClient of rank 0's process
cache server         a StoreClient    a StoreClient           a StoreClient

Knows no request, no tensor and no job.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from kvferry.blocks import Geometry
from kvferry.config import StoreOptions, default_server_url
from kvferry.connector.config import LlmArgs
from kvferry.offload.embedded import EMBEDDED
from kvferry.server.client import StoreClient
from kvferry.store.arena import Arena
from kvferry.store.base import BlockStore
from kvferry.store.store import Store

SERVER_PRESET: Final = "kvferry-server"

_RANKS_CONNECT_SECONDS: Final = 30.0
"""How long a rank waits for the process of rank 0, which started with it, to make the store."""


class RankStore(Protocol):
    """What a worker half has of a store."""

    def register(self, engine: str, rank: int, geometry: Geometry) -> None:
        """See `BlockStore.register`."""

    def done(self, job_id: int, rank: int, ok: bool) -> None:
        """See `BlockStore.done`."""

    def is_alive(self) -> bool:
        """False: what lower tiers have not brought by now may never come."""

    @property
    def has_other_arena(self) -> bool:
        """Whether there is an arena to copy to and from that nobody has taken. Let go of the last one before."""

    def take_arena(self) -> Arena:
        """The newest arena."""


class _EmbeddedRank:
    """The store in this process, as a `RankStore`."""

    def __init__(self, store: Store) -> None:
        self.has_other_arena = True
        self.register = store.register
        self.done = store.done
        self._store = store

    def is_alive(self) -> bool:
        return True

    def take_arena(self) -> Arena:
        self.has_other_arena = False
        return self._store.mapping


def open_for_scheduler(llm_args: LlmArgs, options: StoreOptions) -> tuple[BlockStore | None, Callable[[], None]]:
    """The store for the scheduler half, or None if it cannot be made, which was logged; and what to call in the end."""
    return open_store(llm_args.engine_id, llm_args.model, options, _server_url(llm_args, options), _ranks_url(llm_args))


def open_for_rank(llm_args: LlmArgs, options: StoreOptions) -> tuple[RankStore | None, Callable[[], None]]:
    """The same for one rank's worker half."""
    url = _server_url(llm_args, options)
    ranks_url = _ranks_url(llm_args)
    if url is None and ranks_url is not None and llm_args.rank > 0:
        url = ranks_url
        options = dataclasses.replace(options, connect_deadline_seconds=_RANKS_CONNECT_SECONDS)
    return open_rank_store(llm_args.engine_id, llm_args.model, options, url, ranks_url)


def open_store(
    engine_id: str, name: str, options: StoreOptions, server_url: str | None, ranks_url: str | None
) -> tuple[BlockStore | None, Callable[[], None]]:
    """For a scheduler half: the cache server's store at `server_url`, or else the engine's own, which is served to
    ranks in other processes at `ranks_url`. name: what a server calls the engine."""
    if server_url is not None:
        client = StoreClient(server_url, options, name=name)
        return client, client.close
    return EMBEDDED.acquire(engine_id, options, ranks_url), partial(EMBEDDED.release, engine_id)


def open_rank_store(
    engine_id: str, name: str, options: StoreOptions, url: str | None, ranks_url: str | None = None
) -> tuple[RankStore | None, Callable[[], None]]:
    """For a worker half: the store that is served at `url`, or else the engine's own in this process."""
    if url is not None:
        client = StoreClient(url, options, name=name, maps_arena=True)
        return client, client.close
    store = EMBEDDED.acquire(engine_id, options, ranks_url)
    return _EmbeddedRank(store) if store is not None else None, partial(EMBEDDED.release, engine_id)


def _server_url(llm_args: LlmArgs, options: StoreOptions) -> str | None:
    """Where the cache server is; None: the store lives inside the engine."""
    config = llm_args.kv_connector_config
    if config.connector != SERVER_PRESET and config.server_url is None:
        return None
    return config.server_url or options.server_url or default_server_url()


def _ranks_url(llm_args: LlmArgs) -> str | None:
    """Where the store of an engine whose ranks are processes serves them."""
    return f"ipc://{Path(llm_args.runtime_dir, 'store.sock')}" if llm_args.runtime_dir is not None else None
