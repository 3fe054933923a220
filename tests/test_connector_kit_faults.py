"""Connectors with one fault each, which the kit catches by name."""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvferry import KvCacheConnectorConfig
from kvferry.connector import manager as manager_module
from kvferry.connector.api import Request, SchedulerOutput
from kvferry.connector.config import LlmArgs
from kvferry.testing.connector import CheckOptions, Fault, Report, check_connector
from kvferry.testing.connector import probe as probe_module
from kvferry.testing.connector import trial as trial_module
from kvferry.testing.connector.session import Session
from kvferry.testing.fake_engine import fake_llm_args
from kvferry.testing.shelf import SHELVES, Copies, Copy, Shelf, ShelfScheduler, ShelfWorker

SMALL = CheckOptions(tokens_per_block=8, chunk_tokens=32, deadline_seconds=60.0)


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    SHELVES["kit"] = Shelf()
    yield SHELVES["kit"]
    del SHELVES["kit"]


def check(cls: type, *scenarios: str, options: CheckOptions = SMALL) -> Report:
    """A connector of which one half is `cls`, and the other good."""
    is_scheduler = issubclass(cls, ShelfScheduler | FlatScheduler)
    halves = (cls, KnownWorker) if is_scheduler else (ShelfScheduler, cls)
    return check_connector(config_of(*halves), scenarios, options)


def config_of(scheduler: type, worker: type) -> KvCacheConnectorConfig:
    """The connector of two classes of this module."""
    return KvCacheConnectorConfig(
        connector_module=__name__,
        connector_scheduler_class=scheduler.__name__,
        connector_worker_class=worker.__name__,
        options={"shelf": "kit"},
    )


# -- names and matches -------------------------------------------------------------------------------------------------


class Unsalted(ShelfScheduler):
    def _hashes(self, tokens: Sequence[int], salt: str | None) -> list[bytes]:
        return super()._hashes(tokens, None)


class Contextless(ShelfScheduler):
    """Names a block by its own tokens."""

    def _hashes(self, tokens: Sequence[int], salt: str | None) -> list[bytes]:
        size = self._block
        starts = range(0, len(tokens) - size + 1, size)
        return [
            hashlib.sha256(repr(salt).encode() + array("q", tokens[at : at + size]).tobytes()).digest() for at in starts
        ]


class _Matches(ShelfScheduler):
    """Answers something else wherever there is a match."""

    answer: Callable[[int, int], Any]

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> Any:
        count, _ = super().get_num_new_matched_tokens(request, num_computed_tokens)
        num_left = len(request.get_tokens(0)) - num_computed_tokens
        return type(self).answer(count, num_left) if count else (0, False)


class InBlock(_Matches):
    answer = staticmethod(lambda count, num_left: (num_left - 1, False))


class RoundsUp(_Matches):
    answer = staticmethod(lambda count, num_left: (count + 8, False))


class Boolean(_Matches):
    answer = staticmethod(lambda count, num_left: True)


class AlwaysAsync(ShelfScheduler):
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        return super().get_num_new_matched_tokens(request, num_computed_tokens)[0], True


class WholePrompt(ShelfScheduler):
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        count, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        first, found = self._planned_loads[request.request_id]
        whole = self._hashes(request.get_tokens(0), request.cache_salt)[-1:]
        if count and whole and whole[0] not in found and self._is_whole(whole[0]):
            self._planned_loads[request.request_id] = (first, [*found, *whole])
            count += self._block
        return count, is_async


class NeverFinds(ShelfScheduler):
    def _is_whole(self, content: bytes) -> bool:
        return False


# -- saves -------------------------------------------------------------------------------------------------------------


class SavesBeforeThePass(ShelfWorker):
    def start_load_kv(self, stream: Any) -> None:
        super().start_load_kv(stream)
        self._save(self._metadata.saves)


class SavesAfterOneLayer(ShelfWorker):
    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        if layer_idx == 0:
            self._save(self._metadata.saves)


