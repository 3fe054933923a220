"""vLLM's layouts, as its versions lay them out, without vLLM: specs are told apart by their class's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvferry.blocks import GroupKind
from kvferry.integrations.vllm_layout import CacheGroup, read_groups, read_layouts
from kvferry.transfer.copy import Copier, CopyEngine
from kvferry.transfer.layout import Layout, UnknownLayout
from kvferry.transfer.plan import Direction, PartBlocks

BLOCKS, TOKENS, HEADS, DIM = 6, 4, 2, 8
PAGE = TOKENS * HEADS * DIM * 2
"""Elements of a block's keys and values in one layer."""


@dataclass
class FullAttentionSpec:
    block_size: int = TOKENS
    num_kv_heads: int = HEADS
    head_size: int = DIM
    unpadded_page_size_bytes: int = PAGE * 4


@dataclass
class SlidingWindowSpec(FullAttentionSpec):
    sliding_window: int = 10


@dataclass
class ChunkedLocalAttentionSpec(FullAttentionSpec):
    attention_chunk_size: int = 8


@dataclass
class MambaSpec:
    block_size: int = TOKENS
    shapes: tuple[tuple[int, ...], ...] = ((3, 5), (2, 7))
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float32)
    mamba_cache_mode: str = "align"


@dataclass
class SinkFullAttentionSpec(FullAttentionSpec):
    pass


def config(*specs: Any, num_layers: int = 2) -> Any:
    groups = [
        SimpleNamespace(layer_names=[f"{group}.{layer}" for layer in range(num_layers)], kv_cache_spec=spec)
        for group, spec in enumerate(specs)
    ]
    return SimpleNamespace(kv_cache_groups=groups, num_blocks=BLOCKS)


def groups_of(*specs: Any) -> list[CacheGroup]:
    groups = read_groups(config(*specs))
    assert not isinstance(groups, UnknownLayout), groups
    return groups


def moves_blocks(layout: Layout, layers: Sequence[torch.Tensor], block_dim: int, per_block: int = 1) -> None:
    """Block 1 goes to the arena and comes back as block 4: in the engine's own view, every element."""
    arena = bytearray(layout.part_bytes(TOKENS))
    for number, layer in enumerate(layers):
        layer.copy_(torch.arange(layer.numel(), dtype=layer.dtype).view(layer.shape) + number * 100_000)
    before = [layer.clone() for layer in layers]
    copier = Copier(torch.device("cpu"), memoryview(arena))
    engine = CopyEngine(layout, copier, 1)
    engine.submit(Direction.FROM_POOL, [PartBlocks(0, 0, [1])]).wait()
    engine.submit(Direction.TO_POOL, [PartBlocks(0, 0, [4])]).wait()
    copier.close()
    for layer, old in zip(layers, before, strict=True):
        for part in range(per_block):
            old.select(block_dim, 4 * per_block + part).copy_(old.select(block_dim, per_block + part))
        assert torch.equal(layer, old)


ORDERS = {
    "tokens before heads": ((BLOCKS, HEADS, TOKENS, 2 * DIM), (0, 2, 1, 3), 0),
    "heads before tokens": ((BLOCKS, HEADS, TOKENS, 2 * DIM), (0, 1, 2, 3), 0),
    "heads outermost": ((BLOCKS, HEADS, TOKENS, 2 * DIM), (1, 0, 2, 3), 0),
    "keys and values packed": ((BLOCKS, 2, TOKENS, HEADS, DIM), (0, 1, 2, 3, 4), 0),
    "values behind all keys": ((2, BLOCKS, TOKENS, HEADS, DIM), (0, 1, 2, 3, 4), 1),
    "values behind all keys, heads before tokens": ((2, BLOCKS, TOKENS, HEADS, DIM), (0, 1, 3, 2, 4), 1),
}


def laid_out(shape: tuple[int, ...], order: tuple[int, ...]) -> torch.Tensor:
    """A tensor of `shape` whose dimensions lie in memory in `order`."""
    physical = torch.zeros([shape[dim] for dim in order])
    return physical.permute([order.index(dim) for dim in range(len(shape))])


@pytest.mark.parametrize("name", ORDERS)
def test_a_layer_s_tensor(name: str) -> None:
    shape, order, block_dim = ORDERS[name]
    layers = [laid_out(shape, order) for _ in range(2)]
    caches = dict(zip(("0.0", "0.1"), layers, strict=True))
    layouts = read_layouts(groups_of(FullAttentionSpec()), caches, BLOCKS, lambda *_: block_dim, TOKENS)
    assert not isinstance(layouts, UnknownLayout), layouts
    (layout,) = layouts
    assert layout.block_bytes == 2 * PAGE * 4
    moves_blocks(layout, layers, block_dim)


