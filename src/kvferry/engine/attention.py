"""Paged attention behind transformers' attention interface.

A forward pass packs the new tokens of all its sequences into one row. transformers' model code calls `paged_attention`
once a layer with their queries, keys and values; the keys and values go into the pool, and each sequence attends to
its own blocks. Recurrent layers come here as well, see `recurrent`. Knows no request and no policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from kvferry.blocks import GroupKind
from kvferry.engine.kv_pool import KV_FACTOR, KvPool
from kvferry.engine.recurrent import StatePass
from kvferry.engine.sequence import Batch, Slice
from kvferry.errors import RequestError

ATTENTION_NAME = "kvferry_paged"
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


class LayerHooks(Protocol):
    """Called around each layer's attention."""

    def before_layer(self, layer: int, stream: Any) -> None: ...

    def after_layer(self, layer: int, stream: Any) -> None: ...


@dataclass(slots=True)
class _Prefill:
    """A slice of a prompt, and which rows of the packed row it is.

    tables[group]: ids of the blocks that the slice attends to; the first of them begins at position `offsets[group]`.
    """

    piece: Slice
    rows: slice
    tables: dict[int, torch.Tensor]
    offsets: dict[int, int]


@dataclass(slots=True)
class _Steps:
    """Decode steps in one group: block tables `[steps, blocks]`, and a mask over the tokens of those blocks."""

    tables: torch.Tensor
    mask: torch.Tensor


