"""Names of chunks: the same everywhere, different for whatever differs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.blocks import GroupKind, GroupSpec
from kvferry.errors import RequestError
from kvferry.store.keys import KEY_BYTES, Content, Extras, KeyChain, chunk_keys, part_name, root_key
from kvferry.testing.block_store import full_geometry

ROOT = root_key(full_geometry())


def test_a_key_is_the_same_in_every_process() -> None:
    """A literal, not a recomputation: a change of this value forgets every cache on every disk."""
    keys = chunk_keys(ROOT, list(range(8)), 4, Extras("salt", "lora"))
    assert [key.hex()[:16] for key in (ROOT, *keys)] == ["07b1a34d140988e9", "5f13b2adccebeba9", "62fce4f1504a7d3f"]
    program = (
        "from kvferry.store.keys import *; from kvferry.testing.block_store import full_geometry;"
        "print(chunk_keys(root_key(full_geometry()), list(range(8)), 4, Extras('salt', 'lora'))[1].hex())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == keys[1].hex()


def test_each_key_depends_on_all_tokens_before() -> None:
    tokens = list(range(12))
    keys = chunk_keys(ROOT, tokens, 4)
    for position in range(12):
        changed = tokens.copy()
        changed[position] += 1
        others = chunk_keys(ROOT, changed, 4)
        assert [key == other for key, other in zip(keys, others, strict=True)] == [
            chunk < position // 4 for chunk in range(3)
        ]


def test_an_open_chunk_has_no_key() -> None:
    assert [len(chunk_keys(ROOT, [7] * num_tokens, 4)) for num_tokens in (0, 3, 4, 5, 7, 8)] == [0, 0, 1, 1, 1, 2]


def test_extras_keep_requests_apart() -> None:
    variants = [
        Extras(),
        Extras(cache_salt=""),
        Extras(cache_salt="a"),
        Extras(lora_id="a"),
        Extras(cache_salt="a", lora_id=""),
        Extras(cache_salt="ab"),
        Extras(cache_salt="a", lora_id="b"),
        Extras(lora_id="ab"),
        Extras(cache_salt="\udcff"),
    ]
    assert len({chunk_keys(ROOT, [1, 2, 3, 4], 4, extras)[0] for extras in variants}) == len(variants)


def test_contents_are_part_of_the_chunks_that_they_reach_into() -> None:
    """Placeholders are the same tokens whatever stands there; and each part of an image is a part of its own."""
    tokens = [5] * 16
    plain = chunk_keys(ROOT, tokens, 4)
    dog, cat, later, longer = (
        chunk_keys(ROOT, tokens, 4, Extras(contents=(content,)))
        for content in (Content("dog", 6, 10), Content("cat", 6, 10), Content("dog", 7, 11), Content("dog", 6, 13))
    )
    assert dog[0] == cat[0] == later[0] == plain[0]
    for index in (1, 2, 3):
        assert len({keys[index] for keys in (plain, dog, cat, later, longer)}) == 5
    chain = KeyChain(ROOT, 4, Extras(contents=(Content("dog", 6, 10),)))
    for start in range(0, 16, 3):
        chain.extend(tokens[start : start + 3])
    assert chain.keys == dog


def test_all_of_the_geometry_is_in_the_root() -> None:
    geometry = full_geometry()
    group = geometry.groups[0]
    variants = [
        geometry,
        dataclasses.replace(geometry, identity="model2"),
        dataclasses.replace(geometry, identity="modellay", layout="out"),
        dataclasses.replace(geometry, layout="other"),
        dataclasses.replace(geometry, chunk_tokens=8),
        dataclasses.replace(geometry, num_ranks=2),
        dataclasses.replace(geometry, groups=()),
        dataclasses.replace(geometry, groups=(group, group)),
        dataclasses.replace(geometry, groups=(dataclasses.replace(group, layers=(0,)),)),
        dataclasses.replace(geometry, groups=(dataclasses.replace(group, part_bytes=1),)),
        dataclasses.replace(geometry, groups=(dataclasses.replace(group, is_shared=True),)),
        dataclasses.replace(geometry, groups=(GroupSpec(GroupKind.STATE, group.layers, group.part_bytes),)),
        dataclasses.replace(geometry, groups=(GroupSpec(GroupKind.WINDOW, group.layers, group.part_bytes, 4),)),
        dataclasses.replace(geometry, groups=(GroupSpec(GroupKind.WINDOW, group.layers, group.part_bytes, 8),)),
    ]
    assert len({root_key(variant) for variant in variants}) == len(variants)


def test_parts_have_names_of_their_own() -> None:
    names = {part_name(key, group, rank) for key in (ROOT, b"k" * 32) for group in range(3) for rank in range(300)}
    assert len(names) == 2 * 3 * 300
    assert {len(name) for name in names} == {KEY_BYTES + 4}


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=9), max_size=8), st.integers(1, 5))
def test_a_growing_request_has_the_keys_of_the_whole(pieces: list[list[int]], chunk_tokens: int) -> None:
    chain = KeyChain(ROOT, chunk_tokens, Extras("salt"))
    tokens: list[int] = []
    for piece in pieces:
        chain.extend(piece)
        tokens += piece
        assert chain.num_tokens == len(tokens)
        assert chain.keys == chunk_keys(ROOT, tokens, chunk_tokens, Extras("salt"))


@pytest.mark.parametrize("token", [-1, 2**32, 1.5, "7", None])
def test_what_is_no_token_id_is_refused(token: object) -> None:
    chain = KeyChain(ROOT, 2)
    chain.extend([1])
    with pytest.raises(RequestError, match="token ids must be"):
        chain.extend([5, token])  # type: ignore[list-item]
    assert chain.num_tokens == 1
