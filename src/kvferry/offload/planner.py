"""Decides what to load and what to save. Lives beside the engine's scheduler; knows requests, keys and jobs.

Knows no tensor and copies nothing: what it decides goes to the movers as `PassMetadata`. Called from one thread.

A request's way through here:

    match      asked, before allocation      in _matched, perhaps with a leased load that waits for its blocks
    allocated  the engine took the match     in _running
    plan       next pass, or the first one   the load goes to the movers, who end its lease; an asynchronous one goes at
                                             once, and the request's first pass comes when it has ended
    plan       every pass                    chunks that the pass completes go to the movers, or with `saves_late` those
                                             that the last one did
    finished   at any point                  whatever is still leased is given back

Every request that has a lease here is in `_matched` or `_running`, and the lease is in no pass yet.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from kvferry.blocks import Geometry, Job, Tier
from kvferry.config import StoreOptions
from kvferry.connector.api import NO_BLOCK, Request, RequestData, SchedulerOutput
from kvferry.observability.metrics import Meter
from kvferry.offload.chunks import BlockIds, ChunkBlocks
from kvferry.offload.cost import CostModel, Hit, hits_within, num_within
from kvferry.offload.metadata import CopyJob, LoadEnd, PassMetadata, RequestJob
from kvferry.store.base import BlockStore
from kvferry.store.keys import KEY_BYTES, Extras, KeyChain, root_key

logger = logging.getLogger(__name__)

_MOST_TRIES = 4
"""A match is repeated when what it found was gone or damaged on lower tiers; each try finds less."""

_MOST_UNALLOCATED = 1024
"""Requests that were matched and never heard of again are forgotten, the oldest first, beyond this many."""

_OFFER_SECONDS = 5.0
"""How long a request that is asked about in each step, as there is no room for it, keeps its offer, or goes without."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What can be loaded after the tokens that the pool has. is_async: the request is to wait outside the batch.
    is_ready: it is all in memory."""

    num_tokens: int = 0
    is_async: bool = False
    is_ready: bool = True


@dataclass(frozen=True, slots=True)
class _Load:
    """A leased load of tokens `start` to `end`. tiers[i]: where chunk i was found."""

    job: Job
    start: int
    end: int
    tiers: tuple[Tier, ...]
    is_async: bool

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def offer(self) -> Offer:
        return Offer(self.num_tokens, self.is_async, self.job.ready)


@dataclass(slots=True)
class _Tracked:
    """What is known of a request.

    num_prompt_tokens: tokens at the match, after a preemption with what was generated. num_pool_tokens: those of them
    that the pool had. load: leased, and not with the movers yet. under_way: the asynchronous load that is with them,
    until the first pass. num_chunks: full chunks that were already offered to the store. saves: whether the movers were
    ever given any. decided_until: when its hit, loaded or not worth it, is looked for again, long before a lease ends.
    """

    request: Request
    chain: KeyChain
    num_prompt_tokens: int
    num_pool_tokens: int
    load: _Load | None = None
    under_way: _Load | None = None
    block_ids: list[list[int]] = field(default_factory=list)
    num_chunks: int = 0
    saves: bool = False
    decided_until: float = 0.0


def salt_and_adapter(request: Request) -> Extras:
    """What the connector API says of a request besides its tokens."""
    return Extras(cache_salt=request.cache_salt, lora_id=request.lora_id)


@dataclass(frozen=True, slots=True)
class _Save:
    """What a pass completes of a request: chunks from `first_chunk` up to each of `boundaries`."""

    tracked: _Tracked
    first_chunk: int
    boundaries: list[int]


class Planner:
    """Plans for one engine. From `options` it takes what they say of loads."""

    def __init__(
        self,
        store: BlockStore,
        geometry: Geometry,
        tokens_per_block: int,
        options: StoreOptions,
        *,
        extras_of: Callable[[Request], Extras] = salt_and_adapter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.meter = Meter()
        self._store = store
        self._geometry = geometry
        self._root = root_key(geometry)
        self._chunks = ChunkBlocks(geometry, tokens_per_block)
        self._options = options
        self._extras_of = extras_of
        self._clock = clock
        self._cost = CostModel(options, self.meter, clock)
        self._matched: dict[int, _Tracked] = {}
        self._running: dict[int, _Tracked] = {}
        self._begun: list[int] = []
        """Requests whose asynchronous load goes to the movers with the next pass."""
        self._lost_loads: list[int] = []
        self._cancelled: list[int] = []
        self.saves_late = False
        """Whether a pass's saves are planned with the next, as to find room for many chunks takes a millisecond or two
        that the pass would wait for. For engines that always have a next one, and keep blocks until then."""
        self._unsaved: dict[int, _Save] = {}
        """Of the last pass, by request, until the next is planned."""

    def match(self, request: Request, num_computed_tokens: int, *, may_load: bool = True) -> Offer:
        """What of this request after the first `num_computed_tokens` is leased for it: nothing, unless `may_load`."""
        known = self._matched.get(request.request_id) or self._running.get(request.request_id)
        if known is not None and may_load and self._is_decided(known, request, num_computed_tokens):
            return known.load.offer if known.load else Offer()
        self._forget(request.request_id)
        self._unsaved.pop(request.request_id, None)  # It was preempted.
        while len(self._matched) >= _MOST_UNALLOCATED:
            self._forget(next(iter(self._matched)))
        tokens = request.get_tokens(0)
        if known is not None and known.request is request and self._still_names(known.chain, len(tokens)):
            chain = known.chain  # It still waits for room, or was preempted: its tokens are hashed once.
        else:
            chain = KeyChain(self._root, self._geometry.chunk_tokens, self._extras_of(request))
        chain.extend(tokens[chain.num_tokens :])
        tracked = self._matched[request.request_id] = _Tracked(request, chain, len(tokens), num_computed_tokens)
        # The API has no name for part of a block.
        if may_load and num_computed_tokens % self._chunks.tokens_per_block == 0:
            self._lease(tracked, num_computed_tokens)
        return tracked.load.offer if tracked.load else Offer()

    def allocated(self, request: Request, block_ids: BlockIds) -> None:
        """The engine took the match (or a match of nothing), and these are the prompt's blocks."""
        num_taken = request.num_connector_matched_tokens
        tracked = self._matched.pop(request.request_id, None)
        if tracked is not None:
            tracked.block_ids = [list(of_group) for of_group in block_ids]
            self._running[request.request_id] = tracked
            load = tracked.load
            if load is not None and num_taken != load.num_tokens:
                self._cancel(load)
                tracked.load = None
            elif load is not None and load.is_async:
                self._begun.append(request.request_id)
            self._expect(tracked, tracked.load.end if tracked.load else tracked.num_pool_tokens)
        if num_taken and (tracked is None or tracked.load is None):
            self._lost_loads.append(request.request_id)

    def plan(
        self,
        output: SchedulerOutput,
        scheduled: Mapping[Hashable, int] | None = None,
        *,
        preempted: Iterable[int] = (),
    ) -> PassMetadata:
        """The jobs of the coming pass. scheduled: tokens by request id of all of it, if `output` does not say all.
        preempted: requests that lost their blocks since the last."""
        if scheduled is None:
            told = (*output.new_requests, *output.cached_requests)
            scheduled = {data.request_id: data.num_scheduled_tokens for data in told}
        self._cost.plan(scheduled)
        metadata = PassMetadata(lost_loads=self._lost_loads, cancelled_loads=self._cancelled)
        self._lost_loads, self._cancelled = [], []
        for request_id in preempted:
            self._unsaved.pop(request_id, None)
        for request_id, save in self._unsaved.items():
            self._begin_stores(request_id, save, metadata)
        self._unsaved.clear()
        self._plan_async_loads(metadata)
        for data in output.new_requests:
            if (tracked := self._running.get(data.request_id)) is not None:
                tracked.block_ids = _blocks_of(data)
                tracked.chain.extend(data.new_tokens[tracked.chain.num_tokens :])
                computed = data.computed_position + self._plan_load(data, tracked, metadata)
                self._expect(tracked, computed + scheduled.get(data.request_id, 0))
                self._plan_store(data, tracked, computed, metadata)
        for data in output.cached_requests:
            if (tracked := self._running.get(data.request_id)) is not None:
                for known, added in zip(tracked.block_ids, _blocks_of(data), strict=True):
                    known.extend(added)
                tracked.chain.extend(data.new_tokens)
                self._expect(tracked, data.computed_position + scheduled.get(data.request_id, 0))
                self._plan_store(data, tracked, data.computed_position, metadata)
        return metadata

    def loads_ended(self, ends: Iterable[LoadEnd]) -> None:
        """What the movers say of loads beside the passes."""
        self._cost.end(ends)

    def load_failed(self, request_id: int) -> None:
        """The engine was told that a load beside the passes failed, and computes those tokens."""
        if (tracked := self._running.get(request_id)) is not None:
            self._expect(tracked, tracked.num_pool_tokens)

    def cancel_load(self, request_id: int, start: int, end: int) -> None:
        """Nobody wants tokens `start` to `end` loaded any more. A load of more than those goes on."""
        tracked = self._running.get(request_id)
        load = (tracked.load or tracked.under_way) if tracked is not None else None
        if tracked is None or load is None or start > load.start or end < load.end:
            return
        # Its request has ended, goes on without this planner or begins anew, or its next pass says what it computes.
        self._cost.expect(request_id, 0)
        if tracked.load is not None:
            self._cancel(load)
            tracked.load = None
            self._lost_loads.append(request_id)
        else:
            self._cancelled.append(request_id)

    def finished(self, request_id: int) -> bool:
        """The request ended, wherever it was. True: the movers may still be saving its blocks."""
        tracked = self._running.get(request_id)
        self._forget(request_id)
        if request_id in self._lost_loads:
            self._lost_loads.remove(request_id)
        return request_id in self._unsaved or (tracked is not None and tracked.saves)

    def keys(self, request_id: int) -> Sequence[bytes]:
        """The keys of a running request's full chunks, as far as its tokens are known here."""
        tracked = self._running.get(request_id)
        return tracked.chain.keys if tracked is not None and self._root == tracked.chain.root else ()

    def disown(self) -> None:
        """What was kept until now is not this engine's any more, and what it keeps from now on is nobody else's: its
        weights are no longer those that the geometry names. Requests under way are not kept."""
        self._root = sha256(self._root + os.urandom(KEY_BYTES)).digest()
        self._unsaved.clear()

    def close(self) -> None:
        """Give back every lease."""
        for request_id in [*self._matched, *self._running]:
            self._forget(request_id)
        self._unsaved.clear()

    def _is_decided(self, known: _Tracked, request: Request, num_computed_tokens: int) -> bool:
        """Whether a request that waits for room can have the offer, or the refusal, that it had a moment ago."""
        is_same = known.request is request and known.num_pool_tokens == num_computed_tokens
        return is_same and request.request_id in self._matched and self._clock() < known.decided_until

    def _expect(self, tracked: _Tracked, num_computed: int) -> None:
        """So many of a request's first tokens are there, or are being loaded or computed."""
        self._cost.expect(tracked.request.request_id, tracked.num_prompt_tokens - num_computed)

    def _still_names(self, chain: KeyChain, num_tokens: int) -> bool:
        return chain.root == self._root and chain.num_tokens <= num_tokens

    def _forget(self, request_id: int) -> None:
        self._cost.expect(request_id, 0)
        for requests in (self._matched, self._running):
            if (tracked := requests.pop(request_id, None)) is not None and tracked.load is not None:
                self._cancel(tracked.load)

    def _cancel(self, load: _Load) -> None:
        self._store.cancel(load.job.job_id)
        self._cost.drop(load.job.job_id)

    # -- loads -------------------------------------------------------------------------------------------------------

    def _lease(self, tracked: _Tracked, start: int) -> None:
        """Lease the longest stored prefix beyond `start` that is worth loading: one that may still be on its way into
        memory if its request is to wait outside the batch, else one whose bytes are in memory.

        The last token is left to the engine, which needs its logits; with it goes its block, since loads are whole
        blocks. Where not every group keeps all tokens, its parts are those of a boundary between chunks, so the load
        ends at one.
        Past the deadline only what already lies in memory counts.
        """
        chain, salt = tracked.chain, tracked.request.cache_salt
        chunk_tokens = self._geometry.chunk_tokens
        ends_with_chunk = bool(self._chunks.has_windows or self._chunks.state_groups)
        size = chunk_tokens if ends_with_chunk else self._chunks.tokens_per_block
        last = (chain.num_tokens - 1) // size * size
        deadline = self._clock() + self._options.load_deadline_seconds
        num_usable = -(-last // chunk_tokens)
        for _ in range(_MOST_TRIES):
            match = self._store.match(self._geometry, chain.keys[:num_usable])
            tiers = match.tiers[: match.num_chunks]
            if self._clock() >= deadline:
                tiers = tiers[: num_within(tiers, Tier.MEMORY)]
            if min(len(tiers) * chunk_tokens, last) <= start:
                return
            hit = self._choose(tracked, tiers, start, last)
            if hit is None:
                return
            if ends_with_chunk and hit.num_chunks < len(tiers):
                num_usable = hit.num_chunks  # Not every boundary within a hit is one.
                continue
            began = self._clock()
            keys = chain.keys[: hit.num_chunks]
            job = self._store.begin_load(self._geometry, keys, start // chunk_tokens, salt=salt)
            if job is None:
                continue
            is_async = self._leaves_batch(job)
            is_ready = job.ready or is_async or self._is_ready_by(job.job_id, deadline)
            if not (job.ready or is_async):
                self._cost.waited(hit, self._clock() - began, ok=is_ready)
            if is_ready:
                self._cost.promise(job.job_id, hit)
                tracked.load = _Load(job, start, start + hit.num_tokens, match.tiers, is_async)
                tracked.decided_until = self._clock() + _OFFER_SECONDS
                return

    def _choose(self, tracked: _Tracked, tiers: Sequence[Tier], start: int, last: int) -> Hit | None:
        """How much to load of a hit whose chunks lie on these tiers: all, what lies on nearer ones, or nothing."""
        choice = self._cost.choose(hits_within(self._geometry, tiers, start, last))
        if choice.hit is None:
            tracked.decided_until = self._clock() + _OFFER_SECONDS
        logger.debug("request %d: %s", tracked.request.request_id, choice)
        return choice.hit

    def _leaves_batch(self, job: Job) -> bool:
        """Whether a load is long enough for the request to wait for it outside the batch."""
        if self._options.async_load != "auto":
            return self._options.async_load == "always"
        num_bytes = sum(part.slots[0].num_bytes for part in job.parts)
        return not job.ready or num_bytes >= self._options.async_load_bytes

    def _is_ready_by(self, job_id: int, deadline: float) -> bool:
        """Wait for lower tiers. False: they failed, which ended the job, or it was given up at the deadline."""
        while True:
            remaining_seconds = deadline - self._clock()
            answer = self._store.poll(max(0.0, remaining_seconds))
            if job_id in answer.ready:
                return True
            if job_id in answer.failed:
                self.meter.add("loads_failed_below")
                return False
            if remaining_seconds <= 0:
                self.meter.add("loads_past_deadline")
                self._store.cancel(job_id)
                return False

    def _plan_async_loads(self, metadata: PassMetadata) -> None:
        """Hand the leases of loads beside the passes to the movers."""
        begun, self._begun = self._begun, []
        for request_id in begun:
            if (tracked := self._running.get(request_id)) is not None and tracked.load is not None:
                tracked.under_way, tracked.load = tracked.load, None
                self._order_load(request_id, tracked.under_way, tracked.block_ids, metadata)

    def _plan_load(self, data: RequestData, tracked: _Tracked, metadata: PassMetadata) -> int:
        """Hand the request's lease to the movers; returns the tokens that they will load, or have loaded."""
        if tracked.under_way is not None:
            ended, tracked.under_way = tracked.under_way, None
            # The engine takes its word back if the load failed, and computes those tokens.
            has_loaded = tracked.request.num_connector_matched_tokens == ended.num_tokens
            return ended.num_tokens if has_loaded and data.computed_position == ended.start else 0
        load, tracked.load = tracked.load, None
        if load is None:
            return 0
        if data.computed_position != load.start:
            # The pool holds other tokens than at the match: the load would leave a gap or write over shared blocks.
            self._cancel(load)
            metadata.lost_loads.append(data.request_id)
            return 0
        return load.num_tokens if self._order_load(data.request_id, load, tracked.block_ids, metadata) else 0

    def _order_load(self, request_id: int, load: _Load, block_ids: BlockIds, metadata: PassMetadata) -> bool:
        """Put a load into the pass's metadata. False: a block that it needs does not exist, so it is lost."""
        copies = [self._chunks.loaded(part, load.start, load.end, block_ids) for part in load.job.parts]
        parts = [copy for copy in copies if copy.block_ids]
        if any(NO_BLOCK in part.block_ids for part in parts):
            self._cancel(load)
            self.load_failed(request_id)
            metadata.lost_loads.append(request_id)
            return False
        orders = metadata.async_loads if load.is_async else metadata.loads
        orders.append(RequestJob(request_id, CopyJob(load.job.job_id, parts, load.job.ready)))
        (self._cost.begin if load.is_async else self._cost.drop)(load.job.job_id)
        self._count(load)
        return True

    def _count(self, load: _Load) -> None:
        """Tokens loaded, by the tier on which the match found their chunk."""
        chunk_tokens = self._geometry.chunk_tokens
        for chunk, tier in enumerate(load.tiers):
            num_tokens = min(load.end, (chunk + 1) * chunk_tokens) - max(load.start, chunk * chunk_tokens)
            if num_tokens > 0:
                self.meter.add(f"load_tokens_{tier.name.lower()}", num_tokens)

    # -- stores ------------------------------------------------------------------------------------------------------

    def _plan_store(self, data: RequestData, tracked: _Tracked, computed: int, metadata: PassMetadata) -> None:
        """Offer the store the request's full chunks whenever the pass completes one. `computed`: tokens whose KV is
        there before the pass.

        All chunks are offered again each time, since the store takes only what it lacks: so chunks that came from the
        pool, that found no room or that were evicted meanwhile are saved as well.
        """
        chunk_tokens = self._geometry.chunk_tokens
        # A load that failed puts the request back: what was saved of it in that pass was dropped by the movers.
        tracked.num_chunks = min(tracked.num_chunks, computed // chunk_tokens)
        end = computed + data.num_scheduled_tokens
        num_chunks = end // chunk_tokens
        if data.request_id in metadata.lost_loads or num_chunks <= tracked.num_chunks:
            return
        if tracked.chain.root != self._root:
            return
        if self._chunks.state_groups and not self._chunks.ends_in_states(tracked.block_ids, end):
            return
        if end > tracked.chain.num_tokens or not self._chunks.are_known(tracked.block_ids, num_chunks):
            # A pass was missed, or blocks are of a kind that we do not know: which KV is where would be a guess.
            self.meter.add("requests_not_followed")
            tracked.chain.root = b""  # Not forgotten: its end has to wait for saves under way.
            return
        tracked.num_chunks = num_chunks
        first_chunk = self._chunks.first_whole(tracked.block_ids, computed)
        boundaries = [num_chunks]
        ends_with_prompt = tracked.chain.num_tokens == num_chunks * chunk_tokens
        if self._chunks.has_windows and not self._chunks.state_groups and ends_with_prompt:
            # The same prompt again goes on one chunk earlier, as its last token is always computed.
            boundaries.insert(0, num_chunks - 1)
        save = _Save(tracked, first_chunk, [boundary for boundary in boundaries if first_chunk < boundary])
        if self.saves_late:
            self._unsaved[data.request_id] = save
        else:
            self._begin_stores(data.request_id, save, metadata)

    def _begin_stores(self, request_id: int, save: _Save, metadata: PassMetadata) -> None:
        tracked = save.tracked
        for boundary in save.boundaries:
            keys = tracked.chain.keys[:boundary]
            job = self._store.begin_store(self._geometry, keys, save.first_chunk, salt=tracked.request.cache_salt)
            if job is not None:
                tracked.saves = True
                parts = [self._chunks.saved(part, tracked.block_ids) for part in job.parts]
                metadata.stores.append(RequestJob(request_id, CopyJob(job.job_id, parts)))


def _blocks_of(data: RequestData) -> list[list[int]]:
    """A host of one layer group may give the flat list alone."""
    return [list(of_group) for of_group in data.new_block_ids_by_layer_group or [data.new_block_ids]]