class PagedBatch:
    """One forward pass over the pool, prepared once for all layers.

    The packed row holds the decode steps first, one token each, then the prefill slices.
    """

    def __init__(self, batch: Batch, pool: KvPool, hooks: LayerHooks | None, stream: Any) -> None:
        self._pool = pool
        self._hooks = hooks
        self._stream = stream
        self._device = pool.device
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        self.num_layers_seen = 0
        steps = [piece for piece in batch.slices if piece.is_decode_step]
        assert steps == batch.slices[: len(steps)], "decode steps come first"
        prefills = batch.slices[len(steps) :]
        self._num_steps = len(steps)
        kinds = [group.kind for group in pool.groups]
        self._kv_groups = [index for index, kind in enumerate(kinds) if kind is not GroupKind.STATE]
        self._clear_begun_blocks(batch)
        self._place_tokens(batch)
        self._prefills = self._place_prefills(prefills)
        self._steps = {group: self._place_steps(steps, group) for group in self._kv_groups} if steps else {}
        self._states = (
            StatePass(pool, kinds.index(GroupKind.STATE), steps, prefills) if GroupKind.STATE in kinds else None
        )

    def _clear_begun_blocks(self, batch: Batch) -> None:
        """Zero the blocks that this pass begins and leaves partly filled.

        Steps attend to whole blocks under a mask, and a masked NaN that an earlier owner left is still a NaN.
        """
        size = self._pool.tokens_per_block
        for group in self._kv_groups:
            begun = [
                piece.block_ids[group][piece.end // size]
                for piece in batch.slices
                if piece.end % size and piece.start <= piece.end - piece.end % size
            ]
            if begun:
                self._pool.tensors[group][begun] = 0

    def _place_tokens(self, batch: Batch) -> None:
        size = self._pool.tokens_per_block
        at = [(piece, position) for piece in batch.slices for position in range(piece.start, piece.end)]
        self.positions = torch.tensor([position for _, position in at], device=self._device)
        self._token_offsets = self.positions % size
        self._token_blocks = {
            group: torch.tensor(
                [piece.block_ids[group][position // size] for piece, position in at], device=self._device
            )
            for group in self._kv_groups
        }

    def _place_prefills(self, slices: list[Slice]) -> list[_Prefill]:
        size = self._pool.tokens_per_block
        prefills, row = [], self._num_steps
        for piece in slices:
            num_blocks = -(-piece.end // size)
            groups = self._pool.groups
            firsts = {group: groups[group].first_needed_block(piece.start, size) for group in self._kv_groups}
            tables = {
                group: torch.tensor(piece.block_ids[group][first:num_blocks], device=self._device)
                for group, first in firsts.items()
            }
            offsets = {group: first * size for group, first in firsts.items()}
            prefills.append(_Prefill(piece, slice(row, row + len(piece.tokens)), tables, offsets))
            row += len(piece.tokens)
        return prefills

    def _place_steps(self, steps: list[Slice], group: int) -> _Steps:
        """Block tables, padded to the longest with a block that the sequence attends to, so one that is filled."""
        size = self._pool.tokens_per_block
        rule = self._pool.groups[group]
        firsts = [rule.first_needed_block(piece.start, size) for piece in steps]
        rows = [
            piece.block_ids[group][first : -(-piece.end // size)] for piece, first in zip(steps, firsts, strict=True)
        ]
        longest = max(map(len, rows))
        tables = torch.tensor([row + row[:1] * (longest - len(row)) for row in rows], device=self._device)
        begins = torch.tensor(firsts, device=self._device)[:, None] * size
        seen = begins + torch.arange(longest * size, device=self._device)
        at = torch.tensor([piece.start for piece in steps], device=self._device)[:, None]
        return _Steps(tables, _visible(at, seen, rule.window_tokens)[:, None, None])

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Write this layer's keys and values `[1, kv_heads, rows, head_dim]`, attend with `query`
        `[1, heads, rows, head_dim]`; returns `[1, rows, heads, head_dim]`."""
        self._begin(layer)
        group = self._pool.group_of_layer[layer]
        for factor, new in enumerate((key, value)):
            pages = self._pool.pages(layer, factor)
            pages[self._token_blocks[group], :, self._token_offsets] = new[0].transpose(0, 1)
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        if self._num_steps:
            out[0, : self._num_steps] = self._attend_steps(layer, query[0, :, : self._num_steps], scaling)
        for prefill in self._prefills:
            rows = prefill.rows
            fresh = (key[:, :, rows], value[:, :, rows])
            out[:, rows] = self._attend_prefill(layer, prefill, query[:, :, rows], fresh, scaling).transpose(1, 2)
        self._end(layer)
        return out

    def recur(self, layer: int, hidden: torch.Tensor, run: Callable[[torch.Tensor, Any], torch.Tensor]) -> torch.Tensor:
        """Compute a recurrent layer, `run(hidden, cache)` for `hidden` `[1, rows, size]`, from the states before the
        pass to those after it."""
        assert self._states is not None
        self._begin(layer)
        out = self._states.compute(layer, hidden, run)
        self._end(layer)
        return out

    def _begin(self, layer: int) -> None:
        if self._hooks is not None:
            self._hooks.before_layer(layer, self._stream)

    def _end(self, layer: int) -> None:
        self.num_layers_seen += 1
        if self._hooks is not None:
            self._hooks.after_layer(layer, self._stream)

    def window_of(self, layer: int) -> int | None:
        """The layer's sliding window in tokens, as the pool's groups have it."""
        return self._pool.groups[self._pool.group_of_layer[layer]].window_tokens

    def _attend_prefill(
        self,
        layer: int,
        prefill: _Prefill,
        query: torch.Tensor,
        fresh: tuple[torch.Tensor, torch.Tensor],
        scaling: float | None,
    ) -> torch.Tensor:
        piece = prefill.piece
        window = self.window_of(layer)
        if piece.start == 0 and (window is None or piece.end <= window):
            return F.scaled_dot_product_attention(query, *fresh, is_causal=True, scale=scaling, enable_gqa=True)
        group = self._pool.group_of_layer[layer]
        num_keys = piece.end - prefill.offsets[group]
        keys, values = (kv[:, :, :num_keys] for kv in self._gather(layer, prefill.tables[group][None]))
        # Query heads that share a KV head become more queries of that head, so no key is copied per query head.
        _, heads, rows, head_dim = query.shape
        packed = query.reshape(1, keys.shape[1], -1, head_dim)
        mask = self._prefill_mask(prefill, group, heads // keys.shape[1])
        out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=mask, scale=scaling)
        return out.reshape(1, heads, rows, head_dim)

    def _prefill_mask(self, prefill: _Prefill, group: int, queries_per_head: int) -> torch.Tensor:
        mask = self._masks.get((prefill.rows.start, group))
        if mask is None:
            at = torch.arange(prefill.piece.start, prefill.piece.end, device=self._device)[:, None]
            seen = torch.arange(prefill.offsets[group], prefill.piece.end, device=self._device)[None]
            mask = _visible(at, seen, self._pool.groups[group].window_tokens).repeat(queries_per_head, 1)
            self._masks[prefill.rows.start, group] = mask
        return mask

    def _attend_steps(self, layer: int, query: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """`query` `[heads, steps, head_dim]` to `[steps, heads, head_dim]`."""
        steps = self._steps[self._pool.group_of_layer[layer]]
        keys, values = self._gather(layer, steps.tables)
        heads, num_steps, head_dim = query.shape
        packed = query.transpose(0, 1).reshape(num_steps, keys.shape[1], -1, head_dim)
        out = F.scaled_dot_product_attention(packed, keys, values, attn_mask=steps.mask, scale=scaling)
        return out.reshape(num_steps, heads, head_dim)

    def _gather(self, layer: int, tables: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values, each `[sequences, kv_heads, tokens, head_dim]`, of block `tables` `[sequences, blocks]`."""
        shape, size = self._pool.shape, self._pool.tokens_per_block
        gathered = []
        for factor in range(KV_FACTOR):
            # Whole blocks by row: index_select would copy the entire pool first if the rows were permuted views.
            rows = torch.index_select(self._pool.rows(layer, factor), 0, tables.view(-1))
            blocks = rows.view(*tables.shape, shape.num_heads, size, shape.head_dim)
            gathered.append(blocks.transpose(1, 2).flatten(2, 3))
        return gathered


def _visible(at: torch.Tensor, seen: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which positions `seen` a token `at` a position attends to: none after it, and only the last `window`."""
    visible = seen <= at
    return visible if window is None else visible & (seen > at - window)


def paged_attention(  # noqa: PLR0913 - the interface is transformers'
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    kvferry_batch: PagedBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface (`AttentionInterface`). RequestError: the model wants attention of a kind that
    is not built here, which the warm-up pass finds before any request."""
    assert attention_mask is None, "this interface has no mask function, so transformers makes no mask"
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise RequestError(f"the embedded engine has no attention with {name}, which this model needs")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if sliding_window != kvferry_batch.window_of(layer):
        raise RequestError(
            f"layer {layer} slides over {sliding_window} tokens, but the model's config says "
            f"{kvferry_batch.window_of(layer)}"
        )
    return kvferry_batch.attend(layer, query, key, value, scaling), None


AttentionInterface.register(ATTENTION_NAME, paged_attention)
