"""The hit rule: where a prompt can go on from stored chunks. Pure functions; knows no store.

What a group must have at a boundary after `n` chunks, so that the engine can compute the token there:

=======  ==============================================  ====================================
kind     chunks needed                                   why
=======  ==============================================  ====================================
FULL     0 .. n-1                                        every earlier token is attended to
WINDOW   n-w .. n-1, w = ceil(window / chunk_tokens)     only the window is attended to
STATE    n-1                                             the state at the boundary is stored
                                                         in the chunk that ends there
=======  ==============================================  ====================================

The hit is the largest n at which *every* group has all of its row. A boundary where one group is whole and another
is from elsewhere is no hit at all: restoring it would give garbage. Loads and stores use the same rows. (Engines
differ in whether a window counts the token itself; w covers both.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvferry.blocks import Geometry, GroupKind, GroupSpec


def needed_chunks(group: GroupSpec, chunk_tokens: int, first_chunk: int, num_chunks: int) -> range:
    """The chunks that `group` needs at the boundary after `num_chunks`, less those before `first_chunk`."""
    match group.kind:
        case GroupKind.FULL:
            start = 0
        case GroupKind.WINDOW:
            start = num_chunks - _window_chunks(group, chunk_tokens)
        case GroupKind.STATE:
            start = num_chunks - 1
    return range(max(start, first_chunk, 0), max(num_chunks, first_chunk, 0))


def longest_hit(geometry: Geometry, present: Sequence[Sequence[bool]]) -> int:
    """The largest number of chunks after which every group has what it needs.

    present: `present[g][i]` says whether group g of chunk i can be had. Groups may differ in length; what is beyond
    the end is absent.
    """
    limit = min((len(chunks) for chunks in present), default=0)
    for group, chunks in zip(geometry.groups, present, strict=True):
        if group.kind is GroupKind.FULL:
            limit = _leading(chunks, limit)
    boundaries = np.arange(1, limit + 1)
    whole = np.ones(limit, dtype=bool)
    for group, chunks in zip(geometry.groups, present, strict=True):
        if group.kind is GroupKind.FULL:
            continue
        have = np.asarray(chunks[:limit], dtype=bool)
        if group.kind is GroupKind.WINDOW:
            after_last_gap = np.maximum.accumulate(np.where(have, 0, boundaries)) if limit else boundaries
            have = boundaries - after_last_gap >= np.minimum(boundaries, _window_chunks(group, geometry.chunk_tokens))
        whole &= have
    hits = np.flatnonzero(whole)
    return int(hits[-1]) + 1 if hits.size else 0


def _window_chunks(group: GroupSpec, chunk_tokens: int) -> int:
    assert group.window_tokens is not None, "a WINDOW group has window_tokens"
    return -(-group.window_tokens // chunk_tokens)


def _leading(chunks: Sequence[bool], limit: int) -> int:
    return next((index for index, has in enumerate(chunks[:limit]) if not has), limit)
