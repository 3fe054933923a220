"""Turns (part, blocks) into byte copies: arrays of source, destination and size, neighbours joined.

Where a device moves the pool's side itself, only the long runs in the arena are listed (`Pages.runs`).

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


Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Strides:
    """Addresses and distances in bytes that a plan needs; one entry a region in each array.

    bases: of block 0's page. stride_bytes: from one block's page to the next's. page_bytes: of a page.
    blocks_per_part: pages of one region in a part.
    """

    arena_base: int
    blocks_per_part: int
    bases: Numbers
    stride_bytes: Numbers
    page_bytes: Numbers

    @property
    def region_offsets(self) -> Numbers:
        """Where each region's pages begin in a part."""
        sizes = self.page_bytes * self.blocks_per_part
        return np.cumsum(sizes) - sizes


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Blocks one by one: where their part begins in the arena, their place in it, and their id in the pool."""

    offsets: Numbers
    places: Numbers
    ids: Numbers

    def only(self, which: npt.NDArray[np.bool_] | Numbers) -> BlockRows:
        """Some of the rows."""
        return BlockRows(self.offsets[which], self.places[which], self.ids[which])

    def stretches(self, most: int) -> tuple[Numbers, Numbers]:
        """Rows whose places follow each other in one part, at most so many: the first and the number of each."""
        follows = (self.offsets[1:] == self.offsets[:-1]) & (self.places[1:] == self.places[:-1] + 1)
        heads = np.flatnonzero(np.concatenate([np.ones(min(1, self.ids.size), np.bool_), ~follows]))
        lengths = np.diff(heads, append=self.ids.size)
        heads = np.flatnonzero((np.arange(self.ids.size) - np.repeat(heads, lengths)) % most == 0)
        return heads, np.diff(heads, append=self.ids.size)


def block_rows(parts: Sequence[PartBlocks]) -> BlockRows:
    """The blocks of all parts, in order."""
    counts = np.fromiter((len(part.block_ids) for part in parts), np.int64, len(parts))
    starts = np.fromiter((part.offset for part in parts), np.int64, len(parts))
    firsts = np.fromiter((part.first_block for part in parts), np.int64, len(parts))
    ids = np.fromiter(itertools.chain.from_iterable(part.block_ids for part in parts), np.int64, int(counts.sum()))
    nth_of_part = np.arange(ids.size) - np.repeat(np.cumsum(counts) - counts, counts)
    return BlockRows(np.repeat(starts, counts), np.repeat(firsts, counts) + nth_of_part, ids)


@dataclass(frozen=True, slots=True)
class Plan:
    """Copy `sizes[i]` bytes from address `sources[i]` to `destinations[i]`, for each i, in any order."""

    sources: Addresses
    destinations: Addresses
    sizes: Addresses

    @property
    def num_bytes(self) -> int:
        return int(self.sizes.sum())

    def in_arena(self, direction: Direction) -> Addresses:
        """The addresses of the side that is in the arena."""
        return self.sources if direction is Direction.TO_POOL else self.destinations

    def joined(self) -> Plan:
        """The same with runs that are adjacent on both sides made one copy."""
        if len(self.sources) < 2:
            return self
        ends = self.sources[:-1] + self.sizes[:-1], self.destinations[:-1] + self.sizes[:-1]
        breaks = (self.sources[1:] != ends[0]) | (self.destinations[1:] != ends[1])
        heads = np.concatenate([[0], np.flatnonzero(breaks) + 1])
        return Plan(self.sources[heads], self.destinations[heads], np.add.reduceat(self.sizes, heads))

    def only(self, which: slice) -> Plan:
        """Some of the copies."""
        return Plan(self.sources[which], self.destinations[which], self.sizes[which])

    def split(self, num_shares: int) -> list[Plan]:
        """The same copies as at most `num_shares` plans of about equal bytes, cut inside copies if need be."""
        total = self.num_bytes
        cuts = np.arange(1, num_shares, dtype=np.uint64) * np.uint64(-(-total // num_shares))
        cuts = cuts[cuts < total]
        whole = self._cut(cuts)
        starts = np.cumsum(whole.sizes) - whole.sizes
        edges = np.concatenate([[0], np.searchsorted(starts, cuts), [len(starts)]])
        return [whole.only(slice(a, b)) for a, b in itertools.pairwise(edges)]

    def cut_at_edges(self, addresses: Addresses, origin: int, distance: int) -> Plan:
        """The same copies, none of which crosses `origin + n * distance` on the side whose addresses are given."""
        starts, sizes = (addresses - np.uint64(origin)).astype(np.int64), self.sizes.astype(np.int64)
        first_edge = starts // distance + 1
        num_edges = (starts + sizes - 1) // distance + 1 - first_edge
        if not num_edges.any():
            return self
        crossing = np.repeat(np.arange(len(starts)), num_edges)
        nth = np.arange(len(crossing)) - np.repeat(np.cumsum(num_edges) - num_edges, num_edges)
        before = np.cumsum(sizes) - sizes
        cuts = before[crossing] + (first_edge[crossing] + nth) * distance - starts[crossing]
        return self._cut(cuts.astype(np.uint64))

    def _cut(self, cuts: Addresses) -> Plan:
        """`cuts` count bytes from the first copy's start."""
        ends = np.cumsum(self.sizes)
        bounds = np.unique(np.concatenate([np.zeros(1, np.uint64), ends, cuts]))
        starts, sizes = bounds[:-1], np.diff(bounds)
        copy = np.searchsorted(ends, starts, side="right")
        within = starts - (ends - self.sizes)[copy]
        return Plan(self.sources[copy] + within, self.destinations[copy] + within, sizes)


