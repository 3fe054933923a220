"""The kit for connectors passes those that keep the contract, says what was not offered, and watches the engine too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvferry import KvCacheConnectorConfig
from kvferry.connector.api import NO_BLOCK, RequestData, SchedulerOutput
from kvferry.errors import ConfigError, ConnectorImportError, RequestError, UnknownPresetError
from kvferry.testing.connector import SCENARIOS, CheckOptions, Fault, Report, Result, check_connector
from kvferry.testing.connector.ledger import Ledger, PassOrder
from kvferry.testing.ranks import ScriptedRequest
from kvferry.testing.shelf import SHELVES, Shelf, shelf_config

SMALL = CheckOptions(tokens_per_block=8, chunk_tokens=32, deadline_seconds=60.0)
ONE_PROCESS = [name for name in SCENARIOS if name != "two-ranks"]


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    SHELVES["good"] = Shelf()
    yield SHELVES["good"]
    del SHELVES["good"]


def results(report: Report) -> dict[str, tuple[Result, str]]:
    """Each scenario's result and note, of a report without faults."""
    assert report.passed and not report.faults, report
    return {scenario.scenario: (scenario.result, scenario.note) for scenario in report.scenarios}


def test_a_connector_that_keeps_the_contract_passes(shelf: Shelf) -> None:
    begun: list[str] = []
    found = results(check_connector(shelf_config("good"), ONE_PROCESS, SMALL, begun.append))
    assert begun == list(found) == ONE_PROCESS
    # 104 of 109 tokens are loaded; of the next prompt 32 of 35; then the pool has 32, and 72 more are loaded.
    assert found["external-hit"] == (Result.OK, "208 tokens from the connector")
    assert found["decode-blocks"] == (Result.OK, "24 generated tokens found")
    assert found.pop("asynchronous") == (Result.NOT_OFFERED, "no match was asynchronous")
    assert {result for result, _ in found.values()} == {Result.OK}


def test_an_asynchronous_connector_passes(shelf: Shelf) -> None:
    shelf.asynchronous_loads = shelf.asynchronous_saves = True
    scenarios = ["external-hit", "asynchronous", "abort", "layer-groups"]
    found = results(check_connector(shelf_config("good"), scenarios, SMALL))
    assert found["asynchronous"] == (Result.OK, "80 tokens from the connector")
    assert found["abort"] == (Result.OK, "also while loading")


def test_kvferry_passes(tmp_path: Path) -> None:
    options = {"chunk_tokens": 16, "l1_size_gb": 0.01, "async_load": "always", "disk_path": str(tmp_path)}
    config = KvCacheConnectorConfig(connector="kvferry", options=options)
    found = results(check_connector(config, ONE_PROCESS, replace(SMALL, chunk_tokens=16, expect_restart_hit=True)))
    assert {result for result, _ in found.values()} == {Result.OK}


def test_persistent_passes_and_is_not_asked_for_layer_groups(tmp_path: Path) -> None:
    config = KvCacheConnectorConfig(connector="persistent", options={"folder": str(tmp_path)})
    scenarios = ["chunked-prefill", "salt", "prefix", "restart", "layer-groups"]
    found = results(check_connector(config, scenarios, replace(SMALL, expect_restart_hit=True)))
    result, note = found.pop("layer-groups")
    assert result is Result.NOT_OFFERED
    assert "lacks update_state_after_alloc_by_layer_group" in note
    assert {result for result, _ in found.values()} == {Result.OK}


def test_a_report_is_text_and_json(shelf: Shelf) -> None:
    report = check_connector(shelf_config("good"), ["short", "restart"], SMALL)
    lines = str(report).splitlines()
    assert lines[0] == "connector kvferry.testing.shelf:ShelfScheduler,ShelfWorker"
    assert lines[2].split() == ["scenario", "result", "fault", "seen"]
    assert lines[4].split(maxsplit=2) == ["restart", "ok", "64 tokens from the connector"]
    assert lines[-1] == "no scenario failed"
    found = json.loads(report.to_json())
    assert (found["passed"], [one["scenario"] for one in found["scenarios"]]) == (True, ["short", "restart"])
    assert found["scenarios"][0]["result"] == "ok"


