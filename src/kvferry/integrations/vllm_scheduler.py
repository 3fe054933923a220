"""The scheduler half of vLLM's connector: what vLLM says, in the planner's words, and back. Decides nothing.

vLLM runs ahead: with overlapping steps it counts tokens as computed that it does not know yet, and drafts that may be
rejected. A position's KV is final once its token is known, so the planner hears of a pass only as far as that.

A request's way: `match` (repeated while it waits for room), `allocated`, then, if something is loaded, a second
`allocated` when it has ended; steps; perhaps preemption, after which it begins again with `match`; `finished`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.distributed.kv_events import KVCacheEvent

from kvferry.blocks import GroupKind
from kvferry.config import StoreOptions
from kvferry.connector.api import NO_BLOCK, Request, RequestData, SchedulerOutput
from kvferry.integrations.vllm_events import BlockEvents
from kvferry.integrations.vllm_identity import Adapters, request_extras
from kvferry.integrations.vllm_messages import FerryMetadata
from kvferry.integrations.vllm_stores import Engine, open_for_scheduler
from kvferry.observability.metrics import Meter
from kvferry.offload.cost import GAUGES
from kvferry.offload.metadata import LoadEnd, PassMetadata
from kvferry.offload.planner import Planner
from kvferry.server.client import StoreClient
from kvferry.store.keys import Extras

_NULL_BLOCK = 0
"""vLLM's block that stands where a group has none."""

_LOOK_SECONDS = 0.02
"""How often a start-up looks whether the workers have registered."""


@dataclass(slots=True, eq=False)
class _Followed:
    """A request of vLLM's as the planner reads it (`connector.api.Request`), and what it was told of it.

    num_local_tokens: what vLLM's pool had at the match. num_told: tokens that the planner knows. next_boundary: the
    planner hears nothing before a pass reaches it. new_blocks: blocks that the planner has not heard of. may_load: no
    load of it has failed.
    """

    request_id: int
    request: Any
    extras: Extras
    num_connector_matched_tokens: int = 0
    num_local_tokens: int = 0
    num_told: int = 0
    next_boundary: int = 0
    new_blocks: list[list[int]] = field(default_factory=list)
    may_load: bool = True

    @property
    def cache_salt(self) -> str | None:
        return self.extras.cache_salt

    @property
    def lora_id(self) -> str | None:
        return self.extras.lora_id

    def get_tokens(self, beam: int) -> Sequence[int]:
        assert beam == 0
        tokens: Sequence[int] = self.request.all_token_ids[:]
        return tokens


@dataclass(frozen=True, slots=True)
class Roles:
    """What vLLM permits. may_wait: a load may wait for lower tiers, which may fail it."""

    may_load: bool
    may_store: bool
    may_wait: bool


