"""Reads vLLM's KV cache: which groups of layers it has and where their blocks lie, from its specs and tensors alone.

What a spec or a tensor does not say for certain is an `UnknownLayout`: nothing is kept then. Knows no store and no
request, and imports no vLLM: specs are told apart by their exact class, as a subclass may mean other bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from kvferry.blocks import GroupKind, GroupSpec
from kvferry.transfer.copy import self_test
from kvferry.transfer.layout import Layout, UnknownLayout, read_regions

_LATENT = "MLAAttentionSpec"
_FULL = frozenset({"FullAttentionSpec", _LATENT})


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """A group of vLLM's: its layers' names and specs in order, and what it must find at a boundary.

    first_needed: from the number of tokens computed, the first that the next token attends to. vLLM takes back blocks
    that lie before it.
    """

    names: tuple[str, ...]
    specs: tuple[Any, ...]
    kind: GroupKind
    window_tokens: int | None
    tokens_per_block: int
    first_needed: Callable[[int], int]

    @property
    def is_latent(self) -> bool:
        """Whether every rank of tensor parallelism has the same bytes."""
        return all(type(spec).__name__ == _LATENT for spec in self.specs)

    def spec(self, part_bytes: int, first_layer: int) -> GroupSpec:
        layers = tuple(range(first_layer, first_layer + len(self.names)))
        return GroupSpec(self.kind, layers, part_bytes, self.window_tokens)


def read_groups(kv_cache_config: Any) -> list[CacheGroup] | UnknownLayout:
    """The groups of a `KVCacheConfig`, or the first reason why they cannot be kept."""
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        names = tuple(group.layer_names)
        by_layer = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        specs = tuple(by_layer[name] for name in names) if by_layer else (group.kv_cache_spec,) * len(names)
        if not getattr(group, "enable_kv_transfer", True) or getattr(group, "host_resident", False):
            return UnknownLayout(f"the group of {names[0]} is not for connectors")
        read = [_read_spec(spec) for spec in specs]
        unknown = next((of for of in read if isinstance(of, UnknownLayout)), None)
        if unknown is not None or not read:
            return unknown or UnknownLayout("a group without layers")
        kinds = {of[:2] for of in read if not isinstance(of, UnknownLayout)}
        sizes = {spec.block_size for spec in specs}
        if len(kinds) != 1 or len(sizes) != 1:
            return UnknownLayout(f"layers of several kinds or block sizes in the group of {names[0]}")
        assert not isinstance(read[0], UnknownLayout)
        kind, window_tokens, first_needed = read[0]
        groups.append(CacheGroup(names, specs, kind, window_tokens, sizes.pop(), first_needed))
    if len({group.tokens_per_block for group in groups}) != 1:
        return UnknownLayout(f"groups of block sizes {[group.tokens_per_block for group in groups]}")
    return groups


def read_layouts(
    groups: Sequence[CacheGroup],
    caches: Mapping[str, torch.Tensor | Sequence[torch.Tensor]],
    num_blocks: int,
    block_dim: Callable[[str, Any], int],
    chunk_tokens: int,
) -> list[Layout] | UnknownLayout:
    """Where each group's blocks lie, proved by a round trip through each group's tensors, which nobody uses yet.

    caches: by layer name, what vLLM registers. block_dim: from a layer's name and spec, the dimension of its tensor
    that counts blocks. chunk_tokens: what a state stands for, as a chunk has one.
    """
    layouts = []
    for group in groups:
        views: list[tuple[torch.Tensor, tuple[int, ...]]] = []
        for layer, (name, spec) in enumerate(zip(group.names, group.specs, strict=True)):
            pages = _pages(caches[name], num_blocks, block_dim(name, spec))
            page_bytes = sum(map(_page_bytes, pages))
            if page_bytes != _content_bytes(spec):
                return UnknownLayout(f"{name} has {page_bytes} bytes a block and {_content_bytes(spec)} by its spec")
            views += [(view, (layer,)) for view in pages]
        tokens = chunk_tokens if group.kind is GroupKind.STATE else group.tokens_per_block
        layout = read_regions(_joined(views), tokens, _content(group, [view for view, _ in views]))
        if isinstance(layout, UnknownLayout):
            return layout
        if not self_test(layout):
            return UnknownLayout("bytes written to the blocks were not found where they should be")
        layouts.append(layout)
    return layouts


def _read_spec(spec: Any) -> tuple[GroupKind, int | None, Callable[[int], int]] | UnknownLayout:
    name = type(spec).__name__
    if name in _FULL and getattr(spec, "tokens_per_state", 1) == 1 and getattr(spec, "compress_ratio", 1) == 1:
        return GroupKind.FULL, None, lambda _: 0
    if name == "SlidingWindowSpec":
        window = spec.sliding_window
        return GroupKind.WINDOW, window, lambda computed: max(0, computed - window + 1)
    if name == "ChunkedLocalAttentionSpec":
        size = spec.attention_chunk_size
        return GroupKind.WINDOW, size, lambda computed: computed // size * size
    if name == "MambaSpec" and spec.mamba_cache_mode == "align":
        return GroupKind.STATE, None, lambda computed: max(0, computed - 1)
    if name == "MambaSpec":
        return UnknownLayout(f"recurrent states are cached in the mode {spec.mamba_cache_mode!r}, not 'align'")
    return UnknownLayout(f"its specs include {name}, which is not known")


def _content(group: CacheGroup, views: Sequence[torch.Tensor]) -> str:
    """What a page's elements are and how they lie, as far as spec and tensors say: joined regions are bytes alone."""
    of_specs = [(type(of).__name__, str(getattr(of, "kv_quant_mode", "")), str(of)) for of in group.specs]
    of_views = [(str(view.dtype), tuple(view.shape[1:]), view.stride()[1:]) for view in views]
    return xxhash.xxh3_128_hexdigest(repr((of_specs, of_views)).encode())


