"""Decides what each forward pass computes. Knows sequences, block ids and the connector's manager, never a tensor.

A request is admitted when the pool can hold it to its last token, counting what admitted requests may still need: so a
running request is never evicted. Requests are admitted in the order they came.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvferry.connector.api import RequestData, SchedulerOutput
from kvferry.connector.manager import Finished, KvCacheConnectorManager, LoadDecision
from kvferry.engine.block_manager import token_bytes
from kvferry.engine.groups import GroupedBlocks, PrefixMatch, extend_hashes
from kvferry.engine.outputs import FinishReason
from kvferry.engine.sequence import Batch, Sequence, SequenceStatus, Slice

logger = logging.getLogger("kvferry.engine")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one forward pass may hold, and which tokens end a sequence."""

    max_batch_size: int
    max_num_tokens: int
    enable_chunked_prefill: bool
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(slots=True)
class Plan:
    """One iteration: the forward pass, and what the connector is told of it.

    tell_connector: false when nothing is computed and no asynchronous load begins, so there is nothing to build.
    """

    batch: Batch = field(default_factory=Batch)
    output: SchedulerOutput = field(default_factory=SchedulerOutput)
    tell_connector: bool = False


class Scheduler:
    """The engine's queues. All methods are called from the engine's loop."""

    def __init__(self, blocks: GroupedBlocks, limits: Limits, manager: KvCacheConnectorManager | None) -> None:
        self._blocks = blocks
        self._limits = limits
        self._manager = manager
        self._waiting: deque[Sequence] = deque()
        self._loading: dict[int, Sequence] = {}
        self._loaded: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._saving: dict[int, list[list[int]]] = {}

    @property
    def has_requests(self) -> bool:
        return bool(self._waiting or self._loading or self._loaded or self._running)

    @property
    def has_transfers(self) -> bool:
        """Whether blocks are held for asynchronous loads or saves."""
        return bool(self._loading or self._saving)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose length was checked against the limits."""
        self._waiting.append(sequence)

    def schedule(self) -> Plan:
        """Plan the next iteration: decode steps first, then prefills under way, then requests that loaded, then new."""
        plan = Plan()
        budget = self._limits.max_num_tokens
        under_way = list(self._running.values())
        for sequence in sorted(under_way, key=lambda sequence: sequence.num_uncomputed > 1):
            budget -= self._plan_slice(plan, sequence, budget)
        while budget > 0 and len(self._running) < self._limits.max_batch_size:
            sequence_or_none = self._loaded.popleft() if self._loaded else self._admit(plan, budget)
            if sequence_or_none is None:
                break
            self._running[sequence_or_none.request_id] = sequence_or_none
            sequence_or_none.status = SequenceStatus.RUNNING
            budget -= self._plan_slice(plan, sequence_or_none, budget)
        # A new request may have one token left to compute: the attention wants such steps first.
        plan.batch.slices.sort(key=lambda piece: len(piece.tokens) > 1 or piece.start == 0)
        plan.tell_connector = plan.tell_connector or bool(plan.batch.slices)
        return plan

    def _plan_slice(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        """Give a sequence its share of the pass; returns the tokens it takes, 0 if it must wait."""
        num_tokens = sequence.num_uncomputed
        if num_tokens > budget:
            num_tokens = budget if self._limits.enable_chunked_prefill else 0
        if num_tokens == 0:
            return 0
        start = sequence.num_computed
        end = start + num_tokens
        self._blocks.grow(sequence.block_ids, end)
        plan.batch.slices.append(
            Slice(
                request_id=sequence.request_id,
                tokens=sequence.tokens[start:end],
                start=start,
                block_ids=[list(of_group) for of_group in sequence.block_ids],
                draws=end == len(sequence.tokens),
            )
        )
        if self._manager is not None:
            self._tell(plan.output, sequence, num_tokens)
        return num_tokens

    def _tell(self, output: SchedulerOutput, sequence: Sequence, num_tokens: int) -> None:
        """Put a sequence's share of the pass into the connector's terms, saying only what it does not know yet."""
        is_new = sequence.num_told_tokens == 0
        new_block_ids = [of_group[sequence.num_told_blocks :] for of_group in sequence.block_ids]
        data = RequestData(
            request_id=sequence.request_id,
            new_tokens=sequence.tokens[sequence.num_told_tokens :],
            new_block_ids=list(new_block_ids[0]) if len(new_block_ids) == 1 else [],
            computed_position=sequence.num_computed - (sequence.num_connector_matched_tokens if is_new else 0),
            num_scheduled_tokens=num_tokens,
            block_hashes=[int.from_bytes(block_hash[:8]) for block_hash in sequence.block_hashes],
            priorities=self._priorities(sequence, len(new_block_ids[0])),
            cache_salt=sequence.cache_salt,
            new_block_ids_by_layer_group=new_block_ids,
        )
        (output.new_requests if is_new else output.cached_requests).append(data)
        sequence.num_told_tokens = len(sequence.tokens)
        sequence.num_told_blocks = len(sequence.block_ids[0])

    @staticmethod
    def _priorities(sequence: Sequence, num_blocks: int) -> list[int] | None:
        priority = sequence.params.retention_priority
        return None if priority is None else [priority] * num_blocks

    # -- admission ---------------------------------------------------------------------------------------------------

    def _admit(self, plan: Plan, budget: int) -> Sequence | None:
        """The next request that can run now, with its blocks; those that must load first are set aside."""
        while self._waiting:
            sequence = self._waiting[0]
            matched = self._match_pool(sequence)
            if not self._fits(sequence, matched, budget):
                return None
            self._waiting.popleft()
            if self._allocate(sequence, matched):
                plan.tell_connector = True
                sequence.status = SequenceStatus.LOADING
                self._loading[sequence.request_id] = sequence
                continue
            return sequence
        return None

    def _match_pool(self, sequence: Sequence) -> PrefixMatch:
        self._extend_hashes(sequence)
        return self._blocks.match_prefix(sequence.block_hashes, sequence.tokens, sequence.num_prompt_tokens - 1)

    def _extend_hashes(self, sequence: Sequence) -> None:
        extend_hashes(sequence.block_hashes, sequence.tokens, sequence.hash_root, self._blocks.tokens_per_block)

    def _fits(self, sequence: Sequence, matched: PrefixMatch, budget: int) -> bool:
        """Whether the pool holds this sequence to its end beside what those admitted may still take."""
        if not self._limits.enable_chunked_prefill:
            num_uncomputed = sequence.num_prompt_tokens - matched.num_blocks * self._blocks.tokens_per_block
            if num_uncomputed > budget:
                return False
        needs = [self._blocks.still_needs(other.block_ids, other.max_kv_tokens) for other in self._admitted()]
        promised = [sum(of_group) for of_group in zip(*needs, strict=True)] or [0] * len(self._blocks.groups)
        return self._blocks.fits(matched, sequence.num_prompt_tokens, sequence.max_kv_tokens, promised)

    def _admitted(self) -> Iterable[Sequence]:
        yield from self._running.values()
        yield from self._loading.values()
        yield from self._loaded

    def _allocate(self, sequence: Sequence, matched: PrefixMatch) -> bool:
        """Give a sequence the blocks of its prompt and ask the connector for the rest; true if it must load first."""
        sequence.num_pool_tokens = matched.num_blocks * self._blocks.tokens_per_block
        decision = LoadDecision()
        if self._manager is not None:
            decision = self._manager.match(sequence, sequence.num_pool_tokens)
        sequence.block_ids = self._blocks.allocate_prompt(matched, sequence.num_prompt_tokens)
        sequence.num_committed_blocks = matched.num_blocks
        # The last prompt token is always computed: its logits give the first new token.
        num_loaded = min(decision.num_tokens, sequence.num_prompt_tokens - 1 - sequence.num_pool_tokens)
        sequence.num_connector_matched_tokens = num_loaded
        sequence.num_computed = sequence.num_pool_tokens + num_loaded
        if self._manager is None:
            return False
        if not self._manager.allocated(sequence, sequence.block_ids, decision):
            self._forget_load(sequence)
            return False
        return decision.is_async

    @staticmethod
    def _forget_load(sequence: Sequence) -> None:
        """What the connector matched is not there: compute it."""
        sequence.num_connector_matched_tokens = 0
        sequence.num_computed = sequence.num_pool_tokens

    # -- after a pass ------------------------------------------------------------------------------------------------

    def update(self, batch: Batch, drawn: Mapping[int, int], finished: Finished) -> list[Sequence]:
        """Take in what a pass computed (`drawn`: request id to next token) and what transfers ended.

        Returns the sequences that got a token.
        """
        progressed = []
        failed = set(finished.failed)
        for request_id in failed & self._running.keys():
            self._recompute(self._running[request_id])
        for piece in batch.slices:
            sequence = self._running.get(piece.request_id)
            if sequence is None or piece.request_id in failed:
                continue
            sequence.num_computed = piece.end
            self._commit_blocks(sequence)
            if piece.draws:
                sequence.tokens.append(drawn[piece.request_id])
                progressed.append(sequence)
                self._finish_if_ended(sequence)
        for request_id in finished.loaded:
            self._end_load(request_id, ok=request_id not in failed)
        for request_id in finished.saved:
            self._blocks.release(self._saving.pop(request_id))
        return progressed

    def _recompute(self, sequence: Sequence) -> None:
        """A load failed: nothing after the pool's own tokens can be trusted, nor shared."""
        num_trusted = sequence.num_pool_tokens // self._blocks.tokens_per_block
        self._blocks.forget(sequence.block_ids, num_trusted, sequence.num_committed_blocks)
        sequence.num_committed_blocks = num_trusted
        if sequence.num_output_tokens:
            logger.error("request %d: its load was reported as failed after it generated", sequence.request_id)
        self._forget_load(sequence)

    def _commit_blocks(self, sequence: Sequence) -> None:
        """Blocks that the pass filled may be shared from now on; those behind every window are given back."""
        size = self._blocks.tokens_per_block
        num_full = sequence.num_computed // size
        self._extend_hashes(sequence)
        for index in range(sequence.num_committed_blocks, num_full):
            content = token_bytes(sequence.tokens[index * size : (index + 1) * size])
            self._blocks.commit(sequence.block_ids, index, sequence.block_hashes[index], content)
        sequence.num_committed_blocks = max(num_full, sequence.num_committed_blocks)
        self._blocks.release_behind(sequence.block_ids, sequence.num_computed)

    def _finish_if_ended(self, sequence: Sequence) -> None:
        params = sequence.params
        if not params.ignore_eos and sequence.tokens[-1] in self._limits.stop_token_ids:
            self.finish(sequence, FinishReason.STOP)
        elif sequence.num_output_tokens >= params.max_tokens:
            self.finish(sequence, FinishReason.LENGTH)

    def _end_load(self, request_id: int, *, ok: bool) -> None:
        sequence = self._loading.pop(request_id)
        if sequence.is_finished:
            self._let_go(sequence)
            return
        if not ok:
            self._forget_load(sequence)
        self._loaded.append(sequence)

    # -- ends --------------------------------------------------------------------------------------------------------

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence in any state; its blocks go back once no copy touches them."""
        if sequence.is_finished:
            return
        was = sequence.status
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        if was is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
        elif sequence.request_id in self._loading:
            assert self._manager is not None
            end = sequence.num_pool_tokens + sequence.num_connector_matched_tokens
            self._manager.cancel_load(sequence, sequence.num_pool_tokens, end)
        else:
            if sequence in self._loaded:
                self._loaded.remove(sequence)
            self._running.pop(sequence.request_id, None)
            self._let_go(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        if self._manager is not None and self._manager.request_finished(sequence, sequence.block_ids):
            self._saving[sequence.request_id] = sequence.block_ids
        else:
            self._blocks.release(sequence.block_ids)

    def check(self) -> None:
        """InvariantError unless the pools' books are right and every block in use is held by a request."""
        self._blocks.check([*(sequence.block_ids for sequence in self._admitted()), *self._saving.values()])
