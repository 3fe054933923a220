"""Saves let the tokens of their pass go first."""

from __future__ import annotations

import time

import pytest

from kvferry.offload.mover import PassEnd


class Event:
    """A device's event that takes so long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.num_waits = 0
        self.ended_at = 0.0

    def synchronize(self) -> None:
        self.num_waits += 1
        time.sleep(self.seconds)
        self.ended_at = time.monotonic()


def test_the_first_save_of_a_pass_waits_for_its_end_and_a_moment_more() -> None:
    event = Event(0.01)
    end = PassEnd(event)
    end.wait()
    assert time.monotonic() >= event.ended_at + 0.002
    for _ in range(100):
        end.wait()
    assert event.num_waits == 1


def test_without_a_device_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    end = PassEnd(None)
    end.wait()
    assert not any(slept)
