"""Reads what an engine registers: its pools, each proved on the tensor itself. Knows no store and no request."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry.blocks import GroupKind
from kvferry.connector.config import LlmArgs
from kvferry.connector.layout import KvCacheLayerGroupLayout
from kvferry.transfer.copy import self_test
from kvferry.transfer.layout import Layout, PoolSpec, UnknownLayout, read_pool_tensor, read_regions

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
    return _tested(read_pool_tensor(pool, spec, layers))


def read_group(
    llm_args: LlmArgs, group: KvCacheLayerGroupLayout, position: int, chunk_tokens: int
) -> Layout | UnknownLayout:
    """The layout of the pool of a layer group: one tensor, or the states of recurrent layers, of which a chunk has one.
    `position`: of the group among all."""
    if group.layer_group_id != position:
        return UnknownLayout(f"layer group {group.layer_group_id} stands at position {position}")
    if group.replicated_regions or (len(group.regions) != 1 and group.kind is not GroupKind.STATE):
        count = len(group.regions) + len(group.replicated_regions)
        return UnknownLayout(f"layer group {position} has {count} regions instead of 1")
    if group.kind is GroupKind.STATE:
        layout = _read_states(group, chunk_tokens)
    else:
        layout = read_pool(llm_args, group.regions[0].memory, group.layer_ids)
    if isinstance(layout, UnknownLayout):
        return layout
    for region, read in zip(group.regions, layout.regions, strict=True):
        said = (region.base, region.size, region.stride, region.num_slots)
        found = (read.base, read.page_bytes, read.stride_bytes, layout.num_blocks)
        if said != found:
            return UnknownLayout(f"(base, size, stride, pages) are {said} by the engine and {found} in the tensor")
    return layout


def _read_states(group: KvCacheLayerGroupLayout, chunk_tokens: int) -> Layout | UnknownLayout:
    views = [(region.memory, tuple(buffer.layer_id for buffer in region.buffers)) for region in group.regions]
    roles = ",".join(buffer.role for region in group.regions for buffer in region.buffers)
    return _tested(read_regions(views, chunk_tokens, roles))


def _tested(layout: Layout | UnknownLayout) -> Layout | UnknownLayout:
    if isinstance(layout, Layout) and not self_test(layout):
        return UnknownLayout("bytes written to the pool were not found where they should be")
    return layout
