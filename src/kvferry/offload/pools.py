"""Reads what an engine registers: its pools, each proved on the tensor itself. Knows no store and no request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry.connector.config import LlmArgs
from kvferry.connector.layout import KvCacheLayerGroupLayout
from kvferry.transfer.copy import self_test
from kvferry.transfer.layout import Layout, PoolSpec, UnknownLayout, read_pool_tensor

if TYPE_CHECKING:
    import torch


def read_pool(llm_args: LlmArgs, pool: torch.Tensor, layers: tuple[int, ...]) -> Layout | UnknownLayout:
    """The layout of one pool tensor of these layers, which nobody uses yet."""
    if llm_args.num_kv_heads % llm_args.tensor_parallel_size:
        return UnknownLayout(f"{llm_args.num_kv_heads} heads on {llm_args.tensor_parallel_size} ranks")
    spec = PoolSpec(
        num_heads=llm_args.num_kv_heads // llm_args.tensor_parallel_size,
        head_dim=llm_args.head_dim,
        tokens_per_block=llm_args.kv_cache_config.tokens_per_block,
        dtype=llm_args.kv_dtype,
    )
    layout = read_pool_tensor(pool, spec, layers)
    if isinstance(layout, Layout) and not self_test(layout):
        return UnknownLayout("bytes written to the pool were not found where they should be")
    return layout


def read_group(llm_args: LlmArgs, group: KvCacheLayerGroupLayout, position: int) -> Layout | UnknownLayout:
    """The layout of the pool of a layer group, which must be one tensor. `position`: of the group among all."""
    if group.layer_group_id != position:
        return UnknownLayout(f"layer group {group.layer_group_id} stands at position {position}")
    if len(group.regions) != 1 or group.replicated_regions:
        count = len(group.regions) + len(group.replicated_regions)
        return UnknownLayout(f"layer group {position} has {count} regions instead of 1")
    (region,) = group.regions
    layout = read_pool(llm_args, region.memory, group.layer_ids)
    if isinstance(layout, Layout):
        said = (region.base, region.size, region.stride, region.num_slots)
        (read,) = layout.regions
        found = (read.base, read.page_bytes, read.stride_bytes, layout.num_blocks)
        if said != found:
            return UnknownLayout(f"(base, size, stride, pages) are {said} by the engine and {found} in the tensor")
    return layout
