"""Decides what each forward pass computes. Knows sequences, block ids and the connector's manager, never a tensor.

A request is admitted when the pool can hold it to its last token, counting what admitted requests may still need: so a
running request is never evicted. Requests are admitted in the order they came.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
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
    """What one forward pass may hold, and which tokens end a sequence.

    max_loading_share: share of the pool that requests may hold while they load. transfer_deadline_seconds: longest that
    the engine waits for a connector's asynchronous load or save.
    """

    max_batch_size: int
    max_num_tokens: int
    enable_chunked_prefill: bool
    stop_token_ids: frozenset[int] = frozenset()
    max_loading_share: float = 0.5
    transfer_deadline_seconds: float = 30.0


@dataclass(slots=True)
class _Transfer:
    """Blocks that an asynchronous load or save may touch, and since when."""

    block_ids: list[list[int]]
    since: float
    is_late: bool = False


@dataclass(slots=True)
class Plan:
    """One iteration: the forward pass, and what the connector is told of it.

    tell_connector: false when nothing is computed and no asynchronous load begins, so there is nothing to build.
    starved: a request that can never be admitted, to be ended.
    """

    batch: Batch = field(default_factory=Batch)
    output: SchedulerOutput = field(default_factory=SchedulerOutput)
    tell_connector: bool = False
    starved: Sequence | None = None


class Scheduler:
    """The engine's queues. All methods are called from the engine's loop."""

    def __init__(
        self,
        blocks: GroupedBlocks,
        limits: Limits,
        manager: KvCacheConnectorManager | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._blocks = blocks
        self._limits = limits
        self._manager = manager
        self._clock = clock
        self._waiting: deque[Sequence] = deque()
        self._loading: dict[int, Sequence] = {}
        self._loaded: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._loads: dict[int, _Transfer] = {}
        """Asynchronous loads that not all ranks have ended: of `_loading`, or given up."""
        self._saves: dict[int, _Transfer] = {}
        self._lora_turns: dict[str | None, int] = {}
        self._num_plans = 0

    @property
    def has_requests(self) -> bool:
        return bool(self._waiting or self._loading or self._loaded or self._running)

    @property
    def has_transfers(self) -> bool:
        """Whether blocks are held for asynchronous loads or saves."""
        return bool(self._loads or self._saves)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose length was checked against the limits."""
        self._waiting.append(sequence)

    def schedule(self) -> Plan:
        """Plan the next iteration: decode steps first, then prefills under way, then requests that loaded, then new.

        All of a pass uses one LoRA adapter, or none; those that have requests take turns.
        """
        if self._loads or self._saves:
            self._give_up_late_transfers()
        plan = Plan()
        for lora_id in self._turns():
            self._plan_pass(plan, lora_id)
            if plan.batch.slices:
                self._lora_turns[lora_id] = self._num_plans = self._num_plans + 1
                break
        # A new request may have one token left to compute: the attention wants such steps first.
        plan.batch.slices.sort(key=lambda piece: not piece.is_decode_step)
        plan.tell_connector = plan.tell_connector or bool(plan.batch.slices)
        return plan

    def _turns(self) -> list[str | None]:
        """The adapters that requests want, the one that waited longest first."""
        ready = [*self._running.values(), *self._loaded, *itertools.islice(self._waiting, 1)]
        wanted = dict.fromkeys(sequence.lora_id for sequence in ready)
        self._lora_turns = {lora_id: self._lora_turns.get(lora_id, 0) for lora_id in wanted}
        return sorted(wanted, key=self._lora_turns.__getitem__)

    def _plan_pass(self, plan: Plan, lora_id: str | None) -> None:
        plan.batch.lora_id = lora_id
        budget = self._limits.max_num_tokens
        under_way = [sequence for sequence in self._running.values() if sequence.lora_id == lora_id]
        for sequence in sorted(under_way, key=lambda sequence: sequence.num_uncomputed > 1):
            budget -= self._plan_slice(plan, sequence, budget)
        while budget > 0 and len(self._running) < self._limits.max_batch_size:
            admitted = self._next_loaded(lora_id) or self._admit(plan, budget, lora_id)
            if admitted is None:
                break
            self._running[admitted.request_id] = admitted
            admitted.status = SequenceStatus.RUNNING
            budget -= self._plan_slice(plan, admitted, budget)

    def _next_loaded(self, lora_id: str | None) -> Sequence | None:
        for sequence in self._loaded:
            if sequence.lora_id == lora_id:
                self._loaded.remove(sequence)
                return sequence
        return None

    def _plan_slice(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        """Give a sequence its share of the pass; returns the tokens it takes, 0 if it must wait."""
        start = sequence.num_computed
        num_tokens = min(sequence.num_uncomputed, self._blocks.tokens_to_snapshot(start) or sequence.num_uncomputed)
        if num_tokens > budget:
            num_tokens = budget if self._limits.enable_chunked_prefill else 0
        if num_tokens == 0:
            return 0
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
        if self._manager is not None and sequence.uses_connector:
            self._tell(plan.output, sequence, num_tokens)
        return num_tokens

    def _tell(self, output: SchedulerOutput, sequence: Sequence, num_tokens: int) -> None:
        """Put a sequence's share of the pass into the connector's terms, saying only what it does not know yet."""
        is_new = sequence.num_told_tokens == 0
        new_block_ids = [of_group[sequence.num_told_blocks :] for of_group in sequence.block_ids]
        priority = sequence.params.retention_priority
        told = sequence.told_hashes  # integers of 64 bits, as the API has them
        told += [int.from_bytes(block_hash[:8]) for block_hash in sequence.block_hashes[len(told) :]]
        data = RequestData(
            request_id=sequence.request_id,
            new_tokens=sequence.tokens[sequence.num_told_tokens :],
            new_block_ids=list(new_block_ids[0]) if len(new_block_ids) == 1 else [],
            computed_position=sequence.num_computed - (sequence.num_connector_matched_tokens if is_new else 0),
            num_scheduled_tokens=num_tokens,
            block_hashes=list(told),
            priorities=None if priority is None else [priority] * len(new_block_ids[0]),
            cache_salt=sequence.cache_salt,
            new_block_ids_by_layer_group=new_block_ids,
        )
        (output.new_requests if is_new else output.cached_requests).append(data)
        sequence.num_told_tokens = len(sequence.tokens)
        sequence.num_told_blocks = len(sequence.block_ids[0])

    # -- admission ---------------------------------------------------------------------------------------------------

    def _admit(self, plan: Plan, budget: int, lora_id: str | None) -> Sequence | None:
        """The next request that can run now, with its blocks; those that must load first are set aside."""
        while self._waiting and self._waiting[0].lora_id == lora_id:
            sequence = self._waiting[0]
            self._extend_hashes(sequence)
            most = sequence.num_prompt_tokens - 1
            matched = self._blocks.match_prefix(sequence.block_hashes, sequence.tokens, most)
            if self._loads_fill_share(sequence) or not self._fits(sequence, matched, budget):
                if self._is_starved():
                    plan.starved = sequence
                return None
            self._waiting.popleft()
            if self._allocate(sequence, matched):
                plan.tell_connector = True
                sequence.status = SequenceStatus.LOADING
                self._loading[sequence.request_id] = sequence
                self._loads[sequence.request_id] = _Transfer(sequence.block_ids, self._clock())
                continue
            return sequence
        return None

    def _loads_fill_share(self, sequence: Sequence) -> bool:
        """Whether this request, if it had to load, would bring those that load over their share of the pool. One may
        always load."""
        if self._manager is None or not self._loading:
            return False
        held = sum(len(other.block_ids[0]) for other in self._loading.values())
        wanted = self._blocks.num_blocks_for(sequence.num_prompt_tokens)
        return held + wanted > self._limits.max_loading_share * self._blocks.num_blocks

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
        manager = self._manager if sequence.uses_connector else None
        if manager is not None:
            decision = manager.match(sequence, sequence.num_pool_tokens)
        # The last prompt token is always computed: its logits give the first new token.
        most = sequence.num_prompt_tokens - 1 - sequence.num_pool_tokens
        if decision.num_tokens > most and self._blocks.has_states:
            decision = LoadDecision()  # a state cannot be taken back by one token
        num_loaded = min(decision.num_tokens, most)
        sequence.block_ids = self._blocks.allocate_prompt(matched, sequence.num_prompt_tokens, num_loaded)
        sequence.num_committed_blocks = matched.num_blocks
        sequence.num_connector_matched_tokens = num_loaded
        sequence.num_computed = sequence.num_pool_tokens + num_loaded
        if manager is None:
            return False
        if not manager.allocated(sequence, sequence.block_ids, decision):
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
            # A load brings only what a window covers at its end: the blocks behind it hold nothing to be shared.
            self._blocks.release_behind(sequence.block_ids, piece.start)
            sequence.num_computed = piece.end
            self._commit_blocks(sequence, range(piece.start, piece.end))
            if piece.draws:
                sequence.tokens.append(drawn[piece.request_id])
                progressed.append(sequence)
                self._finish_if_ended(sequence)
        for request_id in finished.loaded:
            self._end_load(request_id, ok=request_id not in failed)
        for request_id in finished.saved:
            self._blocks.release(self._saves.pop(request_id).block_ids)
        return progressed

    def _recompute(self, sequence: Sequence) -> None:
        """A load failed: nothing after the pool's own tokens can be trusted, nor shared."""
        num_trusted = sequence.num_pool_tokens // self._blocks.tokens_per_block
        self._blocks.forget(sequence.block_ids, num_trusted, sequence.num_committed_blocks)
        sequence.num_committed_blocks = num_trusted
        if sequence.num_output_tokens:
            logger.error("request %d: its load was reported as failed after it generated", sequence.request_id)
        self._forget_load(sequence)

    def _commit_blocks(self, sequence: Sequence, computed: range) -> None:
        """Blocks that the pass filled may be shared from now on; those behind every window are given back."""
        size = self._blocks.tokens_per_block
        num_full = sequence.num_computed // size
        self._extend_hashes(sequence)
        for index in range(sequence.num_committed_blocks, num_full):
            content = token_bytes(sequence.tokens[index * size : (index + 1) * size])
            self._blocks.commit(sequence.block_ids, index, sequence.block_hashes[index], content, computed)
        sequence.num_committed_blocks = max(num_full, sequence.num_committed_blocks)
        self._blocks.release_behind(sequence.block_ids, sequence.num_computed)

    def _finish_if_ended(self, sequence: Sequence) -> None:
        params = sequence.params
        if not params.ignore_eos and sequence.tokens[-1] in self._limits.stop_token_ids:
            self.finish(sequence, FinishReason.STOP)
        elif sequence.num_output_tokens >= params.max_tokens:
            self.finish(sequence, FinishReason.LENGTH)

    def _end_load(self, request_id: int, *, ok: bool) -> None:
        load = self._loads.pop(request_id)
        sequence = self._loading.pop(request_id, None)
        if sequence is None:
            self._blocks.release(load.block_ids)
        elif sequence.is_finished:
            self._let_go(sequence)
        else:
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
        manager = self._manager if sequence.uses_connector else None
        if manager is not None and manager.request_finished(sequence, sequence.block_ids):
            self._saves[sequence.request_id] = _Transfer(sequence.block_ids, self._clock())
        else:
            self._blocks.release(sequence.block_ids)

    # -- a connector that never ends a transfer ----------------------------------------------------------------------

    def _give_up_late_transfers(self) -> None:
        """A request whose load is late is computed in other blocks, and the connector hears no more of it.

        The blocks of a late transfer stay taken, for the connector may still read or write them.
        """
        assert self._manager is not None
        now, deadline_seconds = self._clock(), self._limits.transfer_deadline_seconds
        for transfers, what in ((self._loads, "load"), (self._saves, "save")):
            for request_id, transfer in transfers.items():
                if transfer.is_late or now - transfer.since <= deadline_seconds:
                    continue
                transfer.is_late = True
                complaint = (
                    f"has not ended its {what} after {deadline_seconds:g} s; its blocks stay taken until it does"
                )
                self._manager.complain("get_finished", complaint, request_id)
                if request_id in self._loading and not self._loading[request_id].is_finished:
                    self._compute_elsewhere(self._loading.pop(request_id))

    def _compute_elsewhere(self, sequence: Sequence) -> None:
        assert self._manager is not None
        end = sequence.num_pool_tokens + sequence.num_connector_matched_tokens
        self._manager.cancel_load(sequence, sequence.num_pool_tokens, end)
        sequence.start_over()
        self._waiting.appendleft(sequence)

    def _is_starved(self) -> bool:
        """Whether who waits now waits for blocks that late transfers alone hold: they may never come back."""
        others = self._running or self._loaded or self._loading
        transfers = [*self._loads.values(), *self._saves.values()]
        return not others and bool(transfers) and all(transfer.is_late for transfer in transfers)

    def check(self) -> None:
        """InvariantError unless the pools' books are right and every block in use is held by a request."""
        transfers = [*self._saves.values()]
        transfers += [load for request_id, load in self._loads.items() if request_id not in self._loading]
        admitted = [sequence.block_ids for sequence in self._admitted()]
        self._blocks.check(admitted + [transfer.block_ids for transfer in transfers])
