"""Recurrent layers over the pool's states: convolutions and state spaces that stand beside attention.

transformers' layers ask a cache for the state before the tokens that they are given and hand it the state after them.
In a forward pass that cache is a `StateCache` with what the pool holds of some sequences, and a layer runs once for all
decode steps and once for each slice of a prompt. Knows no request and no policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from kvferry.connector.layout import STATE_ROLES
from kvferry.engine.groups import place_of_state
from kvferry.engine.kv_pool import KvPool, StateShape
from kvferry.engine.sequence import Slice
from kvferry.errors import RequestError

LAYER_KINDS = {"conv", "linear_attention"}
"""As transformers' configs name layers without attention."""

_CACHE_ARGUMENTS = {
    "GraniteMoeHybridMambaLayer": "cache_params",
    "Lfm2MoeShortConv": "past_key_values",
    "Lfm2ShortConv": "past_key_values",
    "Lfm3ShortConv": "past_key_values",
}
"""Layers whose whole state goes through the cache: class name to the argument of `forward` that takes it."""

_CONV, _RECURRENT = STATE_ROLES


class StateCache:
    """The part of transformers' `Cache` that one recurrent layer uses, for `[sequences, ...]`.

    states: by role; none yet for sequences that begin.
    """

    def __init__(self, states: Mapping[str, torch.Tensor]) -> None:
        self.states = dict(states)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The layer may change it in place."""
        return self.states.get(_CONV)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        """The layer may change it in place."""
        return self.states.get(_RECURRENT)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> torch.Tensor:
        """Keep the last `conv_kernel_size` columns; returns the new ones after what was kept before."""
        past = self.states.get(_CONV)
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        if past is None:
            full = F.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        else:
            full = torch.cat([past, conv_states], dim=-1)
        self.states[_CONV] = full[..., -size:]
        return full

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0
    ) -> torch.Tensor:
        """Keep it."""
        self.states[_RECURRENT] = recurrent_states
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        """Nothing is ever rolled back."""
        return False


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows of the packed row that a layer computes at once, as many for each of `num_sequences`, and the blocks that
    have their states before and after. before: None where sequences begin."""

    rows: slice
    num_sequences: int
    before: torch.Tensor | None
    after: torch.Tensor


class StatePass:
    """One forward pass over the states of the pool's recurrent group."""

    def __init__(self, pool: KvPool, group: int, steps: Sequence[Slice], prefills: Sequence[Slice]) -> None:
        self._pool = pool
        self._group = group
        self._runs = [self._place(steps, 0)] if steps else []
        row = len(steps)
        for piece in prefills:
            self._runs.append(self._place([piece], row))
            row += len(piece.tokens)

    def _place(self, slices: Sequence[Slice], row: int) -> _Run:
        """Slices of equal length, all of which have a past or none."""
        rows = slice(row, row + sum(len(piece.tokens) for piece in slices))
        before = self._blocks(slices, [piece.start for piece in slices]) if slices[0].start > 0 else None
        return _Run(rows, len(slices), before, self._blocks(slices, [piece.end for piece in slices]))

    def _blocks(self, slices: Sequence[Slice], positions: Sequence[int]) -> torch.Tensor:
        size = self._pool.tokens_per_block
        places = [
            place_of_state(piece.block_ids[self._group], position, size)
            for piece, position in zip(slices, positions, strict=True)
        ]
        return torch.tensor(places, device=self._pool.device)

    def compute(
        self, layer: int, hidden: torch.Tensor, run: Callable[[torch.Tensor, Any], torch.Tensor]
    ) -> torch.Tensor:
        """`run(hidden, cache)` for `hidden` `[1, rows, size]`, in runs of `[sequences, tokens, size]`."""
        pages = self._pool.states[layer]
        out = torch.empty_like(hidden)
        for part in self._runs:
            cache = StateCache({} if part.before is None else {role: of[part.before] for role, of in pages.items()})
            rows = hidden[0, part.rows].reshape(part.num_sequences, -1, hidden.shape[-1])
            out[0, part.rows] = run(rows, cache).flatten(0, 1)
            for role, of in pages.items():
                of[part.after] = cache.states[role].to(of.dtype)
        return out


@torch.inference_mode()
def page_states(model: Any, kinds: Sequence[str]) -> tuple[StateShape, ...]:
    """Turn a model's recurrent layers, which `kinds` tells from the others, to the pool; returns what states they have.

    RequestError: it has layers of which is not known how they keep their state.
    """
    layers = {layer for layer, kind in enumerate(kinds) if kind in LAYER_KINDS}
    found = {
        module.layer_idx: module
        for module in (model.modules() if layers else ())
        if type(module).__name__ in _CACHE_ARGUMENTS and module.layer_idx in layers
    }
    if found.keys() != layers:
        raise RequestError(
            f"{type(model).__name__} has recurrent layers that the embedded engine does not know; "
            f"it knows {', '.join(sorted(_CACHE_ARGUMENTS))}"
        )
    shapes = [shape for layer in sorted(found) for shape in _shapes_of(found[layer])]
    for module in found.values():
        _page(module)
    return tuple(shapes)


def _shapes_of(module: Any) -> list[StateShape]:
    """Those of the state after one token. RequestError: the layer wants another cache."""
    name, weight, cache = type(module).__name__, module.in_proj.weight, StateCache({})
    try:
        module(weight.new_zeros(1, 1, weight.shape[1]), **{_CACHE_ARGUMENTS[name]: cache})
    except (AttributeError, TypeError) as error:
        raise RequestError(
            f"{name} of transformers {transformers.__version__} keeps its state in a way that the embedded engine does "
            f"not know: {error}"
        ) from error
    states = sorted(cache.states.items())
    return [StateShape(module.layer_idx, role, tuple(of.shape[1:]), of.dtype) for role, of in states]


def _page(module: Any) -> None:
    """Let `forward` go through the pass's batch, which transformers hands down as it does to attention."""
    whole, argument = module.forward, _CACHE_ARGUMENTS[type(module).__name__]

    def forward(hidden_states: torch.Tensor, *, kvferry_batch: Any, **options: Any) -> torch.Tensor:
        def run(rows: torch.Tensor, cache: StateCache) -> torch.Tensor:
            computed: torch.Tensor = whole(rows, **{**options, argument: cache})
            return computed

        computed: torch.Tensor = kvferry_batch.recur(module.layer_idx, hidden_states, run)
        return computed

    module.forward = forward