class SavesWholePromptsAtOnce(ShelfScheduler):
    """As if no prompt were computed in parts."""

    def _save(self, request_id: int, start: int, end: int) -> None:
        super()._save(request_id, start, len(self._tracked[request_id].tokens))


class SavesLater(ShelfWorker):
    """Copies some passes later what was to be saved, whoever has the blocks by then."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._due: list[list[Copy]] = [[]] * 4

    def wait_for_save(self, stream: Any) -> None:
        self._due.append(self._metadata.saves)
        self._save(self._due.pop(0))


class CountsBlocksFromThePass(ShelfScheduler):
    """Takes a request's list of blocks for the blocks of the pass."""

    def _save(self, request_id: int, start: int, end: int) -> None:
        tracked = self._tracked[request_id]
        first, last = start // self._block, end // self._block
        contents = self._hashes(tracked.tokens[:end], tracked.salt)[first:]
        pairs = zip(contents, tracked.block_ids[0][: last - first], strict=False)
        self._copies.saves += [Copy(request_id, 0, content, block_id) for content, block_id in pairs]


class ReplacesBlockIds(ShelfScheduler):
    """Takes the new block ids for all of them."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Copies:
        for data in scheduler_output.cached_requests:
            self._tracked[data.request_id].block_ids = [[] for _ in data.new_block_ids_by_layer_group]
        copies = super().build_connector_meta(scheduler_output)
        for data in scheduler_output.cached_requests:
            if data.num_scheduled_tokens > 1:
                self._tracked[data.request_id].block_ids[0][0]
        return copies


# -- loads -------------------------------------------------------------------------------------------------------------


class LoadsBackwards(ShelfScheduler):
    def update_state_after_alloc_by_layer_group(self, request: Request, block_ids: list[list[int]]) -> None:
        super().update_state_after_alloc_by_layer_group(request, block_ids)
        loads = self._copies.loads
        targets = [copy.block_id for copy in reversed(loads)]
        loads[:] = [copy._replace(block_id=target) for copy, target in zip(loads, targets, strict=True)]


class FlipsABit(ShelfWorker):
    def _load(self, copies: Sequence[Copy]) -> None:
        super()._load(copies)
        for copy in copies[:1]:
            self._pools[copy.group][copy.block_id, 3] ^= 64


class LoadsAfterTheFirstLayer(ShelfWorker):
    def start_load_kv(self, stream: Any) -> None:
        self._has_loaded = True

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        if layer_idx == 1:
            self._load(self._metadata.loads)


class LoadsNothing(ShelfWorker):
    def start_load_kv(self, stream: Any) -> None:
        self._has_loaded = True


class ReportsLoadsEarly(ShelfWorker):
    """Says that it has loaded when it begins to."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._begun: list[Copy] = []

    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        self._load(self._begun)
        self._begun = self._take_later(started)
        return finished, started


class NeverEndsLoads(ShelfWorker):
    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        return finished, []


class NeverEndsSaves(ShelfWorker):
    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        return [], super().get_finished([], started)[1]


class ReportsTwice(ShelfWorker):
    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        saved, loaded = super().get_finished(finished, started)
        return saved, loaded * 2


class ReportsWhatItWasNotOffered(ShelfWorker):
    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        saved, loaded = super().get_finished(finished, started)
        return [*saved, *loaded], loaded


class FailsHonestly(ShelfWorker):
    """Cannot load, and says so."""

    def start_load_kv(self, stream: Any) -> None:
        self._failed = {copy.request_id for copy in self._metadata.loads}
        self._has_loaded = not self._failed

    def take_failed_loads(self) -> list[int]:
        failed, self._failed = self._failed, set()
        return list(failed)


# -- writes ------------------------------------------------------------------------------------------------------------


class ClearsBlocksAtTheEnd(ShelfScheduler):
    """Thinks that a request's blocks are its own to tidy up."""

    def request_finished_by_layer_group(self, request: Request, cache_block_ids: list[list[int]]) -> bool:
        KnownWorker.last._pools[0][cache_block_ids[0][0]] = 0
        return super().request_finished_by_layer_group(request, cache_block_ids)