@pytest.mark.parametrize(
    ("config", "scenarios", "options", "error"),
    [
        (KvCacheConnectorConfig(connector="no-such"), [], SMALL, UnknownPresetError),
        (KvCacheConnectorConfig(connector="kvferry"), ["no-such"], SMALL, ConfigError),
        (KvCacheConnectorConfig(connector="kvferry", options={"l2_size_gb": 1}), ["cold"], SMALL, ConfigError),
        (KvCacheConnectorConfig(connector="kvferry"), ["cold"], replace(SMALL, model="/no/model"), RequestError),
        (
            KvCacheConnectorConfig(
                connector_module="kvferry.testing.shelf", connector_scheduler_class="No", connector_worker_class="Such"
            ),
            [],
            SMALL,
            ConnectorImportError,
        ),
    ],
)
def test_what_cannot_be_checked_raises(
    config: KvCacheConnectorConfig, scenarios: list[str], options: CheckOptions, error: type[Exception]
) -> None:
    with pytest.raises(error):
        check_connector(config, scenarios, options)


@pytest.mark.parametrize(("block", "chunk"), [(1, 8), (8, 12), (16, 8), (32, 1024)])
def test_sizes_that_do_not_fit_are_refused(block: int, chunk: int) -> None:
    with pytest.raises(ConfigError):
        CheckOptions(tokens_per_block=block, chunk_tokens=chunk)


def test_the_documentation_names_every_fault_and_scenario() -> None:
    text = (Path(__file__).parents[1] / "docs" / "connectors.md").read_text(encoding="utf-8")
    assert [fault.label for fault in Fault if f"`{fault.label}`" not in text] == []
    assert [name for name in SCENARIOS if f"`{name}`" not in text] == []


# -- what the engine owes ----------------------------------------------------------------------------------------------

BLOCK = 4
REQUEST = ScriptedRequest(1, tokens=list(range(10)))


def data(**changes: object) -> RequestData:
    """The first pass of REQUEST."""
    told = RequestData(1, list(range(10)), [0, 1, 2], 0, 10, new_block_ids_by_layer_group=[[0, 1, 2]])
    return replace(told, **changes)  # type: ignore[arg-type]


def allocate(ledger: Ledger) -> None:
    ledger.matched(REQUEST, 0)
    ledger.allocated(REQUEST, [[0, 1, 2]])


def run_first(ledger: Ledger) -> None:
    allocate(ledger)
    ledger.advance(SchedulerOutput([data()]))


def step(**changes: object) -> SchedulerOutput:
    """A decode step of REQUEST."""
    told = data(new_tokens=[7], new_block_ids=[], computed_position=10, num_scheduled_tokens=1)
    return SchedulerOutput([], [replace(told, **{"new_block_ids_by_layer_group": [[]], **changes})])  # type: ignore[arg-type]


