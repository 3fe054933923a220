"""Runs forward passes of a transformers model over the pool. Knows batches of slices, never queues or requests."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from kvferry.engine.attention import LayerHooks, PagedBatch
from kvferry.engine.kv_pool import KvPool
from kvferry.engine.lora import Adapters
from kvferry.engine.sequence import Batch, Slice
from kvferry.errors import RequestError


class CpuStream:
    """A stream where there are none: whatever it was given has happened."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Any = None) -> Any:
        """The event; None if none was given."""
        return event

    def query(self) -> bool:
        return True


_CPU_STREAM = CpuStream()


class Executor:
    """One rank's model and pool."""

    def __init__(self, model: Any, pool: KvPool) -> None:
        self._model = model
        self._pool = pool
        self.adapters = Adapters(model)
        self._device = pool.device

    @property
    def stream(self) -> Any:
        """The stream that forward passes run on; on a CPU a stand-in, for torch's own lacks `synchronize`."""
        return torch.cuda.current_stream(self._device) if self._device.type == "cuda" else _CPU_STREAM

    @torch.inference_mode()
    def forward(self, batch: Batch, hooks: LayerHooks | None) -> torch.Tensor:
        """Compute the batch; returns logits of shape `[slices that draw, vocab]`, in the order of the slices."""
        self.adapters.activate(batch.lora_id)
        paged = PagedBatch(batch, self._pool, hooks, self.stream)
        tokens = torch.tensor([[token for piece in batch.slices for token in piece.tokens]], device=self._device)
        ends = itertools.accumulate(len(piece.tokens) for piece in batch.slices)
        last_rows = [end - 1 for piece, end in zip(batch.slices, ends, strict=True) if piece.draws]
        output = self._model(
            input_ids=tokens,
            position_ids=paged.positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(last_rows, dtype=torch.long, device=self._device),
            kvferry_batch=paged,
        )
        num_layers = len(self._pool.group_of_layer)
        if paged.num_layers_seen != num_layers:
            raise RequestError(
                f"{type(self._model).__name__} sent {paged.num_layers_seen} of {num_layers} layers through "
                "transformers' attention interface; the embedded engine needs all of them"
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def warm_up(self) -> None:
        """One small pass on block 0, which is zeroed afterwards: finds unsupported models and loads kernels before the
        first request. Its shapes are those of a prefill and of a step."""
        num_tokens = min(2, self._pool.tokens_per_block)
        block_ids = [[0] for _ in self._pool.groups]
        self.forward(Batch([Slice(-1, [0] * num_tokens, 0, block_ids, draws=True)]), None)
        if self._pool.tokens_per_block > num_tokens:
            self.forward(Batch([Slice(-1, [0], num_tokens, block_ids, draws=True)]), None)
        for tensor in self._pool.tensors:
            tensor[0].zero_()
