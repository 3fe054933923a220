"""What a rank's pool looks like in memory: where each block lies and in what order its bytes are.

A layout is read from the engine's own numbers (`PoolSpec`) and the tensor's shape, type and strides, which must agree
in everything; it is never guessed from one of them. Knows no store, no request and no stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What the engine says its pool holds on one rank. `dtype` is torch's name, such as "float32"."""

    num_layers: int
    num_heads: int
    head_dim: int
    tokens_per_block: int
    dtype: str


@dataclass(frozen=True, slots=True)
class UnknownLayout:
    """A pool that must not be copied from or to, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A pool of contiguous blocks: layer by layer, keys before values, each one page `heads * tokens * head_dim`.

    pool: the engine's tensor `[num_blocks, num_layers, kv_factor, page]`; held so that `base` stays valid.
    base: address of block 0. block_stride_bytes: from one block to the next, at least `block_bytes`.
    layer_bytes: keys and values of one layer of one block.
    """

    spec: PoolSpec
    pool: torch.Tensor
    base: int
    num_blocks: int
    block_stride_bytes: int
    layer_bytes: int

    @property
    def num_layers(self) -> int:
        return self.spec.num_layers

    @property
    def block_bytes(self) -> int:
        return self.layer_bytes * self.num_layers

    def part_bytes(self, chunk_tokens: int) -> int:
        """Bytes of a part: the chunk's blocks in order, each as it lies in the pool."""
        assert chunk_tokens % self.spec.tokens_per_block == 0
        return chunk_tokens // self.spec.tokens_per_block * self.block_bytes

    def fingerprint(self) -> str:
        """Names the order of bytes in a part: equal for two pools exactly if they may exchange parts."""
        spec = self.spec
        page = f"{spec.num_heads}x{spec.tokens_per_block}x{spec.head_dim}"
        return f"block/{spec.num_layers}/{self.pool.shape[2]}/{page}/{spec.dtype}"


def read_layout(pool: torch.Tensor, spec: PoolSpec) -> Layout | UnknownLayout:
    """The layout of a pool tensor, or the first reason why it is none that we know."""
    if pool.ndim != 4:
        return UnknownLayout(f"a pool of {pool.ndim} dimensions instead of 4")
    num_blocks, num_layers, kv_factor, page = pool.shape
    expected_page = spec.num_heads * spec.tokens_per_block * spec.head_dim
    found = {
        "element type": (str(pool.dtype).removeprefix("torch."), spec.dtype),
        "number of layers": (num_layers, spec.num_layers),
        "elements per page": (page, expected_page),
    }
    for what, (is_value, expected) in found.items():
        if is_value != expected:
            return UnknownLayout(f"{what} is {is_value} in the pool and {expected} by the engine's settings")
    if kv_factor not in (1, 2):
        return UnknownLayout(f"{kv_factor} entries between layer and page instead of 1 or 2")
    if num_blocks < 1 or page < 1:
        return UnknownLayout("an empty pool")
    if not pool[0].is_contiguous():
        return UnknownLayout(f"blocks with gaps: strides {pool.stride()}")
    block_elements = num_layers * kv_factor * page
    if num_blocks > 1 and pool.stride(0) < block_elements:
        return UnknownLayout(f"blocks that overlap: strides {pool.stride()}")
    return Layout(
        spec=spec,
        pool=pool,
        base=pool.data_ptr(),
        num_blocks=num_blocks,
        block_stride_bytes=pool.stride(0) * pool.element_size(),
        layer_bytes=kv_factor * page * pool.element_size(),
    )