VIOLATIONS: list[tuple[Callable[[Ledger], object], str]] = [
    (lambda ledger: ledger.matched(REQUEST, 3), "has 3 of 10 tokens in the pool"),
    (lambda ledger: ledger.matched(REQUEST, 12), "has 12 of 10 tokens in the pool"),
    (lambda ledger: [ledger.matched(REQUEST, 0), ledger.matched(ScriptedRequest(2), 0)], "request 1 was matched and"),
    (lambda ledger: [allocate(ledger), ledger.matched(REQUEST, 0)], "request 1 was matched twice"),
    (lambda ledger: [ledger.matched(REQUEST, 0), ledger.allocated(REQUEST, [[0, 1]])], "10 tokens has blocks [0, 1]"),
    (lambda ledger: [ledger.matched(REQUEST, 0), ledger.allocated(REQUEST, [[0, 1, 1]])], "has blocks [0, 1, 1]"),
    (lambda ledger: [allocate(ledger), ledger.allocated(REQUEST, [[0, 1, 2]])], "got blocks without a match"),
    (lambda ledger: ledger.advance(SchedulerOutput([data()])), "was never allocated"),
    (lambda ledger: [run_first(ledger), ledger.advance(SchedulerOutput([data()]))], "is new twice"),
    (lambda ledger: [allocate(ledger), ledger.advance(step())], "is new twice, or was never new"),
    (
        lambda ledger: [allocate(ledger), ledger.advance(SchedulerOutput([data(new_tokens=[0])]))],
        "does not bring its prompt",
    ),
    (
        lambda ledger: [allocate(ledger), ledger.advance(SchedulerOutput([data(computed_position=4)]))],
        "computed_position 4, pool 0",
    ),
    (lambda ledger: [run_first(ledger), ledger.advance(step(computed_position=9))], "9 after a pass up to 10"),
    (lambda ledger: [run_first(ledger), ledger.advance(step(new_tokens=[7, 7]))], "brings 2 more tokens"),
    (
        lambda ledger: [run_first(ledger), ledger.advance(step(new_block_ids_by_layer_group=[[3]]))],
        "has 4 of 3 blocks told",
    ),
    (lambda ledger: [run_first(ledger), ledger.advance(step(num_scheduled_tokens=2))], "computes 10 to 12"),
    (lambda ledger: ledger.finished(REQUEST), "ended twice, or unheard"),
]


@pytest.mark.parametrize(("act", "complaint"), VIOLATIONS, ids=[complaint for _, complaint in VIOLATIONS])
def test_an_engine_that_breaks_the_contract_is_told(act: Callable[[Ledger], object], complaint: str) -> None:
    told: list[str] = []
    act(Ledger(BLOCK, told.append))
    assert any(complaint in one for one in told), told


def test_an_engine_that_keeps_the_contract_is_not() -> None:
    told: list[str] = []
    ledger = Ledger(BLOCK, told.append)
    run_first(ledger)
    ledger.advance(step())
    for position in (11, 12):
        more = [[3]] if position == 12 else [[]]
        ledger.advance(step(computed_position=position, new_block_ids_by_layer_group=more))
    assert len(ledger.entries[1].names) == 3
    ledger.finished(REQUEST)
    ledger.matched(REQUEST, 8)
    ledger.allocated(REQUEST, [[NO_BLOCK, 1, 2]])
    assert told == []


PASS = ["bind_connector_meta", "start_load_kv", "wait_for_layer_load", "save_kv_layer", "wait_for_save", "get_finished"]


@pytest.mark.parametrize(
    ("hooks", "complaint"),
    [
        (PASS, None),
        (["get_finished", *PASS, "get_finished"], None),
        ([*PASS[:2], *PASS[4:]], None),
        (PASS[1:], "start_load_kv comes after get_finished"),
        ([*PASS[:2], *PASS[3:]], "save_kv_layer comes after start_load_kv"),
        ([*PASS[:4], *PASS[2:]], "wait_for_save after 2 of 1 layers"),
        ([*PASS[:5], *PASS], "bind_connector_meta comes after wait_for_save"),
    ],
)
def test_the_order_of_a_pass_is_watched(hooks: list[str], complaint: str | None) -> None:
    told: list[str] = []
    order = PassOrder(1, told.append)
    layers = {"wait_for_layer_load": 0, "save_kv_layer": 0}
    for hook in hooks:
        if hook == "wait_for_save":
            layers = {"wait_for_layer_load": 0, "save_kv_layer": 0}
        order.called(hook, layers.get(hook))
        if hook == "save_kv_layer":
            layers = dict.fromkeys(layers, layers[hook] + 1)
    assert told[-1:] == ([complaint] if complaint else [])
