"""Drives a connector's two halves for an engine and keeps its ranks in step.

The engine asks and tells through this class alone, so that the API's rules are kept in one place: who is asked when,
what is bound where, when all ranks are done, and what a connector that raises or answers nonsense costs (a counted,
logged miss; never the engine). Knows no store, no tensor and no scheduling policy.

A rank's life in one iteration, in this order on every rank:

    exchange_metadata   leader: build_connector_meta, broadcast; all: bind_connector_meta
    start_pass          all: start_load_kv
    before_layer        all: wait_for_layer_load   \\  for each layer, only if a forward pass runs
    after_layer         all: save_kv_layer         /
    end_pass            all: wait_for_save
    collect             all: get_finished; agreed by all ranks, answered on the leader
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from kvferry.connector import wire
from kvferry.connector.api import KvCacheConnectorScheduler, KvCacheConnectorWorker, Request, SchedulerOutput
from kvferry.connector.config import LlmArgs

logger = logging.getLogger("kvferry.connector")
T = TypeVar("T")

SLOW_HOOK_SECONDS = 1.0
"""A hook that takes longer is complained of: it runs in the engine's loop, which nothing can do for it."""

_MAX_REMEMBERED_COMPLAINTS = 10_000
"""Complaints are logged once per hook and request; forgetting them now and then bounds the memory that this takes."""


class Collective(Protocol):
    """What ranks need of each other. Called by all ranks in the same order; rank 0 leads."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank; what other ranks pass is ignored."""

    def gather(self, value: Any) -> list[Any]:
        """All ranks' values in the order of ranks on rank 0; an empty list elsewhere."""


class LocalCollective:
    """One rank, alone."""

    rank = 0
    size = 1

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


@dataclass(frozen=True, slots=True)
class LoadDecision:
    """What the engine may take from the connector: `num_tokens` after those that its pool has."""

    num_tokens: int = 0
    is_async: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """Requests that all ranks are done with: `loaded` and `saved` asynchronously; `failed` loads are to be computed."""

    loaded: tuple[int, ...] = ()
    saved: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Report:
    """One rank's answer in `collect`. `pass_broken`: what this pass should have loaded cannot be trusted. `num_errors`:
    of its connector since its last answer, by hook."""

    saved: list[int]
    loaded: list[int]
    failed: list[int]
    pass_broken: bool
    num_errors: dict[str, int]


class _Agreement:
    """Ids of one kind of transfer: offered once, done when every rank has reported it once."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._new: list[int] = []
        self._missing: dict[int, set[int]] = {}

    def open(self, request_id: int) -> None:
        self._new.append(request_id)
        self._missing[request_id] = set(range(self._num_ranks))

    def take_new(self) -> list[int]:
        new, self._new = self._new, []
        return new

    def report(self, rank: int, request_id: int) -> str | None:
        """Count a rank's report; returns what is wrong with it, or None."""
        ranks = self._missing.get(request_id)
        if ranks is None:
            return "was never offered or is already done"
        if rank not in ranks:
            return "was reported twice by this rank"
        ranks.discard(rank)
        return None

    def take_done(self) -> tuple[int, ...]:
        done = tuple(request_id for request_id, ranks in self._missing.items() if not ranks)
        for request_id in done:
            del self._missing[request_id]
        return done

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._missing

    def __len__(self) -> int:
        return len(self._missing)


