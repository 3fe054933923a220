"""A layout is known only where tensor and settings agree in everything."""

from __future__ import annotations

import pytest
import torch

from kvferry.transfer.layout import Layout, PoolSpec, UnknownLayout, read_layout

SPEC = PoolSpec(num_layers=3, num_heads=2, head_dim=8, tokens_per_block=4, dtype="float32")
PAGE = 2 * 8 * 4


def test_layout_of_a_contiguous_pool() -> None:
    pool = torch.zeros(5, 3, 2, PAGE)
    layout = read_layout(pool, SPEC)
    assert isinstance(layout, Layout)
    assert (layout.base, layout.num_blocks) == (pool.data_ptr(), 5)
    assert layout.layer_bytes == 2 * PAGE * 4
    assert layout.block_bytes == layout.block_stride_bytes == 3 * layout.layer_bytes
    assert layout.part_bytes(12) == 3 * layout.block_bytes


def test_layout_of_blocks_with_a_wider_stride() -> None:
    wide = torch.zeros(5, 4, 2, PAGE)
    layout = read_layout(wide[:, :3], SPEC)
    assert isinstance(layout, Layout)
    assert layout.block_stride_bytes == 4 * layout.layer_bytes
    assert layout.block_bytes == 3 * layout.layer_bytes


@pytest.mark.parametrize(
    ("pool", "word"),
    [
        (torch.zeros(5, 3, PAGE), "dimensions"),
        (torch.zeros(5, 4, 2, PAGE), "layers"),
        (torch.zeros(5, 3, 3, PAGE), "entries"),
        (torch.zeros(5, 3, 2, PAGE + 1), "page"),
        (torch.zeros(5, 3, 2, PAGE, dtype=torch.float16), "type"),
        (torch.zeros(0, 3, 2, PAGE), "empty"),
        (torch.zeros(5, 3, 2, 2 * PAGE)[..., :PAGE], "gaps"),
        (torch.zeros(5, 2, 3, PAGE).transpose(1, 2), "gaps"),
        (torch.zeros(1, 3, 2, PAGE).expand(5, 3, 2, PAGE), "overlap"),
    ],
)
def test_whatever_disagrees_is_unknown(pool: torch.Tensor, word: str) -> None:
    layout = read_layout(pool, SPEC)
    assert isinstance(layout, UnknownLayout)
    assert word in layout.reason


def test_fingerprints_differ_wherever_bytes_would() -> None:
    specs = [
        SPEC,
        PoolSpec(num_layers=6, num_heads=1, head_dim=8, tokens_per_block=4, dtype="float32"),
        PoolSpec(num_layers=3, num_heads=1, head_dim=8, tokens_per_block=8, dtype="float32"),
        PoolSpec(num_layers=3, num_heads=1, head_dim=16, tokens_per_block=4, dtype="float32"),
        PoolSpec(num_layers=3, num_heads=2, head_dim=8, tokens_per_block=4, dtype="float16"),
    ]
    pools = [
        torch.zeros(2, s.num_layers, 2, s.num_heads * s.head_dim * s.tokens_per_block, dtype=getattr(torch, s.dtype))
        for s in specs
    ]
    layouts = [read_layout(pool, spec) for pool, spec in zip(pools, specs, strict=True)]
    prints = [layout.fingerprint() for layout in layouts if isinstance(layout, Layout)]
    assert len(set(prints)) == len(specs)
