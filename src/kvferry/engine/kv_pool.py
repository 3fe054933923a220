"""The engine's KV memory on one rank: a tensor for each layer group. Knows no sequence and no policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvferry.blocks import GroupKind
from kvferry.connector.layout import KvCacheLayout, describe_kv, describe_states
from kvferry.engine.groups import LayerGroup

_DEFAULT_POOL_BYTES_CPU = 10**9
_DEFAULT_FREE_MEMORY_FRACTION_CUDA = 0.8
_MEMORY_INFO = Path("/proc/meminfo")
KV_FACTOR = 2
"""Keys and values."""
_ALIGNMENT = 16
"""Of a state's tensors within a page: a multiple of every element's size."""


@dataclass(frozen=True, slots=True)
class StateShape:
    """One tensor of a recurrent layer's state of one sequence. `role` is one of `connector.layout.STATE_ROLES`."""

    layer: int
    role: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class KvShape:
    """One rank's KV per token and layer: `num_heads` heads of `head_dim` elements, for keys and again for values.

    `num_layers` have that; the others have `states`, whatever the number of tokens.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype
    states: tuple[StateShape, ...] = ()

    def block_bytes(self, tokens_per_block: int) -> int:
        """Bytes of one block, all layers that have KV."""
        elements = self.num_layers * KV_FACTOR * self.num_heads * tokens_per_block * self.head_dim
        return elements * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state, each tensor aligned."""
        return sum(_aligned(state.num_bytes) for state in self.states)


class KvPool:
    """One tensor a group: `[num_blocks, group's layers, kv_factor, num_heads * tokens_per_block * head_dim]`, or bytes
    `[num_blocks, state_bytes]` where the layers are recurrent.

    `tensors[group]`; `rows(layer, factor)` is one layer's keys (0) or values (1), one row a block; `states[layer]` has
    a recurrent layer's tensors by role, each `[num_blocks, *shape]`.
    """

    def __init__(
        self,
        shape: KvShape,
        groups: Sequence[LayerGroup],
        num_blocks: int,
        tokens_per_block: int,
        device: torch.device,
    ) -> None:
        self.shape = shape
        self.groups = tuple(groups)
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.device = device
        self.tensors = [self._make(group) for group in self.groups]
        self.group_of_layer = {layer: index for index, group in enumerate(self.groups) for layer in group.layers}
        self._position = {layer: at for group in self.groups for at, layer in enumerate(group.layers)}
        self.states = self._view_states()

    def _make(self, group: LayerGroup) -> torch.Tensor:
        if group.snapshots is not None:
            return _zeros((group.snapshots.num_blocks, self.shape.state_bytes), torch.uint8, self.device)
        elements = self.shape.num_heads * self.tokens_per_block * self.shape.head_dim
        size = (self.num_blocks, len(group.layers), KV_FACTOR, elements)
        return _zeros(size, self.shape.dtype, self.device)

    def _view_states(self) -> dict[int, dict[str, torch.Tensor]]:
        views: dict[int, dict[str, torch.Tensor]] = {}
        offset = 0
        for state in self.shape.states:
            pages = self.tensors[self.group_of_layer[state.layer]][:, offset : offset + state.num_bytes]
            views.setdefault(state.layer, {})[state.role] = pages.view(state.dtype).view(-1, *state.shape)
            offset += _aligned(state.num_bytes)
        return views

    def rows(self, layer: int, factor: int) -> torch.Tensor:
        """`[num_blocks, num_heads * tokens_per_block * head_dim]`, a view."""
        return self.tensors[self.group_of_layer[layer]][:, self._position[layer], factor]

    def pages(self, layer: int, factor: int) -> torch.Tensor:
        """`[num_blocks, num_heads, tokens_per_block, head_dim]`, a view."""
        shape = (self.num_blocks, self.shape.num_heads, self.tokens_per_block, self.shape.head_dim)
        return self.rows(layer, factor).view(shape)

    @property
    def layout(self) -> KvCacheLayout:
        """What a connector is told of these pools."""
        groups = [
            describe_states(index, self.states)
            if group.kind is GroupKind.STATE
            else describe_kv(index, group.layers, group.window_tokens, self.tensors[index])
            for index, group in enumerate(self.groups)
        ]
        return KvCacheLayout(self.tokens_per_block, tuple(groups))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a GPU at the beginning of an allocation of their own, for what connectors share with other processes
    through CUDA IPC is an allocation from its beginning on, whatever address they name."""
    if device.type != "cuda":
        return torch.zeros(shape, dtype=dtype, device=device)
    # A device without an index is the current one, which `use_mem_pool` takes by that number or not at all.
    with torch.cuda.use_mem_pool(torch.cuda.MemPool(), device.index):
        return torch.zeros(shape, dtype=dtype, device=device)


def free_bytes(device: torch.device) -> int:
    """A GPU's free memory; on a CPU what Linux calls the machine's available memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    fields = dict(line.split(":", 1) for line in _MEMORY_INFO.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def most_pool_bytes(free: int, fraction: float | None, device: torch.device, num_ranks: int) -> int:
    """What one rank's pool may take of `free` bytes of its device: `fraction` of them, which ranks on a CPU share. By
    default 80 % of a GPU's, and 1 GB on a CPU."""
    if device.type == "cuda":
        return int(free * (fraction or _DEFAULT_FREE_MEMORY_FRACTION_CUDA))
    return int(free * fraction / num_ranks) if fraction is not None else _DEFAULT_POOL_BYTES_CPU


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
