"""The vocabulary that all layers share, as frozen dataclasses and enums. Imports nothing of kvferry.

========  =====================================================================================
block     an engine's page: `tokens_per_block` tokens in the engine's pool
chunk     the store's unit: `chunk_tokens` consecutive tokens, a multiple of the block size
group     layers that share block ids
key       the 32-byte content name of a chunk
part      one rank's bytes of one group of one chunk
slot      where a part lies in the arena
lease     the right to read or fill slots, owned by a client, with a deadline
job       a batch of copies between slots and blocks
========  =====================================================================================
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class GroupKind(enum.Enum):
    """What a group of layers must find at a boundary to go on from there."""

    FULL = "full"
    """Full attention: every chunk before the boundary."""
    WINDOW = "window"
    """Sliding window: the chunks that the window still covers at the boundary."""
    STATE = "state"
    """Recurrent state: exactly the state at the boundary, which lies in the chunk that ends there."""


class Tier(enum.IntEnum):
    """Where a part's bytes are, nearest first."""

    MEMORY = 0
    DISK = 1
    REMOTE = 2


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """One group of layers.

    `part_bytes` is one rank's bytes of this group of one chunk; `window_tokens` is set for `GroupKind.WINDOW` alone.
    is_shared: all ranks have equal bytes, as of the latents of multi-head latent attention: rank 0 saves the only part,
    and every rank loads it.
    """

    kind: GroupKind
    layers: tuple[int, ...]
    part_bytes: int
    window_tokens: int | None = None
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Geometry:
    """All that the bytes of a cached chunk depend on besides its tokens.

    identity: names the weights, KV dtype and partition (see `offload.planner`). Two engines whose geometries are
    equal may read each other's chunks; any difference keeps them apart, because the geometry is hashed into every key.
    layout: fingerprint of the order of bytes within a part.
    """

    identity: str
    layout: str
    chunk_tokens: int
    num_ranks: int
    groups: tuple[GroupSpec, ...]

    def num_parts(self, group: int) -> int:
        """Parts that a chunk has of this group."""
        return 1 if self.groups[group].is_shared else self.num_ranks

    @property
    def chunk_bytes(self) -> int:
        """All parts of a chunk."""
        return sum(spec.part_bytes * self.num_parts(group) for group, spec in enumerate(self.groups))


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a part lies: `num_bytes` from `offset` in the arena.

    `generation` is the value that the slot's header holds for as long as the slot keeps this part.
    """

    offset: int
    num_bytes: int
    generation: int


@dataclass(frozen=True, slots=True)
class Part:
    """One group of one chunk of a job. `chunk` counts from the prompt's start; `slots[rank]` is that rank's slot, or
    there is one that all ranks share."""

    chunk: int
    group: int
    slots: tuple[Slot, ...]


class JobKind(enum.Enum):
    """Which way a job's bytes go."""

    LOAD = "load"
    """Arena to engine."""
    STORE = "store"
    """Engine to arena."""


@dataclass(frozen=True, slots=True)
class Job:
    """Copies that the store has leased slots for.

    ready: false where a load still waits for lower tiers; `BlockStore.poll` then reports it ready or failed.
    """

    job_id: int
    kind: JobKind
    parts: tuple[Part, ...]
    ready: bool = True