@dataclass(frozen=True, slots=True)
class Pages:
    """What is to be copied: the pages of these blocks in consecutive `regions`."""

    rows: BlockRows
    strides: Strides
    direction: Direction
    regions: slice

    @property
    def page_bytes(self) -> Numbers:
        """By region."""
        return self.strides.page_bytes[self.regions]

    @property
    def row_bytes(self) -> int:
        """Of all pages of a block."""
        return int(self.page_bytes.sum())

    def only(self, which: npt.NDArray[np.bool_]) -> Pages:
        """Those of some of the rows."""
        return Pages(self.rows.only(which), self.strides, self.direction, self.regions)

    def plan(self) -> Plan:
        """Copies that follow each other on both sides are joined."""
        rows, strides = self.rows, self.strides
        assert rows.ids.size == 0 or rows.ids.min() >= 0, "a block that does not exist has no address"
        arena = self._in_arena(rows)
        pool = strides.bases[self.regions, None] + rows.ids * strides.stride_bytes[self.regions, None]
        return self._plan(arena, pool, np.broadcast_to(self.page_bytes[:, None], arena.shape)).joined()

    def spans(self) -> tuple[Addresses, Addresses]:
        """By row, the first and the last address in the arena between which its pages lie."""
        arena = self._in_arena(self.rows)
        return arena[0].astype(np.uint64), (arena[-1] + self.page_bytes[-1] - 1).astype(np.uint64)

    def runs(self, heads: Numbers, lengths: Numbers, packed: int) -> Plan:
        """The copies if the other side were not the pool but memory at address `packed`, in which the pages of each of
        these stretches of rows lie side by side, region after region as in a part. So whole parts are one run."""
        arena = self._in_arena(self.rows.only(heads)).T
        sizes = self.page_bytes * lengths[:, None]
        ends = np.cumsum(sizes).reshape(sizes.shape)
        return self._plan(arena, packed + ends - sizes, sizes).joined()

    def _in_arena(self, rows: BlockRows) -> Numbers:
        """Addresses `[regions, rows]`."""
        of_regions = self.strides.arena_base + self.strides.region_offsets[self.regions, None]
        return of_regions + rows.offsets + rows.places * self.page_bytes[:, None]

    def _plan(self, arena: Numbers, other: Numbers, sizes: Numbers) -> Plan:
        of, to = (arena, other) if self.direction is Direction.TO_POOL else (other, arena)
        return Plan(*(side.ravel().astype(np.uint64) for side in (of, to, sizes)))
