"""Describes an engine's pools to a connector as byte ranges, where one tensor cannot. Knows no engine.

Names and addressing follow TensorRT-LLM's `kv_cache_layout` module: the bytes of page `i` of a region lie at
`base + stride * i`, and page ids are scoped to a layer group. Imports no torch until a region is viewed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from kvferry.blocks import GroupKind

if TYPE_CHECKING:
    import torch

STATE_ROLES = ("conv_state", "ssm_state")
"""Roles of a recurrent layer's buffers: what its convolution remembers, and the recurrence proper."""


def valid_page_slots(page_indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Pairs (place in the list, page) without the places that have none. The place says which tokens the page holds; no
    page is -1, which as an index would be somebody else's."""
    return ((place, page) for place, page in enumerate(page_indices) if page >= 0)


@dataclass(frozen=True, slots=True)
class KvCacheBufferRef:
    """One layer's keys, values or state in a region. `role` is "key", "value" or one of STATE_ROLES; `layer_id` counts
    over the whole model."""

    layer_id: int
    role: str
    expansion: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class KvCacheRegion:
    """`size` bytes that repeat for each of `num_slots` pages, `stride` bytes apart from address `base` on.

    `memory` is the tensor that owns the bytes, so that a region keeps its pool alive.
    """

    base: int
    size: int
    stride: int
    num_slots: int
    buffers: tuple[KvCacheBufferRef, ...]
    memory: Any

    def address_of(self, slot_id: int) -> int:
        """Address of a page. IndexError: there is no such page."""
        if not 0 <= slot_id < self.num_slots:
            raise IndexError(f"page {slot_id} is not in 0 .. {self.num_slots - 1}")
        return self.base + self.stride * slot_id

    def as_tensor(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The region as `[num_slots, size // itemsize]`, row `i` being page `i`; bytes unless `dtype` says otherwise.
        ValueError: size or stride is no multiple of the type's size."""
        import torch

        dtype = dtype or torch.uint8
        if self.size % dtype.itemsize or self.stride % dtype.itemsize:
            raise ValueError(f"{self.size} bytes every {self.stride} are no whole number of {dtype}")
        elements = self.memory.untyped_storage()
        flat = torch.empty(0, dtype=dtype, device=self.memory.device).set_(elements)
        offset = (self.base - elements.data_ptr()) // dtype.itemsize
        shape = (self.num_slots, self.size // dtype.itemsize)
        return _as_on_gpu(flat.as_strided(shape, (self.stride // dtype.itemsize, 1), offset))

    def slot_tensor(self, slot_id: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One page of `as_tensor`. IndexError: there is no such page."""
        self.address_of(slot_id)
        return self.as_tensor(dtype)[slot_id]


@dataclass(frozen=True, slots=True)
class KvCacheLayerGroupLayout:
    """Layers that share page ids. `window_size` in tokens, None for full attention and for recurrent layers.

    replicated_regions: bytes that are equal on every rank; the embedded engine has none.
    """

    layer_group_id: int
    layer_ids: tuple[int, ...]
    window_size: int | None
    regions: tuple[KvCacheRegion, ...]
    replicated_regions: tuple[KvCacheRegion, ...] = ()

    @property
    def kind(self) -> GroupKind:
        """STATE, as the roles say: a page holds one state, that of all tokens up to the end of its place in the list of
        page ids, and most places have none. Else pages hold the KV of `tokens_per_block` tokens."""
        buffers = [buffer for region in self.regions for buffer in region.buffers]
        if buffers and all(buffer.role in STATE_ROLES for buffer in buffers):
            return GroupKind.STATE
        return GroupKind.FULL if self.window_size is None else GroupKind.WINDOW

    @property
    def bytes_per_page(self) -> int:
        return sum(region.size for region in self.regions)

    @property
    def replicated_bytes_per_page(self) -> int:
        return sum(region.size for region in self.replicated_regions)


@dataclass(frozen=True, slots=True)
class KvCacheLayout:
    """All of a rank's pools. gpu_pool_mapping_bytes: None, as each pool is one allocation."""

    tokens_per_block: int
    groups: tuple[KvCacheLayerGroupLayout, ...]
    gpu_pool_mapping_bytes: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the KV."""
        group = next((group for group in self.groups if group.kind is not GroupKind.STATE), self.groups[0])
        dtype: torch.dtype = group.regions[0].memory.dtype
        return dtype

    def group(self, layer_group_id: int) -> KvCacheLayerGroupLayout:
        """KeyError: there is no such group."""
        for group in self.groups:
            if group.layer_group_id == layer_group_id:
                return group
        raise KeyError(f"no layer group {layer_group_id}")

    def group_of_layer(self, layer_id: int) -> KvCacheLayerGroupLayout:
        """KeyError: no group has this layer."""
        for group in self.groups:
            if layer_id in group.layer_ids:
                return group
        raise KeyError(f"no layer group has layer {layer_id}")

    def as_single_pool_tensor(self) -> torch.Tensor | None:
        """The pool tensor that `register_kv_caches` takes, or None where one tensor cannot describe the pools."""
        if len(self.groups) != 1 or len(self.groups[0].regions) != 1 or self.groups[0].kind is GroupKind.STATE:
            return None
        return _as_on_gpu(self.groups[0].regions[0].memory)


def _as_on_gpu(pool: torch.Tensor) -> torch.Tensor:
    """A view of a pool, whose parts `cpu()` and `to("cpu")` copy also where the pool is on a CPU.

    Connectors are written for GPUs: without this the file of one block would hold the memory of the whole pool, for
    `torch.save` writes all that a tensor is a view of.
    """
    return pool if pool.device.type != "cpu" else pool.as_subclass(_host_pool_class())


@cache
def _host_pool_class() -> type[Any]:
    import torch

    class HostPool(torch.Tensor):
        def cpu(self, *arguments: Any, **options: Any) -> torch.Tensor:
            return self.as_subclass(torch.Tensor).clone()

        def to(self, *arguments: Any, **options: Any) -> torch.Tensor:
            plain = self.as_subclass(torch.Tensor)
            moved: torch.Tensor = plain.to(*arguments, **options)
            return moved.clone() if moved is plain else moved

    return HostPool


def describe_kv(
    layer_group_id: int, layers: tuple[int, ...], window: int | None, pool: torch.Tensor
) -> KvCacheLayerGroupLayout:
    """Layers of one window and their pool, contiguous, `[num_blocks, num_layers, kv_factor, elements]`."""
    buffers = tuple(KvCacheBufferRef(layer, role) for layer in layers for role in ("key", "value"))
    return KvCacheLayerGroupLayout(layer_group_id, layers, window, (_describe(pool, buffers),))


def describe_states(layer_group_id: int, states: Mapping[int, Mapping[str, torch.Tensor]]) -> KvCacheLayerGroupLayout:
    """Recurrent layers, and of each its pools by role, `[num_blocks, ...]` with contiguous pages."""
    regions = [
        _describe(pages, (KvCacheBufferRef(layer, role),))
        for layer, by_role in states.items()
        for role, pages in by_role.items()
    ]
    return KvCacheLayerGroupLayout(layer_group_id, tuple(states), None, tuple(regions))


def _describe(pages: torch.Tensor, buffers: tuple[KvCacheBufferRef, ...]) -> KvCacheRegion:
    stride = pages.stride(0) * pages.element_size()
    return KvCacheRegion(pages.data_ptr(), pages[0].nbytes, stride, pages.shape[0], buffers, pages)
