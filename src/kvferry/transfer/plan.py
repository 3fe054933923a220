"""Turns (part, blocks) into byte copies: arrays of source, destination and size, neighbours joined.

Pure arithmetic on addresses in numpy, without a Python loop over blocks. Knows no tensor, no stream and no store.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.uint64]


class Direction(enum.Enum):
    """Which way a copy goes."""

    TO_POOL = "to_pool"
    FROM_POOL = "from_pool"


@dataclass(frozen=True, slots=True)
class PartBlocks:
    """Blocks `first_block, first_block + 1, ...` of the part at `offset` in the arena, and the pool's ids for them."""

    offset: int
    first_block: int
    block_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Strides:
    """Addresses and distances in bytes that a plan needs; a block in a part is `num_layers * layer_bytes`."""

    arena_base: int
    pool_base: int
    block_stride_bytes: int
    num_layers: int
    layer_bytes: int


Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Blocks one by one: where each begins in the arena, counted from its start, and its id in the pool."""

    offsets: Rows
    ids: Rows


def block_rows(parts: Sequence[PartBlocks], block_bytes: int) -> BlockRows:
    """The blocks of all parts, in order."""
    counts = np.fromiter((len(part.block_ids) for part in parts), np.int64, len(parts))
    starts = np.fromiter((part.offset + part.first_block * block_bytes for part in parts), np.int64, len(parts))
    ids = np.fromiter(itertools.chain.from_iterable(part.block_ids for part in parts), np.int64, int(counts.sum()))
    nth_of_part = np.arange(ids.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return BlockRows(np.repeat(starts, counts) + nth_of_part * block_bytes, ids)


@dataclass(frozen=True, slots=True)
class Plan:
    """Copy `sizes[i]` bytes from address `sources[i]` to `destinations[i]`, for each i, in any order."""

    sources: Addresses
    destinations: Addresses
    sizes: Addresses

    @property
    def num_bytes(self) -> int:
        return int(self.sizes.sum())

    def split(self, num_shares: int) -> list[Plan]:
        """The same copies as at most `num_shares` plans of about equal bytes, cut inside copies if need be."""
        ends = np.cumsum(self.sizes)
        total = int(ends[-1]) if len(ends) else 0
        cuts = np.arange(1, num_shares, dtype=np.uint64) * np.uint64(-(-total // num_shares))
        cuts = cuts[cuts < total]
        bounds = np.unique(np.concatenate([np.zeros(1, np.uint64), ends, cuts]))
        starts, sizes = bounds[:-1], np.diff(bounds)
        copy = np.searchsorted(ends, starts, side="right")
        within = starts - (ends - self.sizes)[copy]
        whole = Plan(self.sources[copy] + within, self.destinations[copy] + within, sizes)
        edges = np.concatenate([[0], np.searchsorted(starts, cuts), [len(starts)]])
        return [
            Plan(whole.sources[a:b], whole.destinations[a:b], whole.sizes[a:b]) for a, b in itertools.pairwise(edges)
        ]


def plan_copies(rows: BlockRows, strides: Strides, direction: Direction, layers: range | None = None) -> Plan:
    """The copies of these blocks, restricted to consecutive `layers` if given.

    Copies that follow each other on both sides are joined: whole neighbouring blocks across their layers, and
    neighbouring slots across their blocks.
    """
    first_layer, num_layers = (0, strides.num_layers) if layers is None else (layers.start, len(layers))
    assert rows.ids.size == 0 or rows.ids.min() >= 0, "a block that does not exist has no address"
    skipped = first_layer * strides.layer_bytes
    arena = (rows.offsets + (strides.arena_base + skipped)).astype(np.uint64)
    pool = (rows.ids * strides.block_stride_bytes + (strides.pool_base + skipped)).astype(np.uint64)
    sources, destinations = (arena, pool) if direction is Direction.TO_POOL else (pool, arena)
    return _joined(sources, destinations, num_layers * strides.layer_bytes)


def _joined(sources: Addresses, destinations: Addresses, size: int) -> Plan:
    """Equal-sized copies with runs that are adjacent on both sides made one."""
    step = np.uint64(size)
    if len(sources) == 0 or size == 0:
        return Plan(*(np.zeros(0, np.uint64) for _ in range(3)))
    breaks = (sources[1:] != sources[:-1] + step) | (destinations[1:] != destinations[:-1] + step)
    heads = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    lengths = np.diff(np.concatenate([heads, [len(sources)]])).astype(np.uint64)
    return Plan(sources[heads], destinations[heads], lengths * step)
