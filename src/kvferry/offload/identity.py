"""Names what the bytes of a cached chunk depend on besides its tokens. Knows no tensor and no request."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.blocks import Geometry, GroupKind, GroupSpec
from kvferry.connector.config import LlmArgs
from kvferry.errors import ConfigError

FORMAT = 1
"""To be raised whenever the meaning of a part's bytes changes without any other field of the identity changing."""


def check_chunk_tokens(chunk_tokens: int, tokens_per_block: int) -> None:
    """ConfigError: chunks would cut blocks."""
    if chunk_tokens % tokens_per_block:
        raise ConfigError(
            f"chunk_tokens={chunk_tokens} is not a multiple of the engine's tokens_per_block={tokens_per_block}"
        )


def identity(llm_args: LlmArgs) -> str | None:
    """Names weights, KV type, shape and partition, or None if the engine cannot name its weights: then nothing may be
    kept. Readable on purpose: it is only ever hashed and compared."""
    if llm_args.model_identity is None:
        return None
    fields = {
        "format": FORMAT,
        "model": llm_args.model_identity,
        "kv_dtype": llm_args.kv_dtype,
        "num_layers": llm_args.num_layers,
        "num_kv_heads": llm_args.num_kv_heads,
        "head_dim": llm_args.head_dim,
        "tensor_parallel_size": llm_args.tensor_parallel_size,
        "sliding_windows": llm_args.sliding_windows,
    }
    return json.dumps(fields, sort_keys=True)


@dataclass(frozen=True, slots=True)
class PoolGroup:
    """One layer group's pool on one rank. window_tokens: for `GroupKind.WINDOW` alone. fingerprint: names the order of
    bytes in a part."""

    kind: GroupKind
    layers: tuple[int, ...]
    window_tokens: int | None
    part_bytes: int
    fingerprint: str


def make_geometry(llm_args: LlmArgs, name: str, chunk_tokens: int, groups: Sequence[PoolGroup]) -> Geometry:
    """The geometry of these pools. A pool that keeps every token of every layer is a full group, even where some of its
    layers attend to a window."""
    specs = tuple(GroupSpec(group.kind, group.layers, group.part_bytes, group.window_tokens) for group in groups)
    return Geometry(
        identity=name,
        layout="|".join(group.fingerprint for group in groups),
        chunk_tokens=chunk_tokens,
        num_ranks=llm_args.tensor_parallel_size,
        groups=specs,
    )
