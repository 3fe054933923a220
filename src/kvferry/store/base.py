"""The store's two seams: what a storage backend writes (`ByteStore`) and all that offloading sees (`BlockStore`).

Knows no engine, no request and no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvferry.blocks import Geometry, Job, Tier

PartName = bytes
"""The name of a part below memory: key, group and rank (`keys.part_name`)."""


@dataclass(frozen=True, slots=True)
class Match:
    """The longest loadable prefix: `num_chunks` chunks; `tiers[i]` is the farthest tier that chunk i needs."""

    num_chunks: int
    tiers: tuple[Tier, ...] = ()


@dataclass(frozen=True, slots=True)
class PollResult:
    """Load jobs whose lower tiers have answered since the last poll, each job id in exactly one of the two."""

    ready: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ArenaInfo:
    """How a worker finds and trusts the arena: its file, its size in bytes and the store's boot id."""

    path: str
    num_bytes: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class Selection:
    """Entries in memory for which every condition holds that is not None.

    geometry_tags, salt_tag: what they were stored under (`keys.geometry_tag`, `keys.salt_tag`). keys: of their chunks.
    unused_seconds: how long they have not been stored, loaded or asked for by a load, at least.
    """

    geometry_tags: frozenset[bytes] | None = None
    salt_tag: bytes | None = None
    keys: frozenset[bytes] | None = None
    unused_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """How much a command concerned. An entry is one group of one chunk, of all ranks; bytes are its parts'."""

    num_entries: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What lies in memory under one geometry and salt. identity: the geometry's, or None if no engine has declared it
    since the store was opened."""

    geometry_tag: bytes
    salt_tag: bytes
    identity: str | None
    num_entries: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Entries that a prompt needs: all that some tier has, those in memory, and those on their way there."""

    num_entries: int
    num_in_memory: int
    num_under_way: int


class ByteStore(Protocol):
    """A storage backend: bytes by name. Blocking and thread-safe.

    A value is immutable: two puts of one name carry equal bytes. A name whose value is damaged is a miss.
    Methods raise OSError (or a subclass) when the backend cannot be reached or written; `ByteTier` counts that.
    """

    def put(self, name: PartName, view: memoryview) -> None:
        """Store `view` under `name`; it becomes visible to others whole or not at all."""

    def get_into(self, name: PartName, view: memoryview) -> bool:
        """Fill `view` with the value and return True, or return False if it is absent, damaged or of another length."""

    def contains(self, names: Sequence[PartName]) -> list[bool]:
        """Say of each name whether a value is held, without reading it."""

    def delete(self, names: Sequence[PartName]) -> None:
        """Forget these names; absent ones are no error."""

    def touch(self, names: Sequence[PartName]) -> None:
        """These values were used, from memory above. A backend that gives up what is longest unused takes note; it
        must not take long."""

    def close(self) -> None:
        """Release what the backend holds. Further calls are errors."""


class BlockStore(Protocol):
    """A content-addressed store of chunks: all that `offload` sees of `kvferry.store` or of a server.

    Every method returns within the deadline of its mode and raises nothing but `ConfigError` (from `register`) and
    `InvariantError` (from `check`): whatever goes wrong is a miss. A job's life: `begin_*`, copies by every rank,
    `done` by every rank; or `cancel`, if no rank was told of it.
    """

    def register(self, engine: str, rank: int, geometry: Geometry) -> None:
        """Declare the geometry of one rank of one engine. ConfigError: a slot of this geometry cannot fit the arena,
        or another rank of this engine declared another geometry."""

    def geometry(self, engine: str) -> Geometry | None:
        """The geometry on which all ranks of this engine agree; None until every rank has registered."""

    def arena(self) -> ArenaInfo:
        """Where the slots lie."""

    def match(self, geometry: Geometry, keys: Sequence[bytes]) -> Match:
        """The longest loadable prefix of `keys` by the hit rule (`kvferry.hit.longest_hit`). Takes no lease."""

    def locate(self, geometry: Geometry, keys: Sequence[bytes]) -> Sequence[Tier | None]:
        """The farthest tier that each chunk's full attention needs; None: not all of it is anywhere. Empty: it cannot
        be said now. Takes no lease and counts nothing."""

    def begin_load(
        self, geometry: Geometry, keys: Sequence[bytes], first_chunk: int, *, salt: str | None = None
    ) -> Job | None:
        """Lease the slots that an engine needs to go on after the last of `keys` when it already has the chunks before
        `first_chunk`. Parts on lower tiers start on their way into memory. None: no longer all there, or no room.

        salt: the cache salt that is part of the keys, for quotas and those who list what is kept."""

    def begin_store(
        self, geometry: Geometry, keys: Sequence[bytes], first_chunk: int, *, salt: str | None = None
    ) -> Job | None:
        """Reserve slots for those parts of `keys[first_chunk:]` that the store lacks, as many as there is room for,
        in order. None: nothing to store. salt: see `begin_load`."""

    def done(self, job_id: int, rank: int, ok: bool) -> None:
        """A rank's copies of a job have ended. The last rank ends the job: a load's leases return; a store's parts
        are committed if every rank said ok, else dropped. A load may be given up (not ok) while lower tiers still
        work on it. Unknown ids are counted and ignored."""

    def cancel(self, job_id: int) -> None:
        """Give up a job that no rank was told of. Unknown ids are counted and ignored."""

    def poll(self, timeout_seconds: float = 0.0) -> PollResult:
        """What lower tiers have answered; waits at most `timeout_seconds` for a first answer."""

    def stats(self) -> Mapping[str, float]:
        """Counters and gauges by name; units are in the names."""

    def check(self) -> None:
        """Prove that slots, leases and index agree. InvariantError: they do not."""

    def close(self) -> None:
        """Finish writing to lower tiers within a deadline, then give all memory back."""
