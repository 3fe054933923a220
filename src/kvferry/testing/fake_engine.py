"""An engine without a model, for testing any connector: the real scheduler and connector manager around made-up KV.

The KV of a position depends on all tokens up to it, on salt, weights and layer. Before each pass all that attention
would read is compared with what it must be, so a wrong byte anywhere shows. What is computed from wrong bytes is
garbage, as it would be in a model, so that it shows again if a connector keeps it.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kvferry.config import KvCacheConfig, KvCacheConnectorConfig
from kvferry.connector.api import KvCacheConnectorScheduler, KvCacheConnectorWorker
from kvferry.connector.config import LlmArgs
from kvferry.connector.manager import Finished, KvCacheConnectorManager
from kvferry.engine.groups import GroupedBlocks, LayerGroup, group_layers
from kvferry.engine.kv_pool import KV_FACTOR, KvPool, KvShape
from kvferry.engine.outputs import FinishReason
from kvferry.engine.sampling import SamplingParams
from kvferry.engine.scheduler import Limits, Scheduler
from kvferry.engine.sequence import Batch, Slice
from kvferry.engine.sequence import Sequence as EngineSequence

TOKENS_PER_BLOCK = 4
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 3, 2, 4
VOCABULARY = 50
_GARBAGE = -1.0
_POLL_SECONDS = 0.0005
_MODULUS = (1 << 19) - 1
"""A prime; lanes times it stay whole numbers that float32 holds exactly."""

_engine_ids = itertools.count()

Kv = npt.NDArray[np.float32]


def fake_llm_args(connector: KvCacheConnectorConfig, **changes: Any) -> LlmArgs:
    """Settings of a `FakeEngine`, with an engine id of its own."""
    args = LlmArgs(
        engine_id=f"fake-{next(_engine_ids)}",
        model="fake",
        model_identity="fake weights",
        kv_dtype="float32",
        num_layers=NUM_LAYERS,
        num_kv_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        max_batch_size=8,
        max_num_tokens=64,
        kv_cache_config=KvCacheConfig(tokens_per_block=TOKENS_PER_BLOCK),
        kv_connector_config=connector,
    )
    return dataclasses.replace(args, **changes)


def expected_kv(tokens: Sequence[int], salt: str | None, weights: str | None) -> Kv:
    """KV of every position, shape `[tokens, layers, 2, heads, head_dim]`."""
    state = sum(map(ord, f"{weights}/{salt}")) * 7919 % _MODULUS
    states = []
    for token in tokens:
        state = (state * 31_337 + token + 1) % _MODULUS
        states.append(state)
    lanes = np.arange(1, NUM_LAYERS * 2 * NUM_HEADS * HEAD_DIM + 1)
    values = np.array(states, dtype=np.int64)[:, None] * lanes % _MODULUS
    return values.reshape(-1, NUM_LAYERS, 2, NUM_HEADS, HEAD_DIM).astype(np.float32)


class FakeEngine:
    """One rank, whose layers are grouped by `args.sliding_windows`.

    AssertionError from `step`: a pass read wrong bytes although no load of it was reported as failed, or a hook raised.

    before_pass: called when a pass's metadata is bound and nothing is loaded yet; tests put faults there.
    """

    def __init__(
        self,
        args: LlmArgs,
        worker: KvCacheConnectorWorker,
        make_scheduler: Callable[[LlmArgs], KvCacheConnectorScheduler],
        num_blocks: int = 64,
        device: str = "cpu",
    ) -> None:
        self.args = args
        shape = KvShape(NUM_LAYERS, NUM_HEADS, HEAD_DIM, torch.float32)
        groups = group_layers(args.sliding_windows or (None,) * NUM_LAYERS)
        self.pool = KvPool(shape, groups, num_blocks, TOKENS_PER_BLOCK, torch.device(device))
        worker.register_kv_cache_layout(self.pool.layout)
        scheduler = make_scheduler(args)
        scheduler.wait_for_initialization()
        self.manager = KvCacheConnectorManager(args, worker, scheduler)
        enable_reuse = args.kv_cache_config.enable_block_reuse
        self.blocks = GroupedBlocks(groups, num_blocks, TOKENS_PER_BLOCK, enable_reuse=enable_reuse)
        limits = Limits(args.max_batch_size, args.max_num_tokens, enable_chunked_prefill=True)
        self.scheduler = Scheduler(self.blocks, limits, self.manager)
        self.before_pass: Callable[[], None] = lambda: None
        self.num_failed_loads = 0
        self.is_shut_down = False
        self._sequences: dict[int, EngineSequence] = {}
        self._spoiled: set[int] = set()
        self._ids = itertools.count()

    def add(self, prompt: Sequence[int], max_tokens: int = 1, salt: str | None = None) -> EngineSequence:
        """Queue a request."""
        sequence = EngineSequence(next(self._ids), prompt, SamplingParams(max_tokens=max_tokens))
        sequence.cache_salt = salt
        self._sequences[sequence.request_id] = sequence
        self.scheduler.add(sequence)
        return sequence

    def run(self, prompt: Sequence[int], max_tokens: int = 1, salt: str | None = None) -> EngineSequence:
        """One request, to its end and that of its saves."""
        sequence = self.add(prompt, max_tokens, salt)
        while not sequence.is_finished:
            self.step()
        self.settle()
        return sequence

    def settle(self) -> None:
        """Go on until no load or save is under way."""
        while self.scheduler.has_transfers:
            self.step()

    def abort(self, sequence: EngineSequence) -> None:
        """End a request in whatever state it is."""
        self.scheduler.finish(sequence, FinishReason.ABORT)

    def step(self) -> Finished:
        """One iteration of the engine's loop."""
        plan = self.scheduler.schedule()
        if not plan.batch.slices and self.scheduler.has_transfers:
            time.sleep(_POLL_SECONDS)  # Else this thread would keep the interpreter from those that copy.
        wrong: set[int] = set()
        drawn: dict[int, int] = {}
        for sequence in self._sequences.values():
            if sequence.block_ids and sequence.request_id not in self._spoiled:
                self._spoil(sequence)
        if plan.tell_connector:
            self.manager.exchange_metadata(plan.output)
            self.before_pass()
            self.manager.start_pass(None)
            for layer in range(NUM_LAYERS):
                self.manager.before_layer(layer, None)
            wrong = self._compute(plan.batch, drawn)
            for layer in range(NUM_LAYERS):
                self.manager.after_layer(layer, None)
            self.manager.end_pass(None)
        finished = self.manager.collect()
        assert wrong <= set(finished.failed), "wrong bytes in a pass whose loads were said to be good"
        assert not self.manager.num_errors, self.manager.num_errors
        self.num_failed_loads += len(finished.failed)
        self.scheduler.update(plan.batch, drawn, finished)
        self.scheduler.check()
        return finished

    def shutdown(self) -> None:
        """End all requests, then the connector."""
        self.is_shut_down = True
        for sequence in self._sequences.values():
            self.abort(sequence)
        self.manager.shutdown()
        assert not self.manager.num_errors, self.manager.num_errors

    def _spoil(self, sequence: EngineSequence) -> None:
        """A new request's blocks beyond the pool's hit may still hold the right bytes from an earlier one: not here."""
        self._spoiled.add(sequence.request_id)
        for pool, held in zip(self.pool.tensors, sequence.block_ids, strict=True):
            pool[held[sequence.num_pool_tokens // TOKENS_PER_BLOCK :]] = _GARBAGE

    def _compute(self, batch: Batch, drawn: dict[int, int]) -> set[int]:
        """Fill in the batch's KV and draw tokens; returns the requests whose past is not what it must be."""
        wrong = set()
        for piece in batch.slices:
            sequence = self._sequences[piece.request_id]
            kv = expected_kv(sequence.tokens[: piece.end], sequence.cache_salt, self.args.model_identity)
            if not all(self._sees(index, group, piece, kv) for index, group in enumerate(self.pool.groups)):
                wrong.add(piece.request_id)
            fresh = np.full_like(kv, _GARBAGE) if piece.request_id in wrong else kv
            for index, group in enumerate(self.pool.groups):
                self._write(index, group, piece, fresh)
            if piece.draws:
                drawn[piece.request_id] = int(kv[-1, 0, 0, 0, 0]) % VOCABULARY
        return wrong

    def _sees(self, index: int, group: LayerGroup, piece: Slice, kv: Kv) -> bool:
        """Whether what the slice's tokens attend to in a group is as it must be."""
        first_block, rows = self._read(index, group, piece)
        first = 0 if group.window_tokens is None else max(0, piece.start - group.window_tokens + 1)
        past = rows[first - first_block * TOKENS_PER_BLOCK : piece.start - first_block * TOKENS_PER_BLOCK]
        return np.array_equal(past, kv[first : piece.start, list(group.layers)])

    def _read(self, index: int, group: LayerGroup, piece: Slice) -> tuple[int, Kv]:
        """The first block that the slice needs, and what blocks from it on hold: `[tokens, layers, 2, heads, dim]`."""
        first_block = group.first_needed_block(piece.start, TOKENS_PER_BLOCK)
        held = piece.block_ids[index][first_block:]
        shape = (-1, len(group.layers), KV_FACTOR, NUM_HEADS, TOKENS_PER_BLOCK, HEAD_DIM)
        pages = self.pool.tensors[index][held].view(shape).permute(0, 4, 1, 2, 3, 5)
        rows: Kv = pages.reshape(-1, *pages.shape[2:]).cpu().numpy()
        return first_block, rows

    def _write(self, index: int, group: LayerGroup, piece: Slice, fresh: Kv) -> None:
        first_block, rows = self._read(index, group, piece)
        first = first_block * TOKENS_PER_BLOCK
        rows[piece.start - first : piece.end - first] = fresh[piece.start : piece.end, list(group.layers)]
        held = piece.block_ids[index][first_block:]
        pages = torch.from_numpy(rows).view(-1, TOKENS_PER_BLOCK, *rows.shape[1:]).permute(0, 2, 3, 4, 1, 5)
        self.pool.tensors[index][held] = pages.reshape(len(held), len(group.layers), KV_FACTOR, -1).to(self.pool.device)
