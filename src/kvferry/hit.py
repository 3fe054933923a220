"""The hit rule: where a prompt can go on from KV that is kept. Pure functions; knows no store and no engine.

A unit is what the keeper counts in: chunks in the store, blocks in an engine's pool.

What a group must have at a boundary after `n` units, so that the engine can compute the token there:

=======  ==============================================  ====================================
kind     units needed                                    why
=======  ==============================================  ====================================
FULL     0 .. n-1                                        every earlier token is attended to
WINDOW   n-w .. n-1, w = ceil(window / unit_tokens)      only the window is attended to
STATE    n-1                                             the state at the boundary is stored
                                                         in the unit that ends there
=======  ==============================================  ====================================

The hit is the largest n at which *every* group has all of its row. A boundary where one group is whole and another
is from elsewhere is no hit at all: restoring it would give garbage. Loads and stores use the same rows. (Engines
differ in whether a window counts the token itself; w covers both.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvferry.blocks import GroupKind


class GroupRule(Protocol):
    """What the rule asks of a group. `window_tokens` is set for `GroupKind.WINDOW` alone."""

    @property
    def kind(self) -> GroupKind: ...

    @property
    def window_tokens(self) -> int | None: ...


def needed_units(group: GroupRule, unit_tokens: int, first_unit: int, num_units: int) -> range:
    """The units that `group` needs at the boundary after `num_units`, less those before `first_unit`."""
    match group.kind:
        case GroupKind.FULL:
            start = 0
        case GroupKind.WINDOW:
            start = num_units - _window_units(group, unit_tokens)
        case GroupKind.STATE:
            start = num_units - 1
    return range(max(start, first_unit, 0), max(num_units, first_unit, 0))


def longest_hit(groups: Sequence[GroupRule], unit_tokens: int, present: Sequence[Sequence[bool]]) -> int:
    """The largest number of units after which every group has what it needs.

    present: `present[g][i]` says whether group g of unit i can be had. Groups may differ in length; what is beyond
    the end is absent.
    """
    limit = min((len(units) for units in present), default=0)
    for group, units in zip(groups, present, strict=True):
        if group.kind is GroupKind.FULL:
            limit = _leading(units, limit)
    if all(group.kind is GroupKind.FULL for group in groups):
        return limit
    boundaries = np.arange(1, limit + 1)
    whole = np.ones(limit, dtype=bool)
    for group, units in zip(groups, present, strict=True):
        if group.kind is GroupKind.FULL:
            continue
        have = np.asarray(units[:limit], dtype=bool)
        if group.kind is GroupKind.WINDOW:
            after_last_gap = np.maximum.accumulate(np.where(have, 0, boundaries)) if limit else boundaries
            have = boundaries - after_last_gap >= np.minimum(boundaries, _window_units(group, unit_tokens))
        whole &= have
    hits = np.flatnonzero(whole)
    return int(hits[-1]) + 1 if hits.size else 0


def _window_units(group: GroupRule, unit_tokens: int) -> int:
    assert group.window_tokens is not None, "a WINDOW group has window_tokens"
    return -(-group.window_tokens // unit_tokens)


def _leading(units: Sequence[bool], limit: int) -> int:
    found = units[:limit]
    return found.index(False) if False in found else limit
