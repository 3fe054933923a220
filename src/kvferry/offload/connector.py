"""The connector behind the preset `kvferry`: the planner and the mover in the two halves of the connector API.

A load of what lies in memory is one copy at the start of the pass; one that is large, or that lower tiers have to
answer first, runs beside the passes while its request waits outside the batch. Saves run beside the passes too.
Knows no engine.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from kvferry.blocks import GroupKind
from kvferry.config import StoreOptions, load_options
from kvferry.connector.api import KvCacheConnectorScheduler, KvCacheConnectorWorker, Request, SchedulerOutput
from kvferry.connector.config import LlmArgs
from kvferry.connector.layout import KvCacheLayout
from kvferry.errors import ConfigError
from kvferry.observability.log import set_level
from kvferry.offload.identity import PoolGroup, check_chunk_tokens, identity, make_geometry
from kvferry.offload.metadata import LoadEnd, PassMetadata, RequestJob
from kvferry.offload.mover import ArenaFollower, Mover
from kvferry.offload.planner import Planner
from kvferry.offload.pools import read_group, read_pool
from kvferry.offload.stores import RankStore, open_for_rank, open_for_scheduler
from kvferry.store.arena import Arena
from kvferry.transfer.copy import mark
from kvferry.transfer.layout import Layout, UnknownLayout

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_LOAD_ENDS: WeakValueDictionary[str, deque[LoadEnd]] = WeakValueDictionary()
"""By engine id, what the worker half of rank 0 says to the scheduler half, which is in its process, of how long loads
take: the API has no way for it."""


def _load_ends(engine_id: str) -> deque[LoadEnd]:
    return _LOAD_ENDS.setdefault(engine_id, deque(maxlen=1024))


def _options(llm_args: LlmArgs) -> StoreOptions:
    """ConfigError: an option is wrong, or does not fit the engine."""
    options = load_options(llm_args.kv_connector_config.options)
    check_chunk_tokens(options.chunk_tokens, llm_args.kv_cache_config.tokens_per_block)
    set_level(options.log_level)
    return options


class KVFerryConnectorScheduler(KvCacheConnectorScheduler):
    """The scheduler half. Offers nothing until every rank has registered a pool whose layout is known."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._options = _options(llm_args)
        self._store, self._close_store = open_for_scheduler(llm_args, self._options)
        self._planner: Planner | None = None
        self._load_ends = _load_ends(llm_args.engine_id)

    def wait_for_initialization(self) -> None:
        if self._store is not None and (geometry := self._store.geometry(self._llm_args.engine_id)) is not None:
            self._planner = Planner(self._store, geometry, self._llm_args.tokens_per_block, self._options)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        if self._planner is None:
            self.wait_for_initialization()  # A cache server may come later than the engine. By now this waits no more.
        if self._planner is None:
            return 0, False
        offer = self._planner.match(request, num_computed_tokens)
        return offer.num_tokens, offer.is_async

    def update_state_after_alloc(self, request: Request, block_ids: list[int]) -> None:
        self.update_state_after_alloc_by_layer_group(request, [block_ids])

    def update_state_after_alloc_by_layer_group(
        self, request: Request, block_ids_by_layer_group: list[list[int]]
    ) -> None:
        if self._planner is not None:
            self._planner.allocated(request, block_ids_by_layer_group)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> PassMetadata:
        if self._planner is None:
            return PassMetadata()
        self._planner.loads_ended([self._load_ends.popleft() for _ in range(len(self._load_ends))])
        return self._planner.plan(scheduler_output)

    def request_finished(self, request: Request, cache_block_ids: list[int]) -> bool:
        """True if anything of the request was ever saved: its last copies may be under way."""
        return self._planner is not None and self._planner.finished(request.request_id)

    def request_finished_by_layer_group(
        self, request: Request, cache_block_ids_by_layer_group: list[list[int]]
    ) -> bool:
        return self._planner is not None and self._planner.finished(request.request_id)

    def cancel_load(self, request: Request, start: int, end: int) -> None:
        if self._planner is not None:
            self._planner.cancel_load(request.request_id, start, end)

    def stats(self) -> Mapping[str, float]:
        """The store's counters and gauges and the planner's: `load_tokens_memory`, `load_tokens_disk`, ..."""
        planned = self._planner.meter.snapshot() if self._planner is not None else {}
        return {**(self._store.stats() if self._store is not None else {}), **planned}

    def shutdown(self) -> None:
        if self._planner is not None:
            self._planner.close()
            self._planner = None
        self._store = None
        self._close_store()


