"""The worker half of vLLM's connector: begins the planner's jobs, and reports how they ended. Decides nothing.

Every load runs beside the passes, so that one that cannot be made is known before anything was computed from it: vLLM
may have scheduled the next pass before it learns how this one went. On CUDA the only load of an idle engine counts as
ended once its copies are enqueued, and the pass that waits for it is launched while they run: layer by layer if vLLM
calls the hook for each, else as a whole. Every save runs beside the passes too, except for groups whose blocks vLLM
takes back while their request runs, or writes to before it says so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kvferry.blocks import Geometry, GroupKind
from kvferry.config import StoreOptions
from kvferry.errors import ConfigError
from kvferry.integrations.vllm_layout import CacheGroup
from kvferry.integrations.vllm_messages import FerryMetadata
from kvferry.integrations.vllm_stores import Engine, open_for_worker
from kvferry.offload.metadata import LoadEnd
from kvferry.offload.mover import ArenaFollower, Mover
from kvferry.offload.stores import RankStore
from kvferry.store.arena import Arena
from kvferry.transfer.copy import mark
from kvferry.transfer.layout import Layout

logger = logging.getLogger(__name__)

_REGISTERING_SECONDS = 1.0
"""How long the end waits for who registers, perhaps with a store that will never come."""

_EMPTY_STEP_SECONDS = 0.001
"""An engine that only waits for copies makes one empty step after the other. In its caller's process nothing makes it
sleep, and it would keep the interpreter from the threads that copy; elsewhere vLLM lets it sleep as long as this."""


NameWeights = Callable[[], str | None]
"""What names the model's weights; None: they cannot be named."""


