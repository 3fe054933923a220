"""What is told of the figures of engines inside vLLM, of which one may go."""

from __future__ import annotations

import pytest

from kvferry.testing.vllm_figures import report


def test_an_engine_that_goes_is_told_of_with_what_it_had(capsys: pytest.CaptureFixture[str]) -> None:
    slow = {"cold": 2.0, "pool": 0.2, "outside": 1.0, "hit_tokens": 0, "is_same": True}
    fast = {"cold": 3.0, "pool": 0.2, "outside": 0.5, "hit_tokens": 1024, "is_same": False}
    report([{"none": slow, "kvferry": fast}, {"kvferry": fast | {"cold": 5.0, "is_same": True}}])
    head, none, kvferry = capsys.readouterr().out.splitlines()
    assert head.startswith("2 rounds")
    assert none.split()[:3] == ["none", "2000.0", "1.000"]
    assert none.endswith("hit 0, same tokens: True, in 1 rounds")
    assert kvferry.split()[:3] == ["kvferry", "4000.0", "1.500"], "a ratio is of rounds in which both were"
    assert kvferry.endswith("hit 1,024, same tokens: False")


def test_a_batch_has_other_columns(capsys: pytest.CaptureFixture[str]) -> None:
    report([{"none": {"new": 2.0, "again": 1.0, "hit_tokens": 0}}])
    head, none = capsys.readouterr().out.splitlines()
    assert "new, ms" in head
    assert none.split() == ["none", "2000.0", "1.000", "1000.0", "1.000", "hit", "0"]
