"""A device whose work comes late: a stream keeps what it was given until the test, or who waits for it, lets it run.

One stream goes before the others for some time, then another, as far as the events that they wait for permit. So what
is in no order by events happens in any order, and long after the host went on. Patch `mark` here over
`kvferry.transfer.copy.mark` where that is used.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.transfer.host import move
from kvferry.transfer.plan import Direction, Numbers, Pages, Plan


class Event:
    """A moment in a stream's work."""

    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self.is_past = False

    def query(self) -> bool:
        return self.is_past

    def synchronize(self) -> None:
        while not self.is_past:
            self._device.run_one()

    def pass_by(self) -> None:
        self.is_past = True


class Stream:
    """Work in order. An entry without work is an event that is waited for."""

    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self.work: deque[tuple[Callable[[], Any] | None, Event | None]] = deque()

    def enqueue(self, run: Callable[[], Any]) -> None:
        self.work.append((run, None))

    def wait_event(self, event: Event) -> None:
        self.work.append((None, event))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> Event:
        event = Event(self._device)
        self.enqueue(event.pass_by)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()

    @property
    def can_go_on(self) -> bool:
        return bool(self.work) and (self.work[0][1] is None or self.work[0][1].is_past)


class LateDevice:
    """Streams whose work runs one piece at a time."""

    def __init__(self, choose: random.Random) -> None:
        self.choose = choose
        self._streams: list[Stream] = []
        self._is_settled = False

    def stream(self) -> Stream:
        self._streams.append(Stream(self))
        return self._streams[-1]

    def prefer(self, stream: Stream) -> None:
        """From now on this one goes before the others."""
        self._streams.remove(stream)
        self._streams.insert(0, stream)
        self._is_settled = True

    def run_one(self) -> None:
        """The next piece of one stream's work."""
        ready = [stream for stream in self._streams if stream.can_go_on]
        assert ready, "streams wait for each other"
        if not self._is_settled and self.choose.random() < 0.05:
            self.choose.shuffle(self._streams)
        run, _ = min(ready, key=self._streams.index).work.popleft()
        if run is not None:
            run()

    def run(self, share: float) -> None:
        """About this share of what there is."""
        for _ in range(int(share * sum(len(stream.work) for stream in self._streams))):
            if any(stream.can_go_on for stream in self._streams):
                self.run_one()


class LateCopier:
    """Stands for `CudaCopier`."""

    def __init__(self, device: LateDevice) -> None:
        self._choose = device.choose
        self.streams = {way: device.stream() for way in Direction}
        self._wire = device.stream()
        self._buffers: list[npt.NDArray[np.uint8]] = []

    def copy(self, pages: Pages) -> Stream:
        """Saves end on another stream than they begin on."""
        plan, stream = pages.plan(), self.streams[pages.direction]
        if pages.direction is Direction.TO_POOL:
            stream.enqueue(partial(move, plan))
            return stream
        self._buffers.append(buffer := np.empty(plan.num_bytes, np.uint8))
        places = np.uint64(buffer.ctypes.data) + np.cumsum(plan.sizes) - plan.sizes
        stream.enqueue(partial(move, Plan(plan.sources, places, plan.sizes)))
        self._wire.wait_event(stream.record_event())
        self._wire.enqueue(partial(move, Plan(places, plan.destinations, plan.sizes)))
        return self._wire

    def are_pinned(self, _ranges: Sequence[tuple[int, int]]) -> bool:
        """Whether the host has nothing to do with a load: chance decides."""
        return self._choose.random() < 0.5

    def synchronize(self) -> None:
        for stream in (*self.streams.values(), self._wire):
            stream.synchronize()

    def close(self) -> None:
        self.synchronize()


class LateMover:
    """Stands for `PageKernel`."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self.can = stream, True

    def warm(self, _way: Direction) -> bool:
        return True

    def can_move(self, _pages: Pages) -> bool:
        return self.can

    @contextmanager
    def moving(self, pages: Pages, heads: Numbers, lengths: Numbers) -> Iterator[Callable[[int, int, int], None]]:
        def enqueue(first: int, end: int, packed: int) -> None:
            for plan in beside(pages, heads, lengths, packed)[first:end]:
                self._stream.enqueue(partial(move, plan))

        yield enqueue


def beside(pages: Pages, heads: Numbers, lengths: Numbers, packed: int) -> list[Plan]:
    """By row, the copies of its pages between the pool and where `pages.runs` has them."""
    regions = range(pages.strides.page_bytes.size)[pages.regions]
    bases, strides, sizes = (
        side.tolist() for side in (pages.strides.bases, pages.strides.stride_bytes, pages.strides.page_bytes)
    )
    copies: dict[int, list[tuple[int, int, int]]] = {row: [] for row in range(pages.rows.ids.size)}
    for head, length in zip(heads.tolist(), lengths.tolist(), strict=True):
        at = packed + head * sum(sizes[region] for region in regions)
        for region in regions:
            for row in range(head, head + length):
                copies[row].append((at, bases[region] + strides[region] * int(pages.rows.ids[row]), sizes[region]))
                at += sizes[region]
    plans = []
    for of_row in copies.values():
        aside, in_pool, num_bytes = (np.array(side, np.uint64) for side in zip(*of_row, strict=True))
        sides = (aside, in_pool) if pages.direction is Direction.TO_POOL else (in_pool, aside)
        plans.append(Plan(*sides, num_bytes))
    return plans


def mark(stream: Stream | None) -> Event | None:
    """Stands for `transfer.copy.mark`."""
    return stream.record_event() if stream is not None else None
