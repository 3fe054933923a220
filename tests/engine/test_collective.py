"""Which rank a caller is, asked as TensorRT-LLM's connectors ask."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvferry.connector.manager import LocalCollective
from kvferry.engine import collective
from kvferry.engine.collective import acting_for, allgather, barrier, broadcast, enter_world, leave_world
from kvferry.errors import ConnectorError


class Scripted:
    """A rank whose others say what they are told to."""

    def __init__(self, rank: int, others: list[Any]) -> None:
        self.rank = rank
        self.size = 1 + len(others)
        self.others = others
        self.sent: list[Any] = []

    def broadcast(self, value: Any) -> Any:
        self.sent.append(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def whereabouts() -> tuple[int, int]:
    return collective.world_rank(), collective.world_size()


def in_thread(call: Callable[[], Any]) -> Any:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    thread.join()
    return answers[0]


def test_alone_everything_is_one_s_own() -> None:
    assert whereabouts() == (0, 1)
    assert broadcast({"a": 1}) == {"a": 1}
    assert allgather(3) == [3]
    barrier()
    with pytest.raises(ConnectorError, match="only rank 0 can broadcast here, not rank 1"):
        broadcast(3, root=1)


def test_a_thread_belongs_to_the_engine_that_it_acts_for_and_others_to_the_last() -> None:
    first, last = Scripted(0, ["b"]), Scripted(1, ["b", "c"])
    enter_world(last)
    try:
        assert whereabouts() == in_thread(whereabouts) == (1, 3)
        with acting_for(first):
            assert whereabouts() == (0, 2)
            assert allgather("a") == ["a", "b"]
            assert in_thread(whereabouts) == (1, 3)
            with acting_for(LocalCollective()):
                assert allgather("a") == ["a"], "an engine of one rank does not speak to another's ranks"
        assert first.sent == [["a", "b"]]
        assert not last.sent
    finally:
        leave_world(first)
        assert whereabouts() == (1, 3)
        leave_world(last)
    assert whereabouts() == (0, 1)
