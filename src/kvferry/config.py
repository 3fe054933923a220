"""Every option of kvferry, and the only reader of the environment and of YAML. Knows nothing that the options configure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvferry.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Options of the store and of the preset `kvferry`. Set by argument, `KVFERRY_<NAME>` or YAML, in that order.

    chunk_tokens: tokens per chunk, a multiple of the engine's block size.
    l1_size_gb: size of the arena in shared memory, in 10^9 bytes.
    eviction_policy: which chunks leave a full arena first.
    arena_dir: folder for the arena; default a private folder of the user's in /dev/shm.
    disk_path: folder of the disk tier; default none.
    disk_size_gb: most that the disk tier may occupy, temporary files included, in 10^9 bytes.
    disk_threads: threads that read and write the disk tier.
    load_deadline_seconds: longest that a request waits for lower tiers before it is computed instead.
    close_deadline_seconds: longest that closing waits for writes to lower tiers.
    log_level: level of the logger `kvferry`.
    """

    chunk_tokens: int = 256
    l1_size_gb: float = 4.0
    eviction_policy: Literal["lru", "s3fifo"] = "lru"
    arena_dir: str | None = None
    disk_path: str | None = None
    disk_size_gb: float = 20.0
    disk_threads: int = 2
    load_deadline_seconds: float = 2.0
    close_deadline_seconds: float = 10.0
    log_level: Literal["debug", "info", "warning", "error"] = "warning"


@dataclass(frozen=True, slots=True)
class KvCacheConfig:
    """The embedded engine's pool.

    tokens_per_block: tokens per block. max_tokens: tokens that the pool holds; default what the model and batch need.
    enable_block_reuse: whether requests share the pool's blocks of a common prefix.
    """

    tokens_per_block: int = 32
    max_tokens: int | None = None
    enable_block_reuse: bool = True


@dataclass(frozen=True, slots=True)
class KvCacheConnectorConfig:
    """Which connector an engine uses: a preset by name, or a module and its two classes.

    server_url: for presets that talk to a server. options: for the connector itself; the preset `kvferry` takes the
    names of `StoreOptions`.
    """

    connector: str | None = None
    connector_module: str | None = None
    connector_scheduler_class: str | None = None
    connector_worker_class: str | None = None
    server_url: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
