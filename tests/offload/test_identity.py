"""Whatever changes the bytes of a chunk changes its keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from kvferry.blocks import GroupKind
from kvferry.config import KvCacheConfig, KvCacheConnectorConfig
from kvferry.connector.config import LlmArgs
from kvferry.errors import ConfigError
from kvferry.offload.identity import PoolGroup, check_chunk_tokens, identity, make_geometry
from kvferry.store.keys import root_key

ARGS = LlmArgs(
    engine_id="engine",
    model="a name",
    model_identity="weights",
    kv_dtype="float32",
    num_layers=4,
    num_kv_heads=2,
    head_dim=8,
    max_batch_size=1,
    max_num_tokens=64,
    kv_cache_config=KvCacheConfig(),
    kv_connector_config=KvCacheConnectorConfig(connector="kvferry"),
)


GROUP = PoolGroup(GroupKind.FULL, (0, 1, 2, 3), window_tokens=None, part_bytes=4096, fingerprint="layout")


def root(args: LlmArgs, chunk_tokens: int = 64, **changes: Any) -> bytes:
    name = identity(args)
    assert name is not None
    return root_key(make_geometry(args, name, chunk_tokens, [dataclasses.replace(GROUP, **changes)]))


@pytest.mark.parametrize(
    "change",
    [
        {"model_identity": "other weights"},
        {"kv_dtype": "bfloat16"},
        {"num_layers": 5},
        {"num_kv_heads": 4},
        {"head_dim": 16},
        {"tensor_parallel_size": 2},
        {"sliding_windows": (None, 64, None, 64)},
    ],
)
def test_what_changes_the_bytes_changes_the_keys(change: dict[str, object]) -> None:
    assert root(dataclasses.replace(ARGS, **change)) != root(ARGS)


def test_layout_and_chunk_size_change_the_keys() -> None:
    changes: list[dict[str, Any]] = [
        {"fingerprint": "other"},
        {"part_bytes": 8192},
        {"chunk_tokens": 128},
        {"kind": GroupKind.WINDOW, "window_tokens": 64},
        {"kind": GroupKind.STATE},
    ]
    assert len({root(ARGS), *(root(ARGS, **change) for change in changes)}) == 6


@pytest.mark.parametrize("change", [{"engine_id": "b"}, {"model": "b"}, {"max_batch_size": 9}, {"rank": 1}])
def test_what_does_not_change_the_bytes_keeps_the_keys(change: dict[str, object]) -> None:
    assert root(dataclasses.replace(ARGS, **change)) == root(ARGS)


def test_weights_without_a_name_have_no_identity() -> None:
    assert identity(dataclasses.replace(ARGS, model_identity=None)) is None


def test_chunks_are_whole_blocks() -> None:
    check_chunk_tokens(256, 32)
    with pytest.raises(ConfigError, match=r"chunk_tokens=256.*tokens_per_block=48"):
        check_chunk_tokens(256, 48)
