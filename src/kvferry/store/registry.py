"""Which engines use a store, and what they have declared. Knows geometries and whether they fit; no entry, no lease.

Callers serialise.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvferry.blocks import Geometry
from kvferry.errors import ConfigError
from kvferry.store.arena import Arena
from kvferry.store.keys import geometry_tag, root_key
from kvferry.store.slots import fits


class Registry:
    """Engines by id, their ranks, and the geometries that they have among them."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._engines: dict[str, dict[int, Geometry]] = {}
        self._roots: dict[Geometry, bytes] = {}
        self._identities: dict[bytes, str] = {}
        """By tag, also of geometries that no engine has any more."""

    def register(self, engine: str, rank: int, geometry: Geometry) -> None:
        """See `BlockStore.register`."""
        sizes = [group.part_bytes for group in geometry.groups]
        if not sizes or min(sizes) <= 0 or not 0 <= rank < geometry.num_ranks or geometry.chunk_tokens < 1:
            raise ConfigError(f"rank {rank} of engine {engine} declares an impossible geometry: {geometry}")
        ranks = self._engines.get(engine, {})
        if any(other != geometry for of, other in ranks.items() if of != rank):
            raise ConfigError(f"ranks of engine {engine} declare different geometries; rank {rank}: {geometry}")
        parts = [(size, of) for group, size in enumerate(sizes) for of in range(geometry.num_parts(group))]
        if not fits(self._arena, parts):
            raise ConfigError(
                f"a chunk of {geometry.num_ranks} x {sizes} bytes does not fit the arena of "
                f"{self._arena.info.num_bytes} bytes: set l1_size_gb higher or chunk_tokens lower"
            )
        self._engines.setdefault(engine, {})[rank] = geometry
        self._roots[geometry] = root_key(geometry)
        self._identities[geometry_tag(self._roots[geometry])] = geometry.identity

    def unregister(self, engine: str) -> None:
        """Forget an engine, and its geometry if no other engine has it."""
        self._engines.pop(engine, None)

    def geometry(self, engine: str) -> Geometry | None:
        """See `BlockStore.geometry`."""
        ranks = self._engines.get(engine, {})
        geometry = next(iter(ranks.values()), None)
        return geometry if geometry is not None and len(ranks) == geometry.num_ranks else None

    def root(self, geometry: Geometry) -> bytes | None:
        """The parent of every first chunk; None: no engine has declared this geometry."""
        return self._roots.get(geometry)

    def counts(self) -> dict[str, int]:
        return {"engines": len(self._engines), "geometries": len(self._roots)}

    def identity(self, tag: bytes) -> str | None:
        """Whose tag it is; None: of no geometry that is known here."""
        return self._identities.get(tag)

    def prune(self, tags: Iterable[bytes]) -> None:
        """Forget geometries that no engine has, and the names of those under which nothing is kept either."""
        used = {geometry for ranks in self._engines.values() for geometry in ranks.values()}
        self._roots = {geometry: root for geometry, root in self._roots.items() if geometry in used}
        known = {*tags, *map(geometry_tag, self._roots.values())}
        self._identities = {tag: identity for tag, identity in self._identities.items() if tag in known}
