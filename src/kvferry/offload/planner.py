"""Decides what to load and what to save. Lives beside the engine's scheduler; knows requests, keys and jobs.

Knows no tensor and copies nothing: what it decides goes to the movers as `PassMetadata`. Called from one thread.

A request's way through here:

    match      asked, before allocation      in _matched, perhaps with a leased load that waits for its blocks
    allocated  the engine took the match     in _running
    plan       first pass                    the load goes to the movers, who end its lease
    plan       every pass                    chunks that the pass completes go to the movers
    finished   at any point                  whatever is still leased is given back

Every request that has a lease here is in `_matched` or `_running`, and the lease is in no pass yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvferry.blocks import Geometry, Job, Part, Tier
from kvferry.connector.api import NO_BLOCK, Request, RequestData, SchedulerOutput
from kvferry.observability.metrics import Meter
from kvferry.offload.metadata import CopyJob, PartCopy, PassMetadata, RequestJob
from kvferry.store.base import BlockStore
from kvferry.store.keys import Extras, KeyChain, root_key

_MOST_TRIES = 4
"""A match is repeated when what it found was gone or damaged on lower tiers; each try finds less."""

_MOST_UNALLOCATED = 1024
"""Requests that were matched and never heard of again are forgotten, the oldest first, beyond this many."""


@dataclass(frozen=True, slots=True)
class _Load:
    """A leased load of tokens `start` to `end`, whose bytes are in memory. tiers[i]: where chunk i was found."""

    job: Job
    start: int
    end: int
    tiers: tuple[Tier, ...]


@dataclass(slots=True)
class _Tracked:
    """What is known of a request. num_chunks: full chunks that were already offered to the store."""

    chain: KeyChain
    load: _Load | None = None
    block_ids: list[int] = field(default_factory=list)
    num_chunks: int = 0


class Planner:
    """Plans for one engine. `load_deadline_seconds` bounds how long `match` waits for lower tiers."""

    def __init__(
        self,
        store: BlockStore,
        geometry: Geometry,
        tokens_per_block: int,
        load_deadline_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert geometry.chunk_tokens % tokens_per_block == 0
        self.meter = Meter()
        self._store = store
        self._geometry = geometry
        self._root = root_key(geometry)
        self._tokens_per_block = tokens_per_block
        self._blocks_per_chunk = geometry.chunk_tokens // tokens_per_block
        self._load_deadline_seconds = load_deadline_seconds
        self._clock = clock
        self._matched: dict[int, _Tracked] = {}
        self._running: dict[int, _Tracked] = {}
        self._lost_loads: list[int] = []

    def match(self, request: Request, num_computed_tokens: int) -> int:
        """How many tokens after the first `num_computed_tokens` are in memory, verified and leased for this request."""
        self._forget(request.request_id)
        while len(self._matched) >= _MOST_UNALLOCATED:
            self._forget(next(iter(self._matched)))
        extras = Extras(cache_salt=request.cache_salt, lora_id=request.lora_id)
        chain = KeyChain(self._root, self._geometry.chunk_tokens, extras)
        chain.extend(request.get_tokens(0))
        tracked = self._matched[request.request_id] = _Tracked(chain)
        if num_computed_tokens % self._tokens_per_block == 0:  # the API has no name for part of a block
            tracked.load = self._lease(chain, num_computed_tokens)
        return tracked.load.end - tracked.load.start if tracked.load else 0

    def allocated(self, request: Request, block_ids: Sequence[int]) -> None:
        """The engine took the match (or a match of nothing), and these are the prompt's blocks."""
        num_taken = request.num_connector_matched_tokens
        tracked = self._matched.pop(request.request_id, None)
        if tracked is not None:
            tracked.block_ids = list(block_ids)
            self._running[request.request_id] = tracked
            load = tracked.load
            if load is not None and num_taken != load.end - load.start:
                self._store.cancel(load.job.job_id)
                tracked.load = None
        if num_taken and (tracked is None or tracked.load is None):
            self._lost_loads.append(request.request_id)

    def plan(self, output: SchedulerOutput) -> PassMetadata:
        """The jobs of the coming pass."""
        metadata = PassMetadata(lost_loads=self._lost_loads)
        self._lost_loads = []
        for data in output.new_requests:
            tracked = self._running.get(data.request_id)
            if tracked is not None:
                tracked.block_ids = list(data.new_block_ids)
                tracked.chain.extend(data.new_tokens[tracked.chain.num_tokens :])
                num_loaded = self._plan_load(data, tracked, metadata)
                self._plan_store(data, tracked, data.computed_position + num_loaded, metadata)
        for data in output.cached_requests:
            tracked = self._running.get(data.request_id)
            if tracked is not None:
                tracked.block_ids += data.new_block_ids
                tracked.chain.extend(data.new_tokens)
                self._plan_store(data, tracked, data.computed_position, metadata)
        return metadata

    def finished(self, request_id: int) -> None:
        """The request ended, wherever it was."""
        self._forget(request_id)
        if request_id in self._lost_loads:
            self._lost_loads.remove(request_id)

    def close(self) -> None:
        """Give back every lease."""
        for request_id in [*self._matched, *self._running]:
            self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        for requests in (self._matched, self._running):
            tracked = requests.pop(request_id, None)
            if tracked is not None and tracked.load is not None:
                self._store.cancel(tracked.load.job.job_id)

    # -- loads -------------------------------------------------------------------------------------------------------

    def _lease(self, chain: KeyChain, start: int) -> _Load | None:
        """A lease on the longest stored prefix beyond `start`, once its bytes are in memory.

        The last token is left to the engine, which needs its logits; with it goes its block, since loads are whole
        blocks. Past the deadline only what already lies in memory counts.
        """
        last = (chain.num_tokens - 1) // self._tokens_per_block * self._tokens_per_block
        chunk_tokens = self._geometry.chunk_tokens
        deadline = self._clock() + self._load_deadline_seconds
        for _ in range(_MOST_TRIES):
            match = self._store.match(self._geometry, chain.keys)
            num_chunks = match.num_chunks
            if self._clock() >= deadline:
                near = [tier is Tier.MEMORY for tier in match.tiers]
                num_chunks = near.index(False) if False in near else num_chunks
            end = min(num_chunks * chunk_tokens, last)
            if end <= start:
                return None
            num_chunks = -(-end // chunk_tokens)
            job = self._store.begin_load(self._geometry, chain.keys[:num_chunks], start // chunk_tokens)
            if job is not None and (job.ready or self._is_ready_by(job.job_id, deadline)):
                return _Load(job, start, end, match.tiers)
        return None

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

    def _plan_load(self, data: RequestData, tracked: _Tracked, metadata: PassMetadata) -> int:
        """Hand the request's lease to the movers; returns the tokens that they will load."""
        load, tracked.load = tracked.load, None
        if load is None:
            return 0
        if data.computed_position != load.start:
            # The pool holds other tokens than at the match: the load would leave a gap or write over shared blocks.
            self._store.cancel(load.job.job_id)
            metadata.lost_loads.append(data.request_id)
            return 0
        metadata.loads.append(RequestJob(data.request_id, self._load_copies(load, tracked.block_ids)))
        self._count(load)
        return load.end - load.start

    def _load_copies(self, load: _Load, block_ids: list[int]) -> CopyJob:
        first, last = load.start // self._tokens_per_block, load.end // self._tokens_per_block
        parts = []
        for part in load.job.parts:
            chunk_start = part.chunk * self._blocks_per_chunk
            begin, end = max(first, chunk_start), min(last, chunk_start + self._blocks_per_chunk)
            parts.append(PartCopy(part.group, part.slots, begin - chunk_start, block_ids[begin:end]))
        return CopyJob(load.job.job_id, parts)

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
        is_complete = end <= tracked.chain.num_tokens and num_chunks * self._blocks_per_chunk <= len(tracked.block_ids)
        if not is_complete or NO_BLOCK in tracked.block_ids:
            # A pass was missed, or blocks are of a kind that we do not know: which KV is where would be a guess.
            self.meter.add("requests_not_followed")
            self._forget(data.request_id)
            return
        tracked.num_chunks = num_chunks
        job = self._store.begin_store(self._geometry, tracked.chain.keys[:num_chunks], 0)
        if job is not None:
            parts = [self._store_copy(part, tracked.block_ids) for part in job.parts]
            metadata.stores.append(RequestJob(data.request_id, CopyJob(job.job_id, parts)))

    def _store_copy(self, part: Part, block_ids: list[int]) -> PartCopy:
        start = part.chunk * self._blocks_per_chunk
        return PartCopy(part.group, part.slots, 0, block_ids[start : start + self._blocks_per_chunk])