class KVFerryConnectorWorker(ArenaFollower, KvCacheConnectorWorker):
    """The worker half, one per rank. Does nothing if the store, the layout or the model's identity is missing."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._options = _options(llm_args)
        self._store, self._close_store = open_for_rank(llm_args, self._options)
        self._layouts: list[Layout] = []
        self._passing_groups: frozenset[int] = frozenset()
        self._mover: Mover | None = None
        self._loads: list[RequestJob] = []
        """The pass's loads that have not begun."""
        self._async_loads: list[RequestJob] = []
        """Those of them that are to run beside the passes."""
        self._loading: dict[int, int] = {}
        """Job id to request id of the pass's loads under way."""
        self._stores: list[RequestJob] = []
        """The pass's saves that have not begun."""
        self._failed: set[int] = set()
        """Requests a load of which failed in this pass: nothing that it computes for them may be kept."""
        self._unreported: set[int] = set()
        self._beside = _Beside()
        self._load_ends = _load_ends(llm_args.engine_id)

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """A pool in which all layers share block ids and keep every token. Errors as `register_kv_cache_layout`."""
        layers = tuple(range(self._llm_args.num_layers))
        self._register([(GroupKind.FULL, layers, None, read_pool(self._llm_args, kv_cache_tensor, layers))])

    def register_kv_cache_layout(self, layout: KvCacheLayout) -> None:
        """ConfigError: the arena is too small for one chunk."""
        chunk_tokens = self._options.chunk_tokens
        pools = [
            (group.kind, group.layer_ids, group.window_size, read_group(self._llm_args, group, at, chunk_tokens))
            for at, group in enumerate(layout.groups)
        ]
        self._register(pools)

    def _register(self, pools: Sequence[tuple[GroupKind, tuple[int, ...], int | None, Layout | UnknownLayout]]) -> None:
        if self._store is None:
            return
        name = identity(self._llm_args)
        unknown = [layout.reason for *_, layout in pools if isinstance(layout, UnknownLayout)]
        layers = sorted(layer for _, of_group, _, _ in pools for layer in of_group)
        if layers != list(range(self._llm_args.num_layers)):
            unknown.append(f"layers {layers} are registered of {self._llm_args.num_layers}")
        if name is None:
            logger.warning("KV is not kept beyond the engine's pool: the engine cannot name its model's weights")
            return
        if unknown:
            logger.warning("KV is not kept beyond the engine's pool: its layout is unknown: %s", unknown[0])
            return
        layouts = [layout for *_, layout in pools if isinstance(layout, Layout)]
        chunk_tokens = self._options.chunk_tokens
        groups = [
            PoolGroup(kind, layers, window_tokens, layout.part_bytes(chunk_tokens), layout.fingerprint())
            for (kind, layers, window_tokens, _), layout in zip(pools, layouts, strict=True)
        ]
        try:
            geometry = make_geometry(self._llm_args, name, chunk_tokens, groups)
            self._store.register(self._llm_args.engine_id, self._llm_args.rank, geometry)
        except ConfigError:  # There will be no engine, hence nobody to call `shutdown`.
            self.shutdown()
            raise
        self._layouts = layouts
        self._passing_groups = frozenset(at for at, group in enumerate(groups) if group.kind is not GroupKind.FULL)
        self._follow_arena()

    def _make_mover(self, store: RankStore, arena: Arena) -> Mover:
        return Mover(store, arena, self._layouts, self._options, self._llm_args.rank, self._passing_groups)

    def _take_in(self, ended: Mapping[int, bool]) -> None:
        self._beside.take_in(ended)

    def bind_connector_meta(self, metadata: object) -> None:
        """The pass before may have broken off: what it left is given up before the next begins."""
        self._give_up_pass()
        self._follow_arena()
        super().bind_connector_meta(metadata)
        assert isinstance(metadata, PassMetadata)
        self._loads = list(metadata.loads)
        self._async_loads = list(metadata.async_loads)
        self._stores = list(metadata.stores)
        self._failed = set(metadata.lost_loads)
        self._unreported.update(self._failed)
        if self._mover is not None:
            for job_id in self._beside.load_jobs(metadata.cancelled_loads):
                self._mover.cancel(job_id)

    def start_load_kv(self, stream: Any) -> None:
        if self._mover is not None:
            loads, self._loads = self._loads, []
            for load in loads:
                self._loading[load.job.job_id] = load.request_id
                self._mover.begin_load(load.job, stream)
            beside, self._async_loads = self._async_loads, []
            for load in beside:
                self._beside.loads[load.job.job_id] = load.request_id
                self._mover.load_beside(load.job, mark(stream))

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Whether the loads went well is seen at the end of the pass, which is when the engine can be told."""
        if self._mover is not None:
            self._mover.wait_for_layer(layer_idx, stream)

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Saved at the end of the pass, all layers of a block in one copy."""

    def wait_for_save(self, stream: Any) -> None:
        """Begin to save what the pass completed, but nothing that it computed from a load that failed."""
        self._end_loads()
        if self._mover is not None:
            kept = [store for store in self._stores if store.request_id not in self._failed]
            self._stores = [store for store in self._stores if store.request_id in self._failed]
            self._beside.saves.update((store.job.job_id, store.request_id) for store in kept)
            self._mover.save([store.job for store in kept], stream)
        self._give_up(self._stores)
        self._clear_connector_meta()

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """A load that was offered but never came here, as its pass broke off, has failed."""
        self._give_up(self._async_loads)
        if self._mover is not None:
            self._take_in(self._mover.take_ended())
            self._load_ends.extend(self._mover.take_load_ends())
        saved, loaded, failed = self._beside.report(finished_gen_req_ids, started_loading_req_ids)
        self._unreported.update(failed)
        return saved, loaded

    def take_failed_loads(self) -> list[int]:
        failed, self._unreported = list(self._unreported), set()
        return failed

    def stats(self) -> Mapping[str, float]:
        """The mover's counters."""
        return self._mover.meter.snapshot() if self._mover is not None else {}

    def shutdown(self) -> None:
        self._give_up_pass()
        if self._mover is not None:
            self._mover.close()
            self._mover = None
        self._store = None
        self._close_store()

    def _end_loads(self) -> None:
        """Wait for the pass's loads; those that were never begun have failed."""
        if not (self._loads or self._loading):
            return
        loading, self._loading = self._loading, {}
        failed = {load.request_id for load in self._loads}
        self._give_up(self._loads)
        if self._mover is not None:
            failed |= {loading[job_id] for job_id in self._mover.end_loads()}
        self._failed |= failed
        self._unreported |= failed

    def _give_up(self, orders: list[RequestJob]) -> None:
        """End jobs without copying: their blocks hold nothing worth keeping, or nobody waits for them any more. An
        asynchronous load, which is not in `_beside` then, is reported as failed once offered."""
        if self._store is not None:
            for order in orders:
                self._store.done(order.job.job_id, self._llm_args.rank, False)
        orders.clear()

    def _give_up_pass(self) -> None:
        """End the jobs of a pass that never came to its end."""
        self._end_loads()
        self._give_up(self._async_loads)
        self._give_up(self._stores)


