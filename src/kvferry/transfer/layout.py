"""What a rank's pool looks like in memory: where each block's pages lie and in what order their bytes are.

A pool is a set of regions. In each, block `b` has one page: a tensor of the engine's own, seen block by block. So one
description covers packed and split keys and values, one tensor a layer or one for all, latents that keys and values
share, and recurrent states. What a page means is never guessed from its shape: whoever reads an engine's pool says so
in `content`. Knows no store, no request and no stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class UnknownLayout:
    """A pool that must not be copied from or to, and why."""

    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One page a block. pages: `[num_blocks, ...]`, a view of the engine's tensor; a page has no gaps, in whatever
    order of its dimensions. layers: whose KV it is, in the order of bytes."""

    pages: torch.Tensor
    layers: tuple[int, ...]

    @property
    def base(self) -> int:
        """Address of block 0's page."""
        return self.pages.data_ptr()

    @property
    def stride_bytes(self) -> int:
        """From one block's page to the next's."""
        return self.pages.stride(0) * self.pages.element_size()

    @property
    def page_bytes(self) -> int:
        return self.pages[0].numel() * self.pages.element_size()

    def fingerprint(self) -> str:
        """Names the order of bytes in a page."""
        shape, strides = "x".join(map(str, self.pages.shape[1:])), "x".join(map(str, self.pages.stride()[1:]))
        return f"{len(self.layers)}:{str(self.pages.dtype).removeprefix('torch.')}:{shape}:{strides}"


@dataclass(frozen=True, slots=True)
class Layout:
    """A group's pool. A part holds, region after region, the pages of the chunk's blocks in order.

    content: what the pages mean, as far as it is not told by types, shapes and strides.
    """

    regions: tuple[Region, ...]
    tokens_per_block: int
    content: str

    @property
    def num_blocks(self) -> int:
        return self.regions[0].pages.shape[0]

    @property
    def device(self) -> torch.device:
        return self.regions[0].pages.device

    @property
    def block_bytes(self) -> int:
        return sum(region.page_bytes for region in self.regions)

    def blocks_per_part(self, chunk_tokens: int) -> int:
        assert chunk_tokens % self.tokens_per_block == 0
        return chunk_tokens // self.tokens_per_block

    def part_bytes(self, chunk_tokens: int) -> int:
        return self.blocks_per_part(chunk_tokens) * self.block_bytes

    def fingerprint(self) -> str:
        """Names the order of bytes in a part: equal for two pools exactly if they may exchange parts."""
        pages = "+".join(region.fingerprint() for region in self.regions)
        return f"region/{self.tokens_per_block}/{self.content}/{pages}"


def read_regions(
    views: Sequence[tuple[torch.Tensor, tuple[int, ...]]], tokens_per_block: int, content: str
) -> Layout | UnknownLayout:
    """The layout of a pool given as views `[num_blocks, ...]` of the engine's tensors, each with its layers; or the
    first reason why it is none that can be copied."""
    if not views:
        return UnknownLayout("a pool without tensors")
    regions = []
    for pages, layers in views:
        if pages.ndim < 2 or pages.numel() == 0:
            return UnknownLayout(f"an empty pool: shape {tuple(pages.shape)}")
        if (pages.shape[0], pages.device) != (views[0][0].shape[0], views[0][0].device):
            return UnknownLayout("tensors of one pool with different numbers of blocks or on different devices")
        if not _is_dense(pages[0]):
            return UnknownLayout(f"blocks with gaps: strides {pages.stride()} of shape {tuple(pages.shape)}")
        if pages.shape[0] > 1 and pages.stride(0) < pages[0].numel():
            return UnknownLayout(f"blocks that overlap: strides {pages.stride()} of shape {tuple(pages.shape)}")
        regions.append(Region(pages, layers))
    return Layout(tuple(regions), tokens_per_block, content)


def _is_dense(page: torch.Tensor) -> bool:
    """Whether a page's elements fill one range of memory, each once."""
    size = 1
    for stride, length in sorted((stride, length) for stride, length in zip(page.stride(), page.shape, strict=True)):
        if length == 1:
            continue
        if stride != size:
            return False
        size *= length
    return True


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What an engine says of a pool `[num_blocks, layers, kv_factor, heads * tokens * head_dim]` on one rank.
    `dtype` is torch's name, such as "float32"."""

    num_heads: int
    head_dim: int
    tokens_per_block: int
    dtype: str


def read_pool_tensor(pool: torch.Tensor, spec: PoolSpec, layers: tuple[int, ...]) -> Layout | UnknownLayout:
    """The layout of the pool tensor of the connector API, which holds these layers and must agree with `spec`."""
    if pool.ndim != 4:
        return UnknownLayout(f"a pool of {pool.ndim} dimensions instead of 4")
    _, num_layers, kv_factor, page = pool.shape
    expected_page = spec.num_heads * spec.tokens_per_block * spec.head_dim
    found = {
        "element type": (str(pool.dtype).removeprefix("torch."), spec.dtype),
        "number of layers": (num_layers, len(layers)),
        "elements per page": (page, expected_page),
    }
    for what, (is_value, expected) in found.items():
        if is_value != expected:
            return UnknownLayout(f"{what} is {is_value} in the pool and {expected} by the engine's settings")
    if kv_factor not in (1, 2):
        return UnknownLayout(f"{kv_factor} entries between layer and page instead of 1 or 2")
    if pool.numel() and not pool[0].is_contiguous():
        return UnknownLayout(f"blocks with gaps or in another order: strides {pool.stride()}")
    content = f"{spec.num_heads}x{spec.tokens_per_block}x{spec.head_dim}"
    return read_regions([(pool, layers)], spec.tokens_per_block, content)
