"""Numbers on their way to a stream's work, on a stream that goes on when it is let."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from kvferry.testing.late_device import Event, LateDevice
from kvferry.transfer import kernels

NUM_NUMBERS = 150


def test_numbers_that_are_still_to_be_read_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def anywhere(*shape: int, pin_memory: bool = False, device: Any = None, **settings: Any) -> torch.Tensor:
        return empty(*shape, **settings)

    monkeypatch.setattr(kernels, "_RING_NUMBERS", NUM_NUMBERS)
    monkeypatch.setattr(kernels, "after_allocating", lambda _stream: None)
    monkeypatch.setattr(torch, "empty", anywhere)
    num_waits = most_kept = 0
    for seed in range(60):
        choose = random.Random(seed)
        device = LateDevice(choose)
        stream: Any = device.stream()
        stream.device = None
        ring = kernels._NumberRing(stream)
        unread: list[tuple[torch.Tensor, int, Event]] = []
        for number in range(200):
            num_left = len(stream.work)
            sent = ring.send(np.full(choose.randrange(1, NUM_NUMBERS // 3), number))
            num_waits += len(stream.work) < num_left
            if choose.random() < 0.9:  # else who was to use them has failed
                stream.enqueue(partial(int, 0))
                ring.are_in_use_until_now()
                unread.append((sent, number, ring._in_use[-1][-1]))
            if choose.random() < 0.3:
                device.run(choose.random())
            unread = [each for each in unread if not each[-1].is_past]
            most_kept = max(most_kept, len(unread))
            assert all((kept == of).all() for kept, of, _ in unread)
    assert num_waits > 1000, "it is full again and again"
    assert most_kept > 5
