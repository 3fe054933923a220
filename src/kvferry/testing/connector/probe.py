"""The two halves that the engine runs in a check: each passes every hook on to the connector's and watches.

The engine sees an ordinary connector, and the connector an ordinary engine: its constructors are given its own
configuration, its hooks the engine's arguments, and what it answers or raises goes to the engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from kvferry.connector import manager, wire
from kvferry.connector.api import KvCacheConnectorScheduler, KvCacheConnectorWorker, Request, SchedulerOutput
from kvferry.connector.config import LlmArgs
from kvferry.connector.layout import KvCacheLayout
from kvferry.connector.presets import check_forms, resolve
from kvferry.errors import ConnectorProtocolError
from kvferry.testing.connector.faults import Fault
from kvferry.testing.connector.ledger import Entry, Ledger, PassOrder, Share
from kvferry.testing.connector.session import Session
from kvferry.testing.connector.watch import Blocks, PassNotes, PoolWatch


class _Half:
    """A half of the connector under test."""

    def __init__(self, session: Session, real: object) -> None:
        self._session = session
        self._real = real

    def has(self, hook: str) -> bool:
        return callable(getattr(self._real, hook, None))

    def call(self, hook: str, *arguments: Any, default: Any = None) -> Any:
        """The hook's answer, or `default` if there is no such hook. Raises what it raises."""
        if not self.has(hook):
            self._session.found(Fault.HOOK_MISSING, f"{type(self._real).__qualname__} has no {hook}", _plain(hook))
            return default
        started = time.monotonic()
        self._session.running_hook = hook, started
        try:
            return getattr(self._real, hook)(*arguments)
        except Exception as error:
            self._session.found(Fault.HOOK_RAISED, f"{hook} raised {error!r}", _plain(hook))
            raise
        finally:
            self._session.running_hook = None
            if (seconds := time.monotonic() - started) > manager.SLOW_HOOK_SECONDS:
                self._session.found(Fault.SLOW_HOOK, f"{hook} took {seconds:.1f} s", _plain(hook))


def _plain(hook: str) -> str:
    """The hook's name in the engine's complaints."""
    return hook.removesuffix("_by_layer_group")


