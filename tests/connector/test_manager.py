"""The ranks of a manager agree on what is done, over the fake collective and between processes alike."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvferry.connector.manager import Finished
from kvferry.testing.ranks import Act, Outcome, ProcessTeam, Team, ThreadTeam

WORKER_HOOKS = [
    "bind_connector_meta",
    "start_load_kv",
    "wait_for_layer_load",
    "save_kv_layer",
    "wait_for_save",
    "get_finished",
]
LOAD_HOOKS = WORKER_HOOKS[:3]


@contextmanager
def closing(team: Team) -> Iterator[Team]:
    try:
        yield team
    finally:
        team.close()


@pytest.fixture(scope="module", params=["threads-1", "threads-2", "threads-3", "threads-4", "processes-2"])
def any_team(request: pytest.FixtureRequest) -> Iterator[Team]:
    kind, number = request.param.split("-")
    with closing({"threads": ThreadTeam, "processes": ProcessTeam}[kind](int(number))) as team:
        yield team


@pytest.fixture
def team(any_team: Team) -> Team:
    any_team.begin()
    return any_team


class TestAgreement:
    """What holds for any number of ranks, wherever they live."""

    def test_done_is_what_every_rank_reported(self, team: Team) -> None:
        assert team.load(7, is_async=True)
        team.save(8)
        last = team.num_ranks - 1
        for rank in range(team.num_ranks):
            acts = [Act()] * rank + [Act(saved=(8,), loaded=(7,))]
            outcome = team.iterate(*acts)
            assert outcome.finished == (Finished(loaded=(7,), saved=(8,)) if rank == last else Finished())
        assert team.manager.num_in_flight == 0
        assert not outcome.num_errors

    def test_ids_are_offered_once_to_every_rank(self, team: Team) -> None:
        team.load(1, is_async=True)
        team.load(2, is_async=True)
        team.save(3)
        outcomes = [team.iterate(with_pass=False), team.iterate(with_pass=False)]
        assert outcomes[0].calls == [[("get_finished", (3,), (1, 2))]] * team.num_ranks
        assert outcomes[1].calls == [[("get_finished", (), ())]] * team.num_ranks

    def test_hooks_come_in_order_on_every_rank(self, team: Team) -> None:
        for calls in team.iterate().calls:
            assert [(hook, first) for hook, first, _ in calls] == [
                ("bind_connector_meta", ()),
                ("start_load_kv", ()),
                ("wait_for_layer_load", (0,)),
                ("save_kv_layer", (0,)),
                ("wait_for_layer_load", (1,)),
                ("save_kv_layer", (1,)),
                ("wait_for_save", ()),
                ("get_finished", ()),
            ]

    def test_twice_or_never_offered_is_counted_and_harmless(self, team: Team, caplog: pytest.LogCaptureFixture) -> None:
        team.load(1, is_async=True)
        assert team.iterate(Act(loaded=(1, 1), saved=(5,))).num_errors["get_finished"] >= 2
        message = "connector ScriptedWorker, hook get_finished for request 5: rank 0: request 5 was never offered"
        assert any(message in record.getMessage() for record in caplog.records)
        if team.num_ranks > 1:
            assert team.manager.num_in_flight == 1
            outcome = team.iterate(*[Act()] + [Act(loaded=(1,))] * (team.num_ranks - 1))
            assert outcome.finished == Finished(loaded=(1,))

    @pytest.mark.parametrize("hook", LOAD_HOOKS)
    def test_a_load_that_raised_on_one_rank_has_failed(self, team: Team, hook: str) -> None:
        team.load(4, is_async=False)
        acts = [Act()] * (team.num_ranks - 1) + [Act(raises=frozenset({hook}))]
        outcome = team.iterate(*acts)
        assert outcome.finished == Finished(failed=(4,))
        assert outcome.num_errors == {hook: 2 if hook == "wait_for_layer_load" else 1}
        assert team.iterate().finished == Finished()

    def test_a_failed_asynchronous_load_is_told_when_all_ranks_ended_it(self, team: Team) -> None:
        team.load(4, is_async=True)
        outcome = team.iterate(*[Act(loaded=(4,))] * (team.num_ranks - 1) + [Act(failed=(4,))])
        assert outcome.finished == Finished()
        outcome = team.iterate(*[Act()] * (team.num_ranks - 1) + [Act(loaded=(4,))])
        assert outcome.finished == Finished(loaded=(4,), failed=(4,))

    def test_a_pass_without_metadata_calls_nothing_and_fails_its_loads(self, team: Team) -> None:
        team.load(4, is_async=False)
        outcome = team.iterate(metadata=RuntimeError("no metadata today"))
        assert outcome.finished == Finished(failed=(4,))
        assert outcome.num_errors == {"build_connector_meta": 1}
        assert [[hook for hook, *_ in calls] for calls in outcome.calls] == [["get_finished"]] * team.num_ranks

    def test_metadata_that_cannot_cross_names_connector_and_value(
        self, team: Team, caplog: pytest.LogCaptureFixture
    ) -> None:
        if team.num_ranks == 1:
            pytest.skip("one rank is handed the object itself")
        team.load(4, is_async=False)
        outcome = team.iterate(metadata={"slots": [object()]})
        assert outcome.finished == Finished(failed=(4,))
        assert outcome.num_errors == {"build_connector_meta": 1}
        assert "connector ScriptedWorker, hook build_connector_meta: " in caplog.text
        assert "dict['slots'][0] is a builtins.object" in caplog.text
        assert team.iterate().num_errors == {"build_connector_meta": 1}

    @pytest.mark.parametrize(
        "match", [None, 3, (1, False), (-4, False), (4000, False), (0, True), ("4", False), (4,), (4, False, 1)]
    )
    def test_a_match_that_makes_no_sense_is_none(self, team: Team, match: Any) -> None:
        from kvferry.testing.ranks import ScriptedRequest

        team.scheduler.match = match
        decision = team.manager.match(ScriptedRequest(1), 0)
        assert decision.num_tokens == 0
        assert not decision.is_async
        assert team.manager.num_errors == {"get_num_new_matched_tokens": 1}


IDS = st.integers(1, 5)
ACTS = st.builds(
    Act,
    saved=st.lists(IDS, max_size=3).map(tuple),
    loaded=st.lists(IDS, max_size=3).map(tuple),
    failed=st.lists(IDS, max_size=2).map(tuple),
    raises=st.frozensets(st.sampled_from(WORKER_HOOKS), max_size=2),
)
MOVES = st.lists(
    st.tuples(st.sampled_from(["load", "load now", "save"]), IDS)
    | st.tuples(st.just("iterate"), st.tuples(ACTS, ACTS), st.sampled_from([None, None, None, ValueError("no"), [1]])),
    max_size=12,
)


def play(team: Team, moves: list[Any]) -> list[Any]:
    """The trace of a script: all that a team answers."""
    team.begin()
    trace: list[Any] = []
    open_ids: set[int] = set()
    for kind, *rest in moves:
        if kind == "iterate":
            outcome = team.iterate(*rest[0], metadata=rest[1])
            open_ids -= {*outcome.finished.loaded, *outcome.finished.saved}
            trace.append(outcome)
        elif rest[0] not in open_ids:
            open_ids |= {rest[0]} if kind != "load now" else set()
            trace.append(team.save(rest[0]) if kind == "save" else team.load(rest[0], is_async=kind == "load"))
    return trace


def test_threads_and_processes_agree() -> None:
    with closing(ThreadTeam(2)) as threads, closing(ProcessTeam(2)) as processes:

        @settings(max_examples=60)
        @given(MOVES)
        def agree(moves: list[Any]) -> None:
            assert play(threads, moves) == play(processes, moves)

        agree()


class AgreementMachine(RuleBasedStateMachine):
    """A model of what is in flight: for each id, the ranks that have not reported it yet."""

    team: Team

    @initialize()
    def start(self) -> None:
        self.team.begin()
        self.missing: dict[str, dict[int, set[int]]] = {"loaded": {}, "saved": {}}
        self.bad_loads: set[int] = set()
        self.num_wrong = 0
        self.next_id = 1

    def _open(self, kind: str) -> int:
        request_id, self.next_id = self.next_id, self.next_id + 1
        self.missing[kind][request_id] = set(range(self.team.num_ranks))
        return request_id

    @rule()
    def load(self) -> None:
        assert self.team.load(self._open("loaded"), is_async=True)

    @rule()
    def save(self) -> None:
        self.team.save(self._open("saved"))

    @rule(data=st.data())
    def report(self, data: st.DataObject) -> None:
        """Every rank reports some ids: early or late, some twice, some unknown or done, some failed."""
        ids = st.lists(st.integers(1, self.next_id), max_size=4).map(tuple)
        act = st.builds(Act, saved=ids, loaded=ids, failed=ids)
        acts = data.draw(st.tuples(*[act] * self.team.num_ranks))
        outcome = self.team.iterate(*acts)
        failed_now = {request_id for act in acts for request_id in act.failed}
        self.bad_loads |= failed_now & set(self.missing["loaded"])
        done = {"loaded": self._count("loaded", acts), "saved": self._count("saved", acts)}
        ended_badly = self.bad_loads & done["loaded"]
        failed = (failed_now - self.bad_loads) | ended_badly
        self.bad_loads -= ended_badly
        found = outcome.finished
        assert [sorted(ids) for ids in (found.loaded, found.saved, found.failed)] == [
            sorted(ids) for ids in (done["loaded"], done["saved"], failed)
        ]
        assert outcome.num_errors.get("get_finished", 0) == self.num_wrong

    def _count(self, kind: str, acts: tuple[Act, ...]) -> set[int]:
        missing = self.missing[kind]
        for rank, act in enumerate(acts):
            for request_id in getattr(act, kind):
                if rank in missing.get(request_id, ()):
                    missing[request_id].discard(rank)
                else:
                    self.num_wrong += 1
        done = {request_id for request_id, ranks in missing.items() if not ranks}
        for request_id in done:
            del missing[request_id]
        return done

    @precondition(lambda self: any(self.missing.values()))
    @rule()
    def everyone_ends_everything(self) -> None:
        acts = [
            Act(**{kind: tuple(i for i, ranks in ids.items() if rank in ranks) for kind, ids in self.missing.items()})
            for rank in range(self.team.num_ranks)
        ]
        before = {kind: set(ids) for kind, ids in self.missing.items()}
        outcome: Outcome = self.team.iterate(*acts)
        assert {"loaded": set(outcome.finished.loaded), "saved": set(outcome.finished.saved)} == before
        assert set(outcome.finished.failed) == self.bad_loads
        self.bad_loads = set()
        self.missing = {"loaded": {}, "saved": {}}

    @invariant()
    def nothing_is_forgotten(self) -> None:
        if hasattr(self, "missing"):
            assert self.team.manager.num_in_flight == sum(map(len, self.missing.values()))


def test_agreement_is_what_a_dict_model_says(any_team: Team) -> None:
    logging.getLogger("kvferry.connector").disabled = True
    machine = type("Machine", (AgreementMachine,), {"team": any_team})
    try:
        run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=20, deadline=None))
    finally:
        logging.getLogger("kvferry.connector").disabled = False
