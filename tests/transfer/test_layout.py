"""A layout is known only where tensor and settings agree in everything."""

from __future__ import annotations

import pytest
import torch

from kvferry.transfer.layout import Layout, PoolSpec, UnknownLayout, read_pool_tensor, read_regions

SPEC = PoolSpec(num_heads=2, head_dim=8, tokens_per_block=4, dtype="float32")
LAYERS = (0, 1, 2)
PAGE = 2 * 8 * 4


def test_layout_of_a_contiguous_pool() -> None:
    pool = torch.zeros(5, 3, 2, PAGE)
    layout = read_pool_tensor(pool, SPEC, LAYERS)
    assert isinstance(layout, Layout)
    (region,) = layout.regions
    assert (region.base, region.layers, layout.num_blocks) == (pool.data_ptr(), LAYERS, 5)
    assert layout.block_bytes == region.page_bytes == region.stride_bytes == 3 * 2 * PAGE * 4
    assert layout.part_bytes(12) == 3 * layout.block_bytes


def test_layout_of_blocks_with_a_wider_stride() -> None:
    wide = torch.zeros(5, 4, 2, PAGE)
    layout = read_pool_tensor(wide[:, :3], SPEC, LAYERS)
    assert isinstance(layout, Layout)
    assert layout.regions[0].stride_bytes == 4 * 2 * PAGE * 4
    assert layout.block_bytes == 3 * 2 * PAGE * 4


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
    layout = read_pool_tensor(pool, SPEC, LAYERS)
    assert isinstance(layout, UnknownLayout)
    assert word in layout.reason


@pytest.mark.parametrize(
    ("views", "word"),
    [
        ([], "without"),
        ([torch.zeros(5, 8), torch.zeros(4, 8)], "numbers of blocks"),
        ([torch.zeros(5, 4, 8)[:, ::2]], "gaps"),
        ([torch.zeros(1, 8).expand(5, 8)], "overlap"),
        ([torch.zeros(5)], "empty"),
    ],
)
def test_regions_that_cannot_be_copied(views: list[torch.Tensor], word: str) -> None:
    layout = read_regions([(view, (0,)) for view in views], 4, "")
    assert isinstance(layout, UnknownLayout)
    assert word in layout.reason


def test_fingerprints_differ_wherever_bytes_would() -> None:
    """In the number of layers, of heads or tokens, in head size, type, and the order of dimensions and of regions."""
    specs = [
        (3, SPEC),
        (6, PoolSpec(num_heads=1, head_dim=8, tokens_per_block=4, dtype="float32")),
        (3, PoolSpec(num_heads=1, head_dim=8, tokens_per_block=8, dtype="float32")),
        (3, PoolSpec(num_heads=1, head_dim=16, tokens_per_block=4, dtype="float32")),
        (3, PoolSpec(num_heads=2, head_dim=8, tokens_per_block=4, dtype="float16")),
    ]
    layouts = []
    for num_layers, spec in specs:
        page = spec.num_heads * spec.head_dim * spec.tokens_per_block
        pool = torch.zeros(2, num_layers, 2, page, dtype=getattr(torch, spec.dtype))
        layouts.append(read_pool_tensor(pool, spec, tuple(range(num_layers))))
    heads_first, wide = torch.zeros(2, 4, 8), torch.zeros(2, 8, 4)
    pools = [[heads_first], [wide], [wide.transpose(1, 2)], [heads_first, wide], [wide, heads_first]]
    layouts += [read_regions([(view, (0,)) for view in views], 4, "") for views in pools]
    layouts.append(read_regions([(heads_first, (0,))], 4, "latents"))
    prints = [layout.fingerprint() for layout in layouts if isinstance(layout, Layout)]
    assert len(set(prints)) == len(layouts)