class ProbeScheduler(KvCacheConnectorScheduler):
    """In place of the scheduler half."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._session = Session.of(llm_args)
        args = self._session.args_of_connector(llm_args)
        self._half = _Half(self._session, resolve(args.kv_connector_config).scheduler(args))
        self._block = llm_args.tokens_per_block
        self._ledger = Ledger(self._block, lambda what: self._session.found(Fault.ENGINE, what))
        self._notes = PassNotes()
        self._hides = False

    def wait_for_initialization(self) -> None:
        self._half.call("wait_for_initialization")

    # -- matches -----------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        entry = self._ledger.matched(request, num_computed_tokens)
        answer: Any = self._half.call("get_num_new_matched_tokens", request, num_computed_tokens, default=(0, False))
        fault = self._fault_of_match(answer, entry)
        if fault is not None:
            seen = f"answered {answer!r} after {entry.pool_tokens} of {entry.num_prompt} tokens"
            self._session.found(fault, seen, "get_num_new_matched_tokens")
            if not fault.is_warning:
                return answer  # type: ignore[no-any-return]  # for the engine to refuse
        entry.num_matched, entry.is_async = answer
        self._session.saw_async |= entry.is_async
        self._check_salt(entry)
        return entry.num_matched, entry.is_async

    def _fault_of_match(self, answer: Any, entry: Entry) -> Fault | None:
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], int)):
            return Fault.BAD_ANSWER
        end = entry.pool_tokens + answer[0]
        if answer[0] < 0 or end > entry.num_prompt:
            return Fault.BEYOND_PROMPT
        if answer[0] % self._block:
            return Fault.PARTIAL_BLOCK
        if answer[1] and not answer[0]:
            return Fault.ASYNC_NOTHING
        return Fault.WHOLE_PROMPT if answer[0] and end == entry.num_prompt else None

    def _check_salt(self, entry: Entry) -> None:
        """What was matched may be older than this check, but not only another salt's."""
        extras = (entry.request.cache_salt, entry.request.lora_id)
        first = entry.pool_tokens // self._block
        for name in entry.names[first : first + entry.num_matched // self._block]:
            known = self._session.known_chains.get(name)
            if known and extras not in known:
                (other, _), *_ = known
                seen = f"a request of salt {extras[0]!r} matched what one of salt {other!r} computed"
                self._session.found(Fault.SALT_IGNORED, seen)
                return

    def update_state_after_alloc_by_layer_group(
        self, request: Request, block_ids_by_layer_group: list[list[int]]
    ) -> None:
        entry = self._ledger.allocated(request, block_ids_by_layer_group)
        first = entry.pool_tokens // self._block
        names = [*entry.names, *[b""] * (len(entry.block_ids[0]) - len(entry.names))]
        blocks = [of_group[first:] for of_group in entry.block_ids]
        self._notes.fresh.append(Blocks(request.request_id, first, names[first:], blocks))
        self._notes.told.append(Blocks(request.request_id, 0, names, entry.block_ids))
        self._call_by_group("update_state_after_alloc", request, block_ids_by_layer_group)
        if entry.num_taken:
            last = first + entry.num_matched // self._block
            loaded = [of_group[first:last] for of_group in entry.block_ids]
            late = [name in self._session.late_names for name in entry.names[first:last]]
            loads = self._notes.async_loads if entry.is_async else self._notes.loads
            loads.append(Blocks(request.request_id, first, entry.names[first:last], loaded, late))

    def _call_by_group(self, hook: str, request: Request, groups: list[list[int]], default: Any = None) -> Any:
        """The form by layer group, or the flat one where a connector without the base class has that alone."""
        grouped = f"{hook}_by_layer_group"
        if self._half.has(grouped) or len(groups) > 1:
            return self._half.call(grouped, request, groups, default=default)
        if self._half.has(hook):
            self._session.found(Fault.HOOK_MISSING, f"the scheduler half has {hook}, but not {grouped}", hook)
        return self._half.call(hook, request, groups[0], default=default)

    # -- passes ------------------------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> PassNotes:
        for share in self._ledger.advance(scheduler_output):
            self._take_in(share)
        notes, self._notes = self._notes, PassNotes()
        notes.hides = self._hides
        try:
            notes.metadata = self._half.call("build_connector_meta", scheduler_output)
            if self._llm_args.tensor_parallel_size > 1:
                wire.encode(notes.metadata)
        except ConnectorProtocolError as error:
            self._session.found(Fault.METADATA_STUCK, str(error), "bind_connector_meta")
            notes.metadata, notes.is_broken = None, True
        except Exception:  # noqa: BLE001 - noted by `call`; the worker halves make it a failed pass, as the engine would
            self._session.explained.add("bind_connector_meta")
            notes.is_broken = True
        return notes

    def _take_in(self, share: Share) -> None:
        entry = share.entry
        request_id, extras = entry.request.request_id, (entry.request.cache_salt, entry.request.lora_id)
        written = slice(share.start // self._block, -(-share.end // self._block))
        blocks = Blocks(request_id, 0, [], [of_group[written] for of_group in entry.block_ids])
        self._notes.written += blocks.in_pool()
        self._notes.told.append(blocks)
        for index, name in enumerate(entry.names[: share.end // self._block]):
            self._session.known_chains.setdefault(name, set()).add(extras)
            if not share.is_first and index >= entry.num_first_pass:
                self._session.late_names.add(name)

    def request_finished_by_layer_group(
        self, request: Request, cache_block_ids_by_layer_group: list[list[int]]
    ) -> bool:
        self._ledger.finished(request)
        self._notes.ended.append(request.request_id)
        answer = self._call_by_group("request_finished", request, cache_block_ids_by_layer_group, default=False)
        return bool(answer)

    def cancel_load(self, request: Request, start: int, end: int) -> None:
        if not getattr(request, "is_finished", True):
            # The load is late: the engine goes on with the request and tells the connector no more of it.
            self._hides = True
        self._half.call("cancel_load", request, start, end)

    def shutdown(self) -> None:
        if self._half.has("shutdown"):
            self._half.call("shutdown")

    # What the engine calls is the form by layer group.

    def update_state_after_alloc(self, request: Request, block_ids: list[int]) -> None:
        self.update_state_after_alloc_by_layer_group(request, [block_ids])

    def request_finished(self, request: Request, cache_block_ids: list[int]) -> bool:
        return self.request_finished_by_layer_group(request, [cache_block_ids])


class ProbeWorker(KvCacheConnectorWorker):
    """In place of the worker half, on each rank."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._session = Session.of(llm_args)
        self._args = self._session.args_of_connector(llm_args)
        self._classes = resolve(self._args.kv_connector_config)
        self._half = _Half(self._session, self._classes.worker(self._args))
        self._order = PassOrder(llm_args.num_layers, lambda what: self._session.found(Fault.ENGINE, what))
        self._offered: dict[str, set[int]] = {"saved": set(), "loaded": set()}
        self._reported: dict[str, set[int]] = {"saved": set(), "loaded": set()}
        self._is_broken = False

    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        raise NotImplementedError("the engine calls register_kv_cache_layout")

    def register_kv_cache_layout(self, layout: KvCacheLayout) -> None:
        check_forms(self._classes, len(layout.groups))
        if not self._half.has("register_kv_cache_layout") and len(layout.groups) == 1:
            self._session.found(Fault.HOOK_MISSING, "the worker half has no register_kv_cache_layout")
            self._half.call("register_kv_caches", layout.as_single_pool_tensor())
        else:
            self._half.call("register_kv_cache_layout", layout)
        part = (self._llm_args.rank, self._llm_args.tensor_parallel_size)
        self._watch = PoolWatch(self._session, layout, part)

    def register_forward_pass_callable(self) -> Any:
        return self._half.call("register_forward_pass_callable")

    # -- the pass ----------------------------------------------------------------------------------------------------

    def bind_connector_meta(self, metadata: object) -> None:
        assert isinstance(metadata, PassNotes)
        self._order.called("bind_connector_meta")
        self._watch.begin_pass(metadata)
        self._is_broken = metadata.is_broken
        if self._is_broken:
            self._session.explained.add("bind_connector_meta")
            raise ConnectorProtocolError("there is no metadata for this pass")
        self._call_of_load("bind_connector_meta", metadata.metadata)

    def _call_of_load(self, hook: str, *arguments: Any) -> None:
        if self._is_broken:
            return
        try:
            self._half.call(hook, *arguments)
        except Exception:
            self._watch.give_up_loads()
            raise

    def start_load_kv(self, stream: Any) -> None:
        self._order.called("start_load_kv")
        self._call_of_load("start_load_kv", stream)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        self._order.called("wait_for_layer_load", layer_idx)
        self._call_of_load("wait_for_layer_load", layer_idx, stream)
        self._watch.after_layer_load(layer_idx)

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        self._order.called("save_kv_layer", layer_idx)
        if not self._is_broken:
            self._half.call("save_kv_layer", layer_idx, stream)

    def wait_for_save(self, stream: Any) -> None:
        self._order.called("wait_for_save")
        self._watch.end_pass()
        if not self._is_broken:
            self._half.call("wait_for_save", stream)

    # -- what ended --------------------------------------------------------------------------------------------------

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        self._order.called("get_finished")
        self._offered["saved"].update(finished_gen_req_ids)
        self._offered["loaded"].update(started_loading_req_ids)
        answer: Any = self._half.call("get_finished", finished_gen_req_ids, started_loading_req_ids, default=([], []))
        try:
            saved, loaded = answer
            saved, loaded = [int(request_id) for request_id in saved], [int(request_id) for request_id in loaded]
        except (TypeError, ValueError):
            self._session.found(Fault.BAD_ANSWER, f"get_finished answered {answer!r}", "get_finished")
            saved, loaded = [], []
        self._check_ids("saved", saved)
        self._check_ids("loaded", loaded)
        self._watch.after_finished(loaded)
        return saved, loaded

    def _check_ids(self, kind: str, request_ids: Iterable[int]) -> None:
        for request_id in request_ids:
            if request_id in self._offered[kind]:
                self._offered[kind].discard(request_id)
                self._reported[kind].add(request_id)
                continue
            fault = Fault.REPORTED_TWICE if request_id in self._reported[kind] else Fault.NEVER_OFFERED
            self._session.found(fault, f"get_finished reported request {request_id} as {kind}", "get_finished")

    def take_failed_loads(self) -> list[int]:
        failed: list[int] = self._half.call("take_failed_loads") if self._half.has("take_failed_loads") else []
        for request_id in failed:
            self._session.found(Fault.LOAD_FAILED, f"the load of request {request_id} failed")
        self._watch.settle_loads(failed)
        return failed

    def shutdown(self) -> None:
        for kind, fault in (("loaded", Fault.LOAD_ENDLESS), ("saved", Fault.SAVE_ENDLESS)):
            for request_id in self._offered[kind]:
                self._session.found(fault, f"request {request_id} was never reported as {kind}", "get_finished")
        try:
            if self._half.has("shutdown"):
                self._half.call("shutdown")
        finally:
            self._session.write_found()
