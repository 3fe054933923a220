"""Who leaves a full store first. Knows ids, parents and pins; not what they cost or where they lie.

`Evictor` keeps the invariant: an id is evictable if and only if it has no pin and no resident child. A chunk without
its parent can never be hit again, so children leave before parents. A policy orders the evictable ids alone, which
makes choosing the next victim cheap however many ids are pinned or have children.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable
from typing import Final, Generic, Literal, Protocol, TypeVar

from kvferry.errors import InvariantError

Id = TypeVar("Id", bound=Hashable)


class EvictionPolicy(Protocol[Id]):
    """An order of eviction. An id is admitted once, then held and offered in turn, and at last removed."""

    def admit(self, item: Id) -> None:
        """A new id, held so far."""

    def touch(self, item: Id) -> None:
        """The id was used."""

    def offer(self, item: Id) -> None:
        """A held id may be evicted from now on; it takes the place that its history gives it."""

    def hold(self, item: Id) -> None:
        """An offered id may not be evicted for now."""

    def pop(self) -> Id | None:
        """Hold and return the offered id that should leave first; None: none is offered."""

    def remove(self, item: Id, *, evicted: bool) -> None:
        """A held id is gone, by eviction or otherwise."""


class _Queue(Generic[Id]):
    """Ids by ascending stamp, any of which can leave: a heap whose stale entries are skipped. O(log n) amortised."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, Id]] = []
        self._stamps: dict[Id, int] = {}

    def __len__(self) -> int:
        return len(self._stamps)

    def __contains__(self, item: Id) -> bool:
        return item in self._stamps

    def push(self, item: Id, stamp: int) -> None:
        self._stamps[item] = stamp
        if len(self._heap) > 2 * len(self._stamps) + 64:
            self._heap = [(stamp, item) for item, stamp in self._stamps.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (stamp, item))

    def discard(self, item: Id) -> None:
        self._stamps.pop(item, None)

    def pop(self) -> Id | None:
        while self._heap:
            stamp, item = heapq.heappop(self._heap)
            if self._stamps.get(item) == stamp:
                del self._stamps[item]
                return item
        return None


class LRU(Generic[Id]):
    """The id whose last use is longest ago leaves first."""

    def __init__(self) -> None:
        self._clock = 0
        self._used: dict[Id, int] = {}
        self._offered: _Queue[Id] = _Queue()

    def admit(self, item: Id) -> None:
        self._stamp(item)

    def touch(self, item: Id) -> None:
        stamp = self._stamp(item)
        if item in self._offered:
            self._offered.push(item, stamp)

    def offer(self, item: Id) -> None:
        self._offered.push(item, self._used[item])

    def hold(self, item: Id) -> None:
        self._offered.discard(item)

    def pop(self) -> Id | None:
        return self._offered.pop()

    def remove(self, item: Id, *, evicted: bool) -> None:
        del self._used[item]

    def _stamp(self, item: Id) -> int:
        self._clock += 1
        self._used[item] = self._clock
        return self._clock


class S3FIFO(Generic[Id]):
    """A small queue for the new, a main queue for the used, and the names of those evicted while new.

    Ids that are used at most once while in the small queue leave from it, so that a scan does not push out what is
    used again and again. Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Here a
    held id keeps its place; the ghost queue remembers as many ids as are resident.
    """

    _SMALL_SHARE: Final = 0.1
    _MAX_USES: Final = 3

    def __init__(self) -> None:
        self._clock = 0
        self._uses: dict[Id, int] = {}
        self._stamps: dict[Id, int] = {}
        self._in_main: set[Id] = set()
        self._small: _Queue[Id] = _Queue()
        self._main: _Queue[Id] = _Queue()
        self._ghosts: OrderedDict[Id, None] = OrderedDict()

    def admit(self, item: Id) -> None:
        self._uses[item] = 0
        self._enter(item, main=item in self._ghosts)
        self._ghosts.pop(item, None)

    def touch(self, item: Id) -> None:
        self._uses[item] = min(self._uses[item] + 1, self._MAX_USES)

    def offer(self, item: Id) -> None:
        queue = self._main if item in self._in_main else self._small
        queue.push(item, self._stamps[item])

    def hold(self, item: Id) -> None:
        self._small.discard(item)
        self._main.discard(item)

    def pop(self) -> Id | None:
        while self._small or self._main:
            num_small = len(self._uses) - len(self._in_main)
            if self._small and (num_small >= self._SMALL_SHARE * len(self._uses) or not self._main):
                item = self._small.pop()
                assert item is not None, "the queue had an id"
                if self._uses[item] <= 1:
                    return item
                self._uses[item] = 0
            else:
                item = self._main.pop()
                assert item is not None, "the queue had an id"
                if not self._uses[item]:
                    return item
                self._uses[item] -= 1
            self._enter(item, main=True)
            self._main.push(item, self._stamps[item])
        return None

    def remove(self, item: Id, *, evicted: bool) -> None:
        if evicted and item not in self._in_main:
            self._ghosts[item] = None
        self._in_main.discard(item)
        del self._uses[item], self._stamps[item]
        while len(self._ghosts) > max(len(self._uses), 1):
            self._ghosts.popitem(last=False)

    def _enter(self, item: Id, *, main: bool) -> None:
        self._clock += 1
        self._stamps[item] = self._clock
        if main:
            self._in_main.add(item)