class WorkerHalf(ArenaFollower):
    """One rank's jobs. Until there is a store, and the model has a name, loads fail and saves are not begun.

    writes_early: a step writes to blocks before it says that they were given to another request, so no copy may be
    under way in blocks that can be. one_pass_a_step: all that reads blocks in a step is one pass of the model.
    """

    def __init__(
        self, engine: Engine, options: StoreOptions, *, writes_early: bool = False, one_pass_a_step: bool = False
    ) -> None:
        self._engine = engine
        self._writes_early = writes_early
        self._one_pass_a_step = one_pass_a_step
        self._options = options
        self._store, self._close_store = open_for_worker(engine, options)
        self._groups: Sequence[CacheGroup] = ()
        self._layouts: Sequence[Layout] = ()
        self._mover: Mover | None = None
        self._registering: threading.Thread | None = None
        self._is_closing = False
        self._metadata = FerryMetadata()
        self._is_empty = False
        """Whether the step computes nothing."""
        self._layers: dict[str, int] = {}
        """Numbers of the layers by their names, if passes may wait for loads layer by layer."""
        self._silent: set[str] = set()
        """Those that were never seen to call the hook."""
        self._by_layer = False
        """Whether the step's pass waits layer by layer."""
        self._names: dict[int, str] = {}
        self._loads: dict[int, int] = {}
        self._saves: dict[int, int] = {}
        """Job id to the request's number, of jobs under way."""
        self._loaded: set[int] = set()
        """Loads that ended and are to be reported."""
        self._failed: set[str] = set()
        """Requests whose load failed since the last report."""
        self._finished: set[int] = set()
        """Requests whose blocks wait for the end of their saves."""
        self._has_no_user = False
        """Whether no pass under way uses blocks that vLLM gives to a load. It may have zeroed them just now."""
        self._loads_after: Any = None
        """Marks work that the step's loads come after."""
        self._blocks: dict[int, list[int]] = {}
        """Where each load under way goes, for versions of vLLM that are told of blocks and not of requests."""
        self._failed_blocks: set[int] = set()

    def register(
        self, groups: Sequence[CacheGroup], layouts: Sequence[Layout], name_weights: NameWeights, *, frees_late: bool
    ) -> None:
        """Offer these pools to the store, in the background: to name weights may take seconds. frees_late: vLLM takes
        blocks of whole requests back once no pass, drafts aside, uses them (`Scheduler.defer_block_free`)."""
        self._groups, self._layouts = groups, layouts
        is_plain = self._one_pass_a_step and all(group.kind is GroupKind.FULL for group in groups)
        self._has_no_user = frees_late and is_plain
        # Elsewhere vLLM writes to blocks before a pass, such as states, or reads them outside its layers.
        if is_plain and len(groups) == 1:
            self._layers = {name: layer for layer, name in enumerate(groups[0].names)}
            self._silent = set(self._layers)
        self._registering = threading.Thread(
            target=self._register, args=(name_weights,), name="kvferry-vllm-register", daemon=True
        )
        self._registering.start()

    def _register(self, name_weights: NameWeights) -> None:
        try:
            identity = name_weights()
            if identity is None:
                logger.warning("KV is not kept beyond vLLM's pool: the model's weights cannot be named")
            elif self._store is not None and not self._is_closing:
                geometry = make_geometry(
                    identity, self._engine, self._options.chunk_tokens, self._groups, self._layouts
                )
                self._store.register(self._engine.engine_id, self._engine.rank, geometry)
        except ConfigError as error:
            logger.warning("KV is not kept beyond vLLM's pool: %s", error)
        except Exception:  # the thread's boundary
            logger.exception("KV is not kept beyond vLLM's pool")

    def bind(self, metadata: FerryMetadata, stream: Any, *, by_layer: bool = False) -> None:
        """Take a step's orders. What `stream` is given from now on, such as the step's pass, finds what was loaded
        ahead: vLLM may call `start_loads` before the pass or after it. by_layer: the pass calls `wait_for_layer`, as
        far as layers do."""
        self._follow_arena()
        is_ahead = self._mover is not None and self._mover.is_ahead
        self._by_layer = is_ahead and by_layer and self._may_wait_by_layer
        if metadata.writes or not (self._by_layer or metadata.is_empty):
            self._order_after_loads(stream)
        self._loads_after = None if self._has_no_user and not metadata.writes else mark(stream)
        self._metadata, self._is_empty = metadata, metadata.is_empty
        if metadata.saves_late:
            self._save(stream)  # If nothing is computed, there is no `start_saves`.
        self._names |= metadata.names
        self._finished.update(metadata.finished)

    def _make_mover(self, store: RankStore, arena: Arena) -> Mover:
        groups = enumerate(self._groups)
        passing = frozenset(at for at, group in groups if self._writes_early or group.kind is not GroupKind.FULL)
        return Mover(store, arena, self._layouts, self._options, self._engine.rank, passing)

    def release_preempted(self, metadata: FerryMetadata, stream: Any) -> None:
        """Before a step writes to blocks of requests that were preempted: wait for copies out of them. Before it may
        write to blocks that are loaded ahead (`FerryMetadata.writes`), perhaps before `bind`: wait for copies into
        them."""
        if metadata.writes or not self._may_wait_by_layer:
            self._order_after_loads(stream)
        preempted = set(metadata.preempted)
        jobs = [job_id for job_id, request in self._saves.items() if request in preempted]
        if self._mover is not None and jobs:
            self._mover.flush(jobs)

    @property
    def _may_wait_by_layer(self) -> bool:
        """Whether each layer of a pass reads its blocks after it has called the hook, and nothing else reads any."""
        return bool(self._layers) and not self._silent

    def wait_for_layer(self, name: str, stream_of: Callable[[], Any]) -> None:
        """What vLLM's stream is given from now on, such as a layer's attention, finds what was loaded ahead of the
        layer, if the pass waits layer by layer."""
        self._silent.discard(name)
        if self._by_layer and self._mover is not None and name in self._layers:
            self._mover.order_layer_after_loads(self._layers[name], stream_of())

    def _order_after_loads(self, stream: Any) -> None:
        if self._mover is not None:
            self._mover.order_after_loads(stream)

    def start_loads(self) -> None:
        """Begin the step's loads, of requests that are not in its pass."""
        for number, block_ids in self._metadata.lost.items():
            self._blocks[number] = block_ids
            self._end_load(number, ok=False)
        for order in self._metadata.jobs.async_loads:
            number, job = order.request_id, order.job
            self._blocks[number] = [block for part in job.parts for block in part.block_ids]
            if self._mover is None:
                self._end_load(number, ok=False)
                continue
            if self._metadata.is_idle and not self._writes_early and self._mover.load_ahead(job, self._loads_after):
                self._end_load(number, ok=True)
                continue
            self._loads[job.job_id] = number
            self._mover.load_beside(job, self._loads_after)

    def start_saves(self, stream: Any) -> None:
        """Begin to save what the step's pass, as far as `stream` was given it, completes, if it is planned with it."""
        if self._by_layer:
            self._order_after_loads(stream)
        if not self._metadata.saves_late:
            self._save(stream)
        self._metadata = FerryMetadata()

    def _save(self, stream: Any) -> None:
        orders = self._metadata.jobs.stores
        if self._mover is not None and orders:
            self._saves.update((order.job.job_id, order.request_id) for order in orders)
            self._mover.save([order.job for order in orders], stream)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Requests whose saves, and those whose load, ended since the last call."""
        if self._mover is not None:
            if self._is_empty and not self._loaded and (self._loads or self._saves):
                self._mover.wait_for_end(_EMPTY_STEP_SECONDS)
            self._take_in(self._mover.take_ended())
        saving = set(self._saves.values()) if self._finished else set()
        saved = self._finished - saving
        self._finished &= saving
        loaded, self._loaded = self._loaded, set()
        return self._take_names(saved), self._take_names(loaded)

    def failed_loads(self) -> set[str]:
        """Requests whose load failed, until `take_failed` is asked; each is in `take_finished` as well. Who is told
        this need not be told of blocks."""
        self._failed_blocks.clear()
        return set(self._failed)

    def take_failed(self) -> set[str]:
        """The same, for the last time."""
        failed, self._failed = self._failed, set()
        return failed

    def take_load_ends(self) -> list[LoadEnd]:
        """How loads ended, and how long they took, since the last call."""
        return self._mover.take_load_ends() if self._mover is not None else []

    def take_failed_blocks(self) -> set[int]:
        """The blocks that loads which failed since the last call should have filled."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def stats(self) -> Mapping[str, float]:
        """The mover's counters."""
        return self._mover.meter.snapshot() if self._mover is not None else {}

    def shutdown(self) -> None:
        self._is_closing = True
        if self._mover is not None:
            self._mover.close()
            self._mover = None
        if self._registering is not None:
            self._registering.join(_REGISTERING_SECONDS)
            self._registering = None
        self._store = None
        self._close_store()

    def _take_in(self, ended: Mapping[int, bool]) -> None:
        """Jobs that ended, and whether well."""
        for job_id, ok in ended.items():
            number = self._loads.pop(job_id, None)
            if number is not None:
                self._end_load(number, ok=ok)
            self._saves.pop(job_id, None)

    def _end_load(self, number: int, *, ok: bool) -> None:
        self._loaded.add(number)
        blocks = self._blocks.pop(number, [])
        if not ok:
            self._failed.add(self._names[number])
            self._failed_blocks.update(blocks)

    def _take_names(self, numbers: Iterable[int]) -> set[str]:
        return {self._names.pop(number) for number in numbers if number in self._names}


def make_geometry(
    identity: str, engine: Engine, chunk_tokens: int, groups: Sequence[CacheGroup], layouts: Sequence[Layout]
) -> Geometry:
    """What names this engine's bytes. The same on all ranks, or the store refuses them."""
    specs, first_layer = [], 0
    for group, layout in zip(groups, layouts, strict=True):
        spec = group.spec(layout.part_bytes(chunk_tokens), first_layer)
        # Ranks of one stage have the same latents, each stage those of other layers.
        specs.append(replace(spec, is_shared=group.is_latent and engine.num_stages == 1 < engine.num_ranks))
        first_layer += len(group.names)
    return Geometry(
        identity=identity,
        layout="|".join(layout.fingerprint() for layout in layouts),
        chunk_tokens=chunk_tokens,
        num_ranks=engine.num_ranks,
        groups=tuple(specs),
    )
