"""The engine's KV memory on one rank: one tensor, and each layer's view of it. Knows no sequence and no policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_DEFAULT_POOL_BYTES_CPU = 10**9
_DEFAULT_FREE_MEMORY_FRACTION_CUDA = 0.8
KV_FACTOR = 2
"""Keys and values."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """One rank's KV per token and layer: `num_heads` heads of `head_dim` elements, for keys and again for values."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    def block_bytes(self, tokens_per_block: int) -> int:
        """Bytes of one block, all layers."""
        elements = self.num_layers * KV_FACTOR * self.num_heads * tokens_per_block * self.head_dim
        return elements * self.dtype.itemsize


class KvPool:
    """The pool tensor, shape `[num_blocks, num_layers, kv_factor, num_heads * tokens_per_block * head_dim]`.

    `keys[layer]` and `values[layer]` view it as `[num_blocks, num_heads, tokens_per_block, head_dim]`.
    """

    def __init__(self, shape: KvShape, num_blocks: int, tokens_per_block: int, device: torch.device) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        per_layer = shape.num_heads * tokens_per_block * shape.head_dim
        self.tensor = torch.zeros(num_blocks, shape.num_layers, KV_FACTOR, per_layer, dtype=shape.dtype, device=device)
        blocks = (num_blocks, shape.num_heads, tokens_per_block, shape.head_dim)
        self.keys = [self.tensor[:, layer, 0].view(blocks) for layer in range(shape.num_layers)]
        self.values = [self.tensor[:, layer, 1].view(blocks) for layer in range(shape.num_layers)]


def default_max_tokens(shape: KvShape, wanted_tokens: int, device: torch.device) -> int:
    """Tokens for a pool whose size the user left open: `wanted_tokens`, but at most 1 GB on a CPU and 80 % of the free
    memory of a GPU."""
    free_bytes = _DEFAULT_POOL_BYTES_CPU
    if device.type == "cuda":
        free_bytes = int(torch.cuda.mem_get_info(device)[0] * _DEFAULT_FREE_MEMORY_FRACTION_CUDA)
    return min(wanted_tokens, free_bytes // shape.block_bytes(1))
