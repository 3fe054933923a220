"""The hit rule against its table, written out naively."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.blocks import Geometry, GroupKind, GroupSpec
from kvferry.hit import longest_hit, needed_units

CHUNK_TOKENS = 4
FULL = GroupSpec(GroupKind.FULL, (0,), 64)
STATE = GroupSpec(GroupKind.STATE, (1,), 64)


def window(num_tokens: int) -> GroupSpec:
    return GroupSpec(GroupKind.WINDOW, (2,), 64, num_tokens)


def geometry(*groups: GroupSpec) -> Geometry:
    return Geometry("model", "layout", CHUNK_TOKENS, 1, groups)


GROUPS = st.sampled_from([FULL, STATE, window(1), window(4), window(5), window(9), window(400)])


@given(st.lists(GROUPS, min_size=1, max_size=4), st.integers(0, 12), st.data())
def test_the_hit_is_the_last_boundary_where_every_group_is_whole(
    groups: list[GroupSpec], num_chunks: int, data: st.DataObject
) -> None:
    presence = st.lists(st.sampled_from([True, True, True, False]), min_size=num_chunks, max_size=num_chunks)
    present = [data.draw(presence) for _ in groups]
    boundaries = [
        end
        for end in range(num_chunks + 1)
        if all(
            present[position][chunk]
            for position, group in enumerate(groups)
            for chunk in range(end)
            if group.kind is GroupKind.FULL
            or (group.kind is GroupKind.STATE and chunk == end - 1)
            or (
                group.kind is GroupKind.WINDOW
                and (chunk + 1) * CHUNK_TOKENS > end * CHUNK_TOKENS - (group.window_tokens or 0)
            )
        )
    ]
    hit = longest_hit(groups, CHUNK_TOKENS, present)
    assert hit == boundaries[-1]
    for position, group in enumerate(groups):
        assert all(present[position][chunk] for chunk in needed_units(group, CHUNK_TOKENS, 0, hit))


@pytest.mark.parametrize(
    ("group", "first_chunk", "num_chunks", "expected"),
    [
        (FULL, 0, 5, [0, 1, 2, 3, 4]),
        (FULL, 3, 5, [3, 4]),
        (FULL, 5, 5, []),
        (STATE, 0, 5, [4]),
        (STATE, 4, 5, [4]),
        (STATE, 5, 5, []),
        (STATE, 0, 0, []),
        (window(1), 0, 5, [4]),
        (window(4), 0, 5, [4]),
        (window(5), 0, 5, [3, 4]),
        (window(8), 4, 5, [4]),
        (window(400), 0, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_what_a_group_needs(group: GroupSpec, first_chunk: int, num_chunks: int, expected: list[int]) -> None:
    assert list(needed_units(group, CHUNK_TOKENS, first_chunk, num_chunks)) == expected


def test_a_group_known_to_fewer_chunks_ends_the_hit() -> None:
    assert longest_hit((FULL, FULL), CHUNK_TOKENS, [[True] * 5, [True] * 3]) == 3
    assert longest_hit((FULL,), CHUNK_TOKENS, [[]]) == 0