class KvCacheConnectorManager:
    """One per rank. `scheduler` is given on the leader (rank 0) alone; methods marked *leader* are called there only.

    Errors of the connector are counted in `num_errors` by hook name (on the leader those of all ranks) and logged once
    per hook and request by the rank that met them. What the collective raises goes through: a rank is lost.
    """

    def __init__(
        self,
        llm_args: LlmArgs,
        worker: KvCacheConnectorWorker,
        scheduler: KvCacheConnectorScheduler | None,
        collective: Collective | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = worker
        self.scheduler = scheduler
        self.num_errors: Counter[str] = Counter()
        self._untold_errors: Counter[str] = Counter()
        self._llm_args = llm_args
        self._collective: Collective = collective or LocalCollective()
        assert (scheduler is not None) == (self._collective.rank == 0), "the scheduler half lives on rank 0 alone"
        self._loading = _Agreement(self._collective.size)
        self._saving = _Agreement(self._collective.size)
        self._failed_loading: set[int] = set()
        self._loads_of_next_pass: set[int] = set()
        self._loads_of_pass: set[int] = set()
        self._pass_has_meta = False
        self._pass_broken = False
        self._said: set[tuple[str, int | None]] = set()
        self._clock = clock
        self._after_forward = self._call("register_forward_pass_callable", worker.register_forward_pass_callable)

    @property
    def num_in_flight(self) -> int:
        """Leader: asynchronous loads and saves that not all ranks have reported."""
        return len(self._loading) + len(self._saving)

    # -- the scheduler's questions ---------------------------------------------------------------------------------

    def match(self, request: Request, num_computed_tokens: int) -> LoadDecision:
        """Leader: ask what can be loaded beyond the pool's `num_computed_tokens`. Nonsense is answered as nothing."""
        assert self.scheduler is not None
        scheduler = self.scheduler
        asked = self._call(
            "get_num_new_matched_tokens",
            lambda: (scheduler.get_num_new_matched_tokens(request, num_computed_tokens),),
            request.request_id,
        )
        if asked is None:
            return LoadDecision()
        (answer,) = asked
        complaint = self._complaint(answer, len(request.get_tokens(0)), num_computed_tokens)
        if complaint is not None:
            self.complain("get_num_new_matched_tokens", complaint, request.request_id)
            return LoadDecision()
        return LoadDecision(num_tokens=int(answer[0]), is_async=bool(answer[1]))

    def _complaint(self, answer: Any, num_prompt_tokens: int, num_computed_tokens: int) -> str | None:
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], int)):
            return f"answered {answer!r} where (tokens, is_async) was asked for"
        num_tokens, is_async = answer
        block = self._llm_args.tokens_per_block
        if num_tokens < 0 or num_computed_tokens + num_tokens > num_prompt_tokens:
            return f"matched {num_tokens} tokens after {num_computed_tokens} of a prompt of {num_prompt_tokens}"
        if num_tokens % block:
            return f"matched {num_tokens} tokens, not a multiple of the block size {block}"
        if is_async and num_tokens == 0:
            return "promised an asynchronous load of 0 tokens"
        return None

    def allocated(self, request: Request, block_ids: Sequence[Sequence[int]], decision: LoadDecision) -> bool:
        """Leader: the prompt has its blocks, one list a layer group, and the match is taken. False: nothing will be
        loaded after all, so the engine computes those tokens."""
        assert self.scheduler is not None
        scheduler, request_id = self.scheduler, request.request_id

        lists = [list(ids) for ids in block_ids]
        is_told = self._succeeds(
            "update_state_after_alloc",
            lambda: scheduler.update_state_after_alloc_by_layer_group(request, lists),
            request_id,
        )
        if not is_told or decision.num_tokens == 0:
            return False
        if decision.is_async:
            self._loading.open(request_id)
        else:
            self._loads_of_next_pass.add(request_id)
        return True

    def cancel_load(self, request: Request, start: int, end: int) -> None:
        """Leader: the asynchronous load of prompt tokens `start` to `end` is no longer wanted. Its blocks stay until
        `collect` answers it as loaded."""
        assert self.scheduler is not None
        scheduler = self.scheduler
        self._call("cancel_load", lambda: scheduler.cancel_load(request, start, end), request.request_id)

    def request_finished(self, request: Request, block_ids: Sequence[Sequence[int]]) -> bool:
        """Leader: no more tokens. True: keep the blocks until `collect` answers the request as saved."""
        assert self.scheduler is not None
        scheduler, request_id = self.scheduler, request.request_id
        lists = [list(ids) for ids in block_ids]
        keeps = self._call(
            "request_finished", lambda: bool(scheduler.request_finished_by_layer_group(request, lists)), request_id
        )
        self._loads_of_next_pass.discard(request_id)
        if keeps:
            self._saving.open(request_id)
        return bool(keeps)

    # -- one iteration, on every rank --------------------------------------------------------------------------------

    def exchange_metadata(self, output: SchedulerOutput | None) -> None:
        """Build on the leader (which alone passes `output`), bind on all ranks."""
        metadata: Any = None
        encoded: bytes | None = None
        if self.scheduler is not None:
            assert output is not None
            metadata, encoded = self._build(self.scheduler, output)
            self._loads_of_pass, self._loads_of_next_pass = self._loads_of_next_pass, set()
        encoded = self._collective.broadcast(encoded)
        self._pass_has_meta = encoded is not None
        self._pass_broken = encoded is None
        if encoded is not None:
            self._guard_load("bind_connector_meta", lambda: self._bind(metadata, encoded))

    def _build(self, scheduler: KvCacheConnectorScheduler, output: SchedulerOutput) -> tuple[Any, bytes | None]:
        """The metadata, and its form for other ranks: None if there is no metadata to be had."""
        try:
            metadata = scheduler.build_connector_meta(output)
            return metadata, wire.encode(metadata) if self._collective.size > 1 else b""
        except Exception as error:  # noqa: BLE001 - the hook boundary
            self.complain("build_connector_meta", repr(error))
            return None, None

    def _bind(self, metadata: Any, encoded: bytes) -> None:
        self.worker.bind_connector_meta(metadata if self.scheduler is not None else wire.decode(encoded))

    def start_pass(self, stream: Any) -> None:
        """Begin the pass's loads on this rank."""
        if self._pass_has_meta:
            self._guard_load("start_load_kv", lambda: self.worker.start_load_kv(stream))

    def before_layer(self, layer: int, stream: Any) -> None:
        """This layer's loads are done when this returns, in the order of `stream`."""
        if self._pass_has_meta:
            self._guard_load("wait_for_layer_load", lambda: self.worker.wait_for_layer_load(layer, stream))

    def after_layer(self, layer: int, stream: Any) -> None:
        """This layer's KV of the pass is written, in the order of `stream`."""
        if self._pass_has_meta:
            self._call("save_kv_layer", lambda: self.worker.save_kv_layer(layer, stream))

    def end_pass(self, stream: Any) -> None:
        """All layers ran, or no pass did."""
        if self._after_forward is not None:
            self._call("the callable of register_forward_pass_callable", self._after_forward)
        if self._pass_has_meta:
            self._call("wait_for_save", lambda: self.worker.wait_for_save(stream))

    def collect(self) -> Finished:
        """Ask every rank what ended; on the leader, what ended on all of them. Elsewhere the answer is empty."""
        offered = self._collective.broadcast((self._saving.take_new(), self._loading.take_new()))
        reports = self._collective.gather(self._report(*offered))
        return self._agree(reports) if self.scheduler is not None else Finished()

    def _report(self, new_saving: list[int], new_loading: list[int]) -> _Report:
        def ask() -> tuple[list[int], list[int]]:
            saved, loaded = self.worker.get_finished(new_saving, new_loading)
            return [*map(int, saved)], [*map(int, loaded)]

        saved, loaded = self._call("get_finished", ask) or ([], [])
        failed = self._call("take_failed_loads", lambda: [*map(int, self.worker.take_failed_loads())]) or []
        errors, self._untold_errors = self._untold_errors, Counter()
        return _Report(saved, loaded, failed, self._pass_broken, dict(errors))

    def _agree(self, reports: Sequence[_Report]) -> Finished:
        failed: set[int] = set()
        for rank, report in enumerate(reports):
            for agreement, ids in ((self._saving, report.saved), (self._loading, report.loaded)):
                for request_id in ids:
                    complaint = agreement.report(rank, request_id)
                    if complaint is not None:
                        self.complain("get_finished", f"rank {rank}: request {request_id} {complaint}", request_id)
            failed.update(report.failed)
            if rank > 0:
                self.num_errors.update(report.num_errors)
            if report.pass_broken:
                failed |= self._loads_of_pass
        self._loads_of_pass = set()
        # A failed asynchronous load is told with its end, not before: until then its blocks may still be written.
        self._failed_loading |= {request_id for request_id in failed if request_id in self._loading}
        loaded = self._loading.take_done()
        ended_badly = self._failed_loading.intersection(loaded)
        failed = (failed - self._failed_loading) | ended_badly
        self._failed_loading -= ended_badly
        return Finished(loaded=loaded, saved=self._saving.take_done(), failed=tuple(failed))

    def shutdown(self) -> None:
        """The engine ends: both halves are told, once."""
        self._call("shutdown", self.worker.shutdown)
        if self.scheduler is not None:
            self._call("shutdown", self.scheduler.shutdown)

    # -- the hook boundary -------------------------------------------------------------------------------------------

    def _call(self, hook: str, call: Callable[[], T], request_id: int | None = None) -> T | None:
        """The hook's answer, or None if it raised. Raising and dawdling are counted and logged."""
        started = self._clock()
        try:
            answer = call()
        except Exception as error:  # noqa: BLE001 - the hook boundary
            self.complain(hook, repr(error), request_id)
            return None
        if (seconds := self._clock() - started) > SLOW_HOOK_SECONDS:
            self.complain(hook, f"held the engine up for {seconds:.1f} s", request_id)
        return answer

    def _succeeds(self, hook: str, call: Callable[[], object], request_id: int | None = None) -> bool:
        """The same of a hook whose answer is nothing: whether it did not raise."""
        return self._call(hook, lambda: (call(),), request_id) is not None

    def _guard_load(self, hook: str, call: Callable[[], object]) -> None:
        """Call a hook that this pass's loads depend on: if it raises, they are failed."""
        self._pass_broken |= not self._succeeds(hook, call)

    def complain(self, hook: str, what: str, request_id: int | None = None) -> None:
        """Count what a hook did wrong; log it once per hook and request, in the connector's name."""
        for counts in (self.num_errors, self._untold_errors):
            counts[hook] += 1
        if (hook, request_id) in self._said:
            return
        self._said.add((hook, request_id))
        if len(self._said) > _MAX_REMEMBERED_COMPLAINTS:
            self._said.clear()
        name = type(self.worker).__qualname__
        of_request = "" if request_id is None else f" for request {request_id}"
        logger.warning("connector %s, hook %s%s: %s; the engine goes on without it", name, hook, of_request, what)