class WritesBesideItsBlocks(ShelfWorker):
    def wait_for_save(self, stream: Any) -> None:
        super().wait_for_save(stream)
        for copy in self._metadata.saves[-1:]:
            self._pools[copy.group][copy.block_id] = 7


class KnownWorker(ShelfWorker):
    """Good; its scheduler half may reach over to it."""

    last: ShelfWorker

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        KnownWorker.last = self


# -- hooks -------------------------------------------------------------------------------------------------------------


class Raises(ShelfWorker):
    def wait_for_save(self, stream: Any) -> None:
        raise OSError(28, "no space left")


class RaisesAmongLoads(ShelfWorker):
    """Has loaded some by then: no news, as the engine trusts none of them."""

    def start_load_kv(self, stream: Any) -> None:
        if self._metadata.loads:
            self._load(self._metadata.loads[:1])
            raise OSError(5, "cannot read")
        super().start_load_kv(stream)


class RaisesInPlanning(ShelfScheduler):
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Copies:
        super().build_connector_meta(scheduler_output)
        raise KeyError("block")


class Exits(ShelfWorker):
    def wait_for_save(self, stream: Any) -> None:
        raise SystemExit(3)


class AnswersNothing(ShelfWorker):
    def get_finished(self, finished: list[int], started: list[int]) -> Any:
        super().get_finished(finished, started)


class FailedLoadsAreNone(ShelfWorker):
    def take_failed_loads(self) -> Any:
        return None


class CannotStart(ShelfWorker):
    def __init__(self, llm_args: LlmArgs) -> None:
        raise RuntimeError("no library libkv.so")


class Slow(ShelfWorker):
    def wait_for_save(self, stream: Any) -> None:
        super().wait_for_save(stream)
        threading.Event().wait(0.06)


GATE = threading.Event()


class Hangs(ShelfWorker):
    def start_load_kv(self, stream: Any) -> None:
        GATE.wait()


class WithoutBases:
    """Duck-typed, and short of the hooks that its author did not need."""

    def __init__(self, llm_args: LlmArgs) -> None:
        inner = ShelfWorker(llm_args)
        for hook in ("register_kv_cache_layout", "bind_connector_meta", "start_load_kv", "wait_for_layer_load"):
            setattr(self, hook, getattr(inner, hook))
        for hook in ("save_kv_layer", "wait_for_save", "get_finished"):
            setattr(self, hook, getattr(inner, hook))


class FlatScheduler:
    """Duck-typed, with the flat forms alone."""

    def __init__(self, llm_args: LlmArgs) -> None:
        self._inner = ShelfScheduler(llm_args)
        self.get_num_new_matched_tokens = self._inner.get_num_new_matched_tokens
        self.build_connector_meta = self._inner.build_connector_meta

    def update_state_after_alloc(self, request: Request, block_ids: list[int]) -> None:
        self._inner.update_state_after_alloc_by_layer_group(request, [block_ids])

    def request_finished(self, request: Request, block_ids: list[int]) -> bool:
        return self._inner.request_finished_by_layer_group(request, [block_ids])

    def wait_for_initialization(self) -> None:
        pass