def _content_bytes(spec: Any) -> int:
    """A block's bytes of a layer, without what pads it."""
    if hasattr(spec, "unpadded_page_size_bytes"):
        return int(spec.unpadded_page_size_bytes)
    shapes = zip(spec.shapes, spec.dtypes, strict=True)
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)


def _pages(cache: torch.Tensor | Sequence[torch.Tensor], num_blocks: int, block_dim: int) -> list[torch.Tensor]:
    """Views `[num_blocks, ...]` of a layer's tensors. A kernel's blocks that make up one block come together; what lies
    outside the blocks, as values behind all keys do, becomes views of its own. Empty: blocks cannot be told."""
    if not isinstance(cache, torch.Tensor):
        return [view for state in cache for view in _pages(state, num_blocks, 0)]
    blocks = cache.movedim(block_dim, 0)
    if blocks.shape[0] % num_blocks:
        return []
    if blocks.shape[0] != num_blocks:
        blocks = blocks.unflatten(0, (num_blocks, -1))  # type: ignore[no-untyped-call]
    outer = next((dim for dim in range(1, blocks.ndim) if _is_outside(blocks, dim)), None)
    return (
        [blocks] if outer is None else [view for part in blocks.unbind(outer) for view in _pages(part, num_blocks, 0)]
    )


def _is_outside(blocks: torch.Tensor, dim: int) -> bool:
    return blocks.shape[dim] > 1 and blocks.shape[0] > 1 and blocks.stride(dim) > blocks.stride(0)


def _joined(views: list[tuple[torch.Tensor, tuple[int, ...]]]) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    """One view of bytes for neighbours that follow each other within every block, as all layers of a block may."""
    joined: list[tuple[torch.Tensor, tuple[int, ...]]] = []
    for pages, layers in views:
        if joined and _follows(joined[-1][0], pages):
            before, layers_before = joined.pop()
            start = before.data_ptr() - before.untyped_storage().data_ptr()
            size = _page_bytes(before) + _page_bytes(pages)
            flat = torch.empty(0, dtype=torch.uint8, device=pages.device).set_(before.untyped_storage())
            stride = before.stride(0) * before.element_size()
            joined.append((flat.as_strided((before.shape[0], size), (stride, 1), start), (*layers_before, *layers)))
        else:
            joined.append((pages, layers))
    return joined


def _follows(before: torch.Tensor, pages: torch.Tensor) -> bool:
    strides = {of.stride(0) * of.element_size() for of in (before, pages)}
    return (
        before.untyped_storage().data_ptr() == pages.untyped_storage().data_ptr()
        and len(strides) == 1
        and before.shape[0] == pages.shape[0]
        and pages.data_ptr() == before.data_ptr() + _page_bytes(before)
        and strides.pop() >= _page_bytes(before) + _page_bytes(pages)
    )


def _page_bytes(pages: torch.Tensor) -> int:
    return pages[0].numel() * pages.element_size()
