"""Puts a store and its tiers together, as options say. Knows every kind of tier, and nothing of what is stored."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from kvferry.blocks import Tier
from kvferry.config import StoreOptions
from kvferry.errors import StoreError
from kvferry.store.base import ArenaInfo
from kvferry.store.disk import DiskStore
from kvferry.store.managed import ManagedStore
from kvferry.store.tier import ByteTier

logger = logging.getLogger(__name__)


def open_store(
    options: StoreOptions, *, for_server: bool = False, quotas: Mapping[str, int] = MappingProxyType({})
) -> ManagedStore:
    """A store of an engine's, or of a server's, which adopts the arena that a killed one left. quotas: see `Store`.

    StoreError: shared memory cannot be made; or the disk's folder cannot be used by a server. An engine still serves
    from memory then, after a warning.
    """
    tiers: list[ByteTier] = []
    if options.disk_path is not None:
        try:
            disk = DiskStore(options.disk_path, int(options.disk_size_gb * 1e9))
            tiers.append(ByteTier(disk, Tier.DISK, num_threads=options.disk_threads))
        except OSError as error:
            if for_server:
                raise StoreError(f"the disk tier's folder {options.disk_path} cannot be used: {error}") from error
            logger.warning("no disk tier, KV is kept in memory alone: %s cannot be used: %s", options.disk_path, error)
    try:
        store = ManagedStore(options, tiers=tiers, adopt=for_server, quotas=quotas)
    except StoreError:
        for tier in tiers:
            tier.close(options.close_deadline_seconds)
        raise
    _warn_of_size(store.arena())
    return store


def _warn_of_size(arena: ArenaInfo) -> None:
    """A file's size takes no memory, so only its later growth would fail, and whoever else needs shared memory."""
    folder = Path(arena.path).parent
    num_bytes = shutil.disk_usage(folder).total
    if arena.num_bytes > num_bytes:
        logger.warning(
            "an arena of %.1f GB does not fit %s, which has %.1f GB in all: set l1_size_gb lower, or arena_dir",
            arena.num_bytes / 1e9,
            folder,
            num_bytes / 1e9,
        )