CASES: list[tuple[type, str, set[Fault]]] = [
    (Unsalted, "salt", {Fault.SALT_IGNORED}),
    (Contextless, "prefix", {Fault.PREFIX_IGNORED, Fault.WRONG_TOKENS}),
    (InBlock, "external-hit", {Fault.PARTIAL_BLOCK, Fault.NO_HIT}),
    (RoundsUp, "external-hit", {Fault.BEYOND_PROMPT, Fault.NO_HIT}),
    (Boolean, "external-hit", {Fault.BAD_ANSWER, Fault.NO_HIT}),
    (AlwaysAsync, "cold", {Fault.ASYNC_NOTHING}),
    (NeverFinds, "external-hit", {Fault.NO_HIT}),
    (WholePrompt, "block-multiple", {Fault.WHOLE_PROMPT}),
    (SavesBeforeThePass, "external-hit", {Fault.SAVED_EARLY, Fault.WRONG_TOKENS}),
    (SavesAfterOneLayer, "external-hit", {Fault.SAVED_EARLY, Fault.WRONG_TOKENS}),
    (SavesWholePromptsAtOnce, "external-hit", set()),
    (SavesWholePromptsAtOnce, "chunked-prefill", {Fault.SAVED_EARLY, Fault.WRONG_TOKENS}),
    (SavesLater, "external-hit", {Fault.SAVED_LATE, Fault.WRONG_TOKENS}),
    (CountsBlocksFromThePass, "external-hit", set()),
    (CountsBlocksFromThePass, "chunked-prefill", {Fault.STALE_IDS, Fault.WRONG_TOKENS}),
    (CountsBlocksFromThePass, "decode-blocks", {Fault.STALE_IDS, Fault.WRONG_TOKENS}),
    (ReplacesBlockIds, "chunked-prefill", {Fault.HOOK_RAISED}),
    (LoadsBackwards, "external-hit", {Fault.WRONG_BLOCK}),
    (FlipsABit, "external-hit", {Fault.WRONG_BYTES, Fault.WRONG_TOKENS}),
    (LoadsAfterTheFirstLayer, "external-hit", {Fault.LOAD_NOT_AWAITED, Fault.WRONG_TOKENS}),
    (LoadsNothing, "external-hit", {Fault.LOAD_NOT_AWAITED, Fault.WRONG_TOKENS}),
    (FailsHonestly, "external-hit", {Fault.LOAD_FAILED, Fault.NO_HIT}),
    (ClearsBlocksAtTheEnd, "external-hit", {Fault.WRITE_AFTER_END, Fault.WRONG_TOKENS}),
    (WritesBesideItsBlocks, "external-hit", {Fault.WRITE_TO_OTHERS, Fault.WRONG_TOKENS}),
    (Raises, "external-hit", {Fault.HOOK_RAISED, Fault.NO_HIT}),
    (RaisesAmongLoads, "external-hit", {Fault.HOOK_RAISED, Fault.NO_HIT}),
    (RaisesInPlanning, "external-hit", {Fault.HOOK_RAISED, Fault.NO_HIT}),
    (Exits, "cold", {Fault.REQUEST_LOST}),
    (AnswersNothing, "cold", {Fault.BAD_ANSWER}),
    (FailedLoadsAreNone, "cold", {Fault.COMPLAINT}),
    (CannotStart, "cold", {Fault.CANNOT_START}),
    (WithoutBases, "external-hit", {Fault.HOOK_MISSING}),
    (FlatScheduler, "external-hit", {Fault.HOOK_MISSING}),
]
ASYNCHRONOUS: list[tuple[type, str, set[Fault]]] = [
    (ReportsLoadsEarly, "asynchronous", {Fault.LOAD_EARLY, Fault.WRONG_TOKENS}),
    (NeverEndsLoads, "asynchronous", {Fault.LOAD_ENDLESS}),
    (NeverEndsSaves, "cold", {Fault.SAVE_ENDLESS}),
    (ReportsTwice, "asynchronous", {Fault.REPORTED_TWICE}),
    (ReportsWhatItWasNotOffered, "asynchronous", {Fault.NEVER_OFFERED}),
]


def case_name(case: object) -> str | None:
    return case.__name__ if isinstance(case, type) else case if isinstance(case, str) else ""


@pytest.mark.parametrize(("cls", "scenario", "faults"), CASES, ids=case_name)
def test_a_fault_is_found_by_its_name(cls: type, scenario: str, faults: set[Fault], shelf: Shelf) -> None:
    report = check(cls, scenario)
    assert report.faults == {fault.label for fault in faults}, report
    assert report.passed is all(fault.is_warning for fault in faults)


@pytest.mark.parametrize(("cls", "scenario", "faults"), ASYNCHRONOUS, ids=case_name)
def test_a_fault_of_asynchronous_copies_is_found(cls: type, scenario: str, faults: set[Fault], shelf: Shelf) -> None:
    shelf.asynchronous_loads = shelf.asynchronous_saves = True
    is_endless = bool(faults & {Fault.LOAD_ENDLESS, Fault.SAVE_ENDLESS})
    report = check(cls, scenario, options=replace(SMALL, deadline_seconds=0.3) if is_endless else SMALL)
    assert report.faults == {fault.label for fault in faults}, report
    assert not report.passed


