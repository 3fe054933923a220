"""Which engines use a store, and what they have declared. Knows geometries; no entry, no lease. Callers serialise."""

from __future__ import annotations

from collections import Counter

from kvferry.blocks import Geometry
from kvferry.errors import ConfigError
from kvferry.store.keys import root_key


class Registry:
    """Engines by id, their ranks, and the geometries that they have among them."""

    def __init__(self) -> None:
        self._engines: dict[str, dict[int, Geometry]] = {}
        self._roots: dict[Geometry, bytes] = {}

    def register(self, engine: str, rank: int, geometry: Geometry) -> None:
        """See `BlockStore.register`. Whether the geometry fits the arena is for the caller to say."""
        sizes = [group.part_bytes for group in geometry.groups]
        if not sizes or min(sizes) <= 0 or not 0 <= rank < geometry.num_ranks or geometry.chunk_tokens < 1:
            raise ConfigError(f"rank {rank} of engine {engine} declares an impossible geometry: {geometry}")
        ranks = self._engines.get(engine, {})
        if any(other != geometry for of, other in ranks.items() if of != rank):
            raise ConfigError(f"ranks of engine {engine} declare different geometries; rank {rank}: {geometry}")
        self._engines.setdefault(engine, {})[rank] = geometry
        self._roots[geometry] = root_key(geometry)
        self._prune()

    def unregister(self, engine: str) -> None:
        """Forget an engine, and its geometry if no other engine has it."""
        self._engines.pop(engine, None)
        self._prune()

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

    def _prune(self) -> None:
        used = Counter(geometry for ranks in self._engines.values() for geometry in ranks.values())
        self._roots = {geometry: root for geometry, root in self._roots.items() if geometry in used}