class SchedulerHalf:
    """One engine's planner, once all its workers have registered with the store. saves_late: see `Planner`."""

    def __init__(
        self,
        engine: Engine,
        options: StoreOptions,
        tokens_per_block: int,
        roles: Roles,
        *,
        tells_events: bool,
        saves_late: bool,
    ) -> None:
        self._engine = engine
        # A load within a pass that fails is known too late where steps overlap.
        self._options = replace(options, async_load="always")
        self._tokens_per_block = tokens_per_block
        self._roles = roles
        self._store, self._close_store = open_for_scheduler(engine, options)
        self._planner: Planner | None = None
        self._tells_events, self._saves_late = tells_events, saves_late
        self._events: BlockEvents | None = None
        self._adapters = Adapters()
        self._numbers = itertools.count(1)
        self._followed: dict[str, _Followed] = {}
        self._loading: dict[str, list[int]] = {}
        """Requests whose load vLLM waits for, until their first step, and the blocks that it should fill."""
        self._told = FerryMetadata()
        """What the next step's metadata says besides jobs."""
        self._held: set[str] = set()
        """Finished requests whose blocks vLLM keeps until their saves end."""
        self._began: dict[str, float] = {}
        """When requests began to wait for their load."""
        self._load_seconds: list[float] = []
        self._meter = Meter()
        self._reported: Mapping[str, float] = {}
        """Counts as they were when `take_counts` was last called."""

    def wait_for_workers(self, timeout_seconds: float) -> bool:
        """Wait until all workers have registered. False: they have not, but may later. Without a store, or while its
        server is off, which has been logged, there is nothing to wait for."""
        deadline = time.monotonic() + timeout_seconds
        while self._store is not None and not self._is_ready():
            if isinstance(self._store, StoreClient) and not self._store.is_alive():
                break
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def match(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """vLLM's `get_num_new_matched_tokens`."""
        if not self._is_ready():
            return 0, False
        assert self._planner is not None
        followed = self._follow(request)
        if followed is None:
            return 0, False
        followed.num_connector_matched_tokens, followed.num_local_tokens = 0, num_computed_tokens
        self._loading.pop(request.request_id, None)
        may_load = self._roles.may_load and followed.may_load and not request.skip_reading_prefix_cache
        offer = self._planner.match(followed, num_computed_tokens, may_load=may_load)
        return (offer.num_tokens, offer.is_async) if offer.is_ready or self._roles.may_wait else (0, False)

    def allocated(self, request: Any, block_ids: Sequence[Sequence[int]], num_external_tokens: int) -> None:
        """vLLM's `update_state_after_alloc`. It is called again when a load has ended, which says nothing new."""
        followed = self._followed.get(request.request_id)
        if self._planner is None or followed is None or request.request_id in self._loading:
            return
        followed.num_connector_matched_tokens = num_external_tokens
        blocks = _blocks(block_ids)
        if num_external_tokens:
            first = followed.num_local_tokens // self._tokens_per_block
            held = [block for of_group in blocks for block in of_group[first:] if block != NO_BLOCK]
            self._loading[request.request_id] = held
            self._began[request.request_id] = time.monotonic()
            self._told.names[followed.request_id] = request.request_id
        self._planner.allocated(followed, blocks)

    def step(self, output: Any) -> FerryMetadata:
        """vLLM's `build_connector_meta`."""
        told, self._told = self._told, FerryMetadata()
        for name in output.preempted_req_ids or ():
            if (followed := self._followed.get(name)) is not None:
                told.preempted.append(followed.request_id)
            # Who was preempted between two steps may have ended since.
            told.preempted += [number for number in told.finished if told.names[number] == name]
        written = (getattr(output, name, None) for name in ("new_block_ids_to_zero", "kv_cache_block_copies"))
        told.writes |= any(written)
        if self._planner is not None:
            translated = SchedulerOutput()
            if self._roles.may_store:
                self._translate(output, translated)
            scheduled = self._by_number(output.num_scheduled_tokens)
            told.jobs = self._planner.plan(translated, scheduled, preempted=told.preempted)
            told.saves_late = self._saves_late
            told.is_empty = not output.num_scheduled_tokens
            told.is_idle = told.is_empty and len(told.jobs.async_loads) == len(self._loading) == 1
            self._count(told.jobs)
            self._expect_events(told.jobs)
            lost = {number: told.names[number] for number in told.jobs.lost_loads if number in told.names}
            told.lost = {number: self._loading[name] for number, name in lost.items() if name in self._loading}
        return told

    def finished(self, request: Any) -> bool:
        """vLLM's `request_finished_all_groups`. True: its blocks are still being saved."""
        name = request.request_id
        followed = self._followed.pop(name, None)
        if self._loading.pop(name, None) is not None:
            self._told.writes = True  # Its load may be under way in blocks that other requests are given.
        self._began.pop(name, None)
        if self._planner is None or followed is None or not self._planner.finished(followed.request_id):
            return False
        self._told.finished.append(followed.request_id)
        self._told.names[followed.request_id] = name
        self._held.add(name)
        return True

    def take_in(self, saved: Iterable[str], loaded: Iterable[str], failed: Iterable[str]) -> None:
        """vLLM's `update_connector_output`. A request whose load failed is not offered another: it might fail again."""
        self._held.difference_update(saved)
        if self._events is not None and (saved or loaded):
            self._events.hurry()
        for name in loaded:
            if (began := self._began.pop(name, None)) is not None:
                self._load_seconds.append(time.monotonic() - began)
        for name in failed:
            self._told.writes = True  # On another rank its load may be under way, in blocks that it is to compute.
            self._meter.add("failed_loads")
            if (followed := self._followed.get(name)) is not None and self._planner is not None:
                followed.may_load = False
                followed.num_connector_matched_tokens = 0
                self._planner.load_failed(followed.request_id)

    def loads_ended(self, ends: Iterable[LoadEnd]) -> None:
        """What workers say of how long loads took."""
        if self._planner is not None:
            self._planner.loads_ended(ends)

    @property
    def holds_blocks(self) -> bool:
        """Whether blocks of finished requests come back once their saves have ended."""
        return bool(self._held)

    def disown(self) -> None:
        """vLLM's `reset_cache`."""
        if self._planner is not None:
            self._planner.disown()
        if self._events is not None:
            self._events.disown()

    def stats(self) -> Mapping[str, float]:
        """The store's counters and gauges and the planner's."""
        stored = self._store.stats() if self._store is not None else {}
        return {**stored, **(self._planner.meter.snapshot() if self._planner is not None else {})}

    def take_counts(self) -> dict[str, Any]:
        """What was counted since the last call: of loads and saves begun, how long loads took, and what is now."""
        planned = self._planner.meter.snapshot() if self._planner is not None else {}
        counts = {**planned, **self._meter.snapshot()}
        news: dict[str, Any] = {
            name: value if name in GAUGES else value - self._reported.get(name, 0)
            for name, value in counts.items()
            if value != self._reported.get(name, 0)
        }
        self._reported = counts
        seconds, self._load_seconds = self._load_seconds, []
        return news | ({"load_seconds": seconds} if seconds else {})

    def take_events(self) -> list[KVCacheEvent]:
        """vLLM's `take_events`."""
        return self._events.take() if self._events is not None else []

    def shutdown(self) -> None:
        if self._planner is not None:
            self._planner.close()
            self._planner = None
        self._store = None
        self._close_store()

    def _is_ready(self) -> bool:
        if self._planner is None and self._store is not None:
            geometry = self._store.geometry(self._engine.engine_id)
            if geometry is not None:
                self._chunk_tokens = geometry.chunk_tokens
                self._has_states = any(group.kind is GroupKind.STATE for group in geometry.groups)
                self._planner = Planner(
                    self._store, geometry, self._tokens_per_block, self._options, extras_of=_extras_of
                )
                self._planner.saves_late = self._saves_late
                if self._tells_events:
                    self._events = BlockEvents(self._store, geometry, self._tokens_per_block)
        return self._planner is not None

    def _follow(self, request: Any) -> _Followed | None:
        """What is known of a request, or None if its KV cannot be named."""
        known = self._followed.get(request.request_id)
        if known is not None and known.request is request:
            return known
        adapter = self._adapters.name(request.lora_request) if request.lora_request is not None else None
        extras = request_extras(request, adapter)
        if extras is None:
            return None
        self._followed[request.request_id] = followed = _Followed(next(self._numbers), request, extras)
        return followed

    def _by_number(self, scheduled: Mapping[str, int]) -> dict[Hashable, int]:
        """What each pass computes of all requests, whatever `_translate` tells the planner of them. Those that it does
        not know keep vLLM's names, which are no numbers."""
        return {of.request_id if (of := self._followed.get(name)) else name: count for name, count in scheduled.items()}

    def _count(self, jobs: PassMetadata) -> None:
        for name, orders in (("loaded_bytes", jobs.async_loads), ("saved_bytes", jobs.stores)):
            if orders:
                slots = (slot for order in orders for part in order.job.parts for slot in part.slots)
                self._meter.add(name, sum(slot.num_bytes for slot in slots))

    def _expect_events(self, jobs: PassMetadata) -> None:
        """Chunks that this pass saves, and those that it loads, whoever saved them."""
        if self._events is None or not (jobs.stores or jobs.async_loads):
            return
        assert self._planner is not None
        by_number = {followed.request_id: followed.request for followed in self._followed.values()}
        for number in dict.fromkeys(order.request_id for order in (*jobs.stores, *jobs.async_loads)):
            if (request := by_number.get(number)) is not None:
                self._events.follow(request, self._planner.keys(number))

    # -- steps -------------------------------------------------------------------------------------------------------

    def _translate(self, output: Any, translated: SchedulerOutput) -> None:
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            followed = self._followed.get(new.req_id)
            if followed is not None:
                data = self._first_pass(followed, new.block_ids, new.num_computed_tokens, scheduled[new.req_id])
                translated.new_requests.append(data)
        cached = output.scheduled_cached_reqs
        for name, block_ids, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            followed = self._followed.get(name)
            if followed is None:
                continue
            if name in cached.resumed_req_ids:
                translated.new_requests.append(self._first_pass(followed, block_ids, computed, scheduled[name]))
                continue
            if block_ids is not None:
                for known, added in zip(followed.new_blocks, _blocks(block_ids), strict=True):
                    known.extend(added)
            if min(computed + scheduled[name], followed.request.num_tokens) >= followed.next_boundary:
                translated.cached_requests.append(self._later_pass(followed, computed, scheduled[name]))

    def _first_pass(
        self, followed: _Followed, block_ids: Sequence[Sequence[int]], computed: int, num_scheduled: int
    ) -> RequestData:
        """The first pass, or the first after a preemption, which both come with all blocks."""
        self._loading.pop(followed.request.request_id, None)
        followed.num_told = 0
        followed.new_blocks = _blocks(block_ids)
        data = self._later_pass(followed, computed, num_scheduled)
        data.computed_position -= followed.num_connector_matched_tokens
        return data

    def _later_pass(self, followed: _Followed, computed: int, num_scheduled: int) -> RequestData:
        """All that the planner has not heard yet, as far as tokens are known."""
        end = min(computed + num_scheduled, followed.request.num_tokens)
        if self._has_states and end < computed + num_scheduled and end % self._chunk_tokens == 0:
            end -= 1  # A state is where its pass ends, and this pass ends beyond.
        data = RequestData(
            request_id=followed.request_id,
            new_tokens=followed.request.all_token_ids[followed.num_told :],
            new_block_ids=[],
            computed_position=computed,
            num_scheduled_tokens=end - computed,
            new_block_ids_by_layer_group=followed.new_blocks,
        )
        followed.num_told += len(data.new_tokens)
        followed.new_blocks = [[] for _ in followed.new_blocks]
        followed.next_boundary = (end // self._chunk_tokens + 1) * self._chunk_tokens
        return data


def _extras_of(request: Request) -> Extras:
    assert isinstance(request, _Followed)
    return request.extras


def _blocks(block_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[NO_BLOCK if block == _NULL_BLOCK else block for block in of_group] for of_group in block_ids]