def test_orders_have_fingerprints_of_their_own() -> None:
    found = set()
    for shape, order, block_dim in ORDERS.values():
        caches = {f"0.{layer}": laid_out(shape, order) for layer in range(2)}
        layouts = read_layouts(groups_of(FullAttentionSpec()), caches, BLOCKS, lambda *_, dim=block_dim: dim, TOKENS)
        assert not isinstance(layouts, UnknownLayout)
        found.add(layouts[0].fingerprint())
    assert len(found) == len(ORDERS)


def test_a_kernel_s_smaller_blocks_come_together() -> None:
    layers = [torch.zeros(2 * BLOCKS, HEADS, TOKENS // 2, 2 * DIM) for _ in range(2)]
    caches = dict(zip(("0.0", "0.1"), layers, strict=True))
    layouts = read_layouts(groups_of(FullAttentionSpec()), caches, BLOCKS, lambda *_: 0, TOKENS)
    assert not isinstance(layouts, UnknownLayout)
    moves_blocks(layouts[0], layers, 0, per_block=2)


def test_layers_side_by_side_in_a_block_are_one_region() -> None:
    physical = torch.zeros(BLOCKS, 2, HEADS, TOKENS, 2 * DIM)
    layers = list(physical.unbind(1))
    caches = dict(zip(("0.0", "0.1"), layers, strict=True))
    layouts = read_layouts(groups_of(FullAttentionSpec()), caches, BLOCKS, lambda *_: 0, TOKENS)
    assert not isinstance(layouts, UnknownLayout)
    assert [region.page_bytes for region in layouts[0].regions] == [2 * PAGE * 4]
    moves_blocks(layouts[0], layers, 0)


def test_padded_blocks_and_states() -> None:
    """States of two shapes lie behind each other in a page that is as large as the attention's."""
    page = PAGE + 24
    raw = torch.zeros(BLOCKS, page)
    attention = raw[:, :PAGE].view(BLOCKS, HEADS, TOKENS, 2 * DIM)
    states = [raw[:, :15].view(BLOCKS, 3, 5), raw[:, 15:29].view(BLOCKS, 2, 7)]
    caches: dict[str, Any] = {"0.0": attention, "1.0": states}
    groups = read_groups(config(FullAttentionSpec(), MambaSpec(), num_layers=1))
    assert not isinstance(groups, UnknownLayout)
    assert [group.kind for group in groups] == [GroupKind.FULL, GroupKind.STATE]
    layouts = read_layouts(groups, caches, BLOCKS, lambda *_: 0, TOKENS)
    assert not isinstance(layouts, UnknownLayout)
    assert [layout.block_bytes for layout in layouts] == [PAGE * 4, 29 * 4]
    moves_blocks(layouts[0], [attention], 0)
    moves_blocks(layouts[1], states, 0)


def test_what_a_group_still_needs() -> None:
    _, window, local = groups_of(FullAttentionSpec(), SlidingWindowSpec(), ChunkedLocalAttentionSpec())
    assert [window.first_needed(position) for position in (0, 9, 10, 25)] == [0, 0, 1, 16]
    assert [local.first_needed(position) for position in (0, 7, 8, 25)] == [0, 0, 8, 24]


def test_two_groups_of_one_block_size() -> None:
    unknown = read_groups(config(FullAttentionSpec(), SlidingWindowSpec(block_size=2 * TOKENS)))
    assert isinstance(unknown, UnknownLayout)
    assert "block sizes" in unknown.reason


@pytest.mark.parametrize(
    ("spec", "reason"),
    [(SinkFullAttentionSpec(), "SinkFullAttentionSpec"), (MambaSpec(mamba_cache_mode="none"), "'none'")],
)
def test_what_is_not_known_is_said(spec: Any, reason: str) -> None:
    unknown = read_groups(config(spec))
    assert isinstance(unknown, UnknownLayout)
    assert reason in unknown.reason


def test_bytes_that_the_tensor_does_not_show() -> None:
    """Such as scales that a backend keeps behind the data: copying what is seen would lose them."""
    caches = {f"0.{layer}": torch.zeros(BLOCKS, HEADS, TOKENS, 2 * DIM) for layer in range(2)}
    spec = FullAttentionSpec(unpadded_page_size_bytes=PAGE * 4 + 64)
    unknown = read_layouts(groups_of(spec), caches, BLOCKS, lambda *_: 0, TOKENS)
    assert isinstance(unknown, UnknownLayout)
    assert f"{PAGE * 4} bytes a block and {PAGE * 4 + 64}" in unknown.reason