def test_a_slow_hook_is_a_warning(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "SLOW_HOOK_SECONDS", 0.05)
    report = check(Slow, "short")
    assert report.faults == {"slow-hook"}, report
    assert report.passed


def test_a_hook_that_hangs_ends_the_check(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "HANG_SECONDS", 0.3)
    threads = set(threading.enumerate())
    GATE.clear()
    report = check(Hangs, "cold", "short")
    GATE.set()
    assert report.faults == {"hook-hangs"}, report
    assert [scenario.note for scenario in report.scenarios] == ["not finished", "not run: an engine hangs"]
    for thread in set(threading.enumerate()) - threads:
        thread.join(30)


def test_who_claims_to_be_persistent_must_find_what_it_saved(shelf: Shelf, tmp_path: Path) -> None:
    config = KvCacheConnectorConfig(connector="kvferry", options={"chunk_tokens": 32, "l1_size_gb": 0.01})
    claims = replace(SMALL, expect_restart_hit=True)
    assert check_connector(config, ["restart"], claims).faults == {"no-hit-after-restart"}
    assert check_connector(config, ["restart"], SMALL).passed
    config = replace(config, options={**config.options, "disk_path": str(tmp_path)})
    report = check_connector(config, ["restart"], claims)
    assert report.passed, report
    assert "64 tokens from the connector" in str(report)


TWO_RANKS = """
from dataclasses import dataclass
from kvferry.connector.persistent import BlockFolder, PersistentConnectorScheduler, PersistentConnectorWorker

class OneForAll(PersistentConnectorScheduler):
    def __init__(self, llm_args):
        super().__init__(llm_args)
        self._folders = self._folders[:1]

class OneForAllWorker(PersistentConnectorWorker):
    def __init__(self, llm_args):
        super().__init__(llm_args)
        self._folder._suffix = "-0-of-2.kv"
"""


def test_ranks_that_share_a_name_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "connector_of_ranks.py").write_text(TWO_RANKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = KvCacheConnectorConfig(
        connector_module="connector_of_ranks",
        connector_scheduler_class="OneForAll",
        connector_worker_class="OneForAllWorker",
        options={"folder": str(tmp_path / "blocks")},
    )
    report = check_connector(config, ["two-ranks"], SMALL)
    assert report.faults == {"rank-ignored", "wrong-tokens"}, report


class Envelope:
    """Neither a dataclass nor a Struct."""


class Enveloped(ShelfScheduler):
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        super().build_connector_meta(scheduler_output)
        return Envelope()


def test_metadata_that_cannot_cross_is_found_where_there_are_ranks(shelf: Shelf, tmp_path: Path) -> None:
    """By the scheduler's probe alone: it is on rank 0, and there the metadata is made."""
    with Session(config_of(Enveloped, KnownWorker), tmp_path) as session:
        probes = session.config_of(probe_module.__name__, probe_module.ProbeScheduler, probe_module.ProbeWorker)
        for num_ranks, faults in ((1, []), (2, [Fault.METADATA_STUCK])):
            args = fake_llm_args(probes, tensor_parallel_size=num_ranks)
            notes = probe_module.ProbeScheduler(args).build_connector_meta(SchedulerOutput())
            assert notes.is_broken is (num_ranks == 2)
            assert [finding.fault for finding in session.take_found()] == faults


def test_every_fault_is_caught_here_or_is_not_the_connector_s() -> None:
    caught = {fault for _, _, faults in (*CASES, *ASYNCHRONOUS) for fault in faults}
    others = {Fault.SLOW_HOOK, Fault.HOOK_HANGS, Fault.NO_RESTART_HIT, Fault.RANK_IGNORED, Fault.METADATA_STUCK}
    assert set(Fault) - caught - others == {Fault.ENGINE}