def make_policy(name: Literal["lru", "s3fifo"]) -> LRU[Id] | S3FIFO[Id]:
    """The policy of that name."""
    return LRU() if name == "lru" else S3FIFO()


class Evictor(Generic[Id]):
    """Residents with their parents and pins, and who of them leaves next. Callers serialise.

    A parent need not be resident; its children are counted all the same, should it come later. shares: names of shares
    of the residents, each of which can also be asked for its own least recently used.
    """

    def __init__(self, policy: EvictionPolicy[Id], shares: Iterable[Hashable] = ()) -> None:
        self._policy = policy
        self._shares: dict[Hashable, LRU[Id]] = {share: LRU() for share in shares}
        self._share_of: dict[Id, LRU[Id]] = {}
        self._parent: dict[Id, Id] = {}
        self._pins: Counter[Id] = Counter()
        self._children: Counter[Id] = Counter()
        self._chosen: list[Id] = []

    def __len__(self) -> int:
        return len(self._parent)

    def __contains__(self, item: Id) -> bool:
        return item in self._parent

    def add(self, item: Id, parent: Id, share: Hashable = None) -> None:
        """A new resident, with one pin, and the share that it belongs to, if any."""
        assert item not in self._parent, "an id is added once"
        if share in self._shares:
            self._share_of[item] = self._shares[share]
        self._gain_child(parent)
        self._parent[item] = parent
        self._pins[item] = 1
        for policy in self._policies(item):
            policy.admit(item)

    def touch(self, item: Id) -> None:
        """The resident was used."""
        for policy in self._policies(item):
            policy.touch(item)

    def pin(self, item: Id) -> None:
        """Keep a resident until as many `unpin`."""
        if self._evictable(item):
            self._hold(item)
        self._pins[item] += 1

    def unpin(self, item: Id) -> None:
        """Take one pin back."""
        assert self._pins[item] > 0, "pins pair with unpins"
        self._pins[item] -= 1
        if self._evictable(item):
            self._offer(item)

    def is_pinned(self, item: Id) -> bool:
        """Whether pins are left on a resident."""
        return self._pins[item] > 0

    def remove(self, item: Id) -> None:
        """A resident is gone for another reason than eviction, whatever pins it had."""
        if self._evictable(item):
            self._hold(item)
        self._forget(item, evicted=False)
        self._lose_child(self._parent.pop(item))

    def choose(self, share: Hashable = None) -> Id | None:
        """The next that is to leave, of all residents or of one share: a child before its parent. None: there is none.

        Those chosen leave together by `evict`, or stay as they were by `spare`; nothing else is to be called before.
        """
        victim = (self._policy if share is None else self._shares[share]).pop()
        if victim is not None:
            self._hold(victim)
            self._chosen.append(victim)
            self._lose_child(self._parent[victim])
        return victim

    def evict(self) -> list[Id]:
        """Those chosen are residents no more."""
        victims, self._chosen = self._chosen, []
        for victim in victims:
            del self._parent[victim]
            self._forget(victim, evicted=True)
        return victims

    def spare(self) -> None:
        """Those chosen stay."""
        while self._chosen:
            victim = self._chosen.pop()
            self._gain_child(self._parent[victim])
            self._offer(victim)

    def check(self, pins: Counter[Id], parents: Iterable[tuple[Id, Id]]) -> None:
        """InvariantError: residents, their parents or pins are not these."""
        expected = dict(parents)
        if expected != self._parent:
            raise InvariantError(f"the evictor knows {len(self._parent)} residents, there are {len(expected)}")
        if +self._pins != +pins:
            raise InvariantError(f"pins are {+self._pins}, leases ask for {+pins}")
        if +self._children != Counter(expected.values()):
            raise InvariantError("children are miscounted")

    def _policies(self, item: Id) -> tuple[EvictionPolicy[Id], ...]:
        own = self._share_of.get(item) if self._share_of else None
        return (self._policy,) if own is None else (self._policy, own)

    def _offer(self, item: Id) -> None:
        for policy in self._policies(item):
            policy.offer(item)

    def _hold(self, item: Id) -> None:
        for policy in self._policies(item):
            policy.hold(item)

    def _evictable(self, item: Id) -> bool:
        return item in self._parent and not self._pins[item] and not self._children[item]

    def _gain_child(self, parent: Id) -> None:
        if self._evictable(parent):
            self._hold(parent)
        self._children[parent] += 1

    def _lose_child(self, parent: Id) -> None:
        self._children[parent] -= 1
        if not self._children[parent]:
            del self._children[parent]
            if self._evictable(parent):
                self._offer(parent)

    def _forget(self, item: Id, *, evicted: bool) -> None:
        self._pins.pop(item, None)
        for policy in self._policies(item):
            policy.remove(item, evicted=evicted)
        self._share_of.pop(item, None)