class _Beside:
    """The requests of a worker's jobs that run beside the passes, and what the engine is to be told of them.

    loads, saves: job id to request id of the jobs under way.
    """

    def __init__(self) -> None:
        self.loads: dict[int, int] = {}
        self.saves: dict[int, int] = {}
        self._offered_loads: set[int] = set()
        self._offered_saves: set[int] = set()
        self._loaded: dict[int, bool] = {}

    def load_jobs(self, request_ids: Collection[int]) -> list[int]:
        """The loads under way of these requests."""
        return [job_id for job_id, request_id in self.loads.items() if request_id in request_ids]

    def take_in(self, ended: Mapping[int, bool]) -> None:
        """Jobs that ended, and whether well."""
        for job_id, ok in ended.items():
            request_id = self.loads.pop(job_id, None)
            if request_id is not None:
                self._loaded[request_id] = ok
            self.saves.pop(job_id, None)

    def report(self, finished: Collection[int], started: Collection[int]) -> tuple[list[int], list[int], list[int]]:
        """What to report of the requests offered now and earlier: saved, loaded, and which of the loaded failed."""
        self._offered_saves.update(finished)
        self._offered_loads.update(started)
        if not (self._offered_saves or self._offered_loads):
            return [], [], []
        saving, loading = set(self.saves.values()), set(self.loads.values())
        saved = sorted(self._offered_saves - saving)
        loaded = sorted(self._offered_loads - loading)
        self._offered_saves &= saving
        self._offered_loads &= loading
        return saved, loaded, [request_id for request_id in loaded if not self._loaded.pop(request_id, False)]
