"""Eviction against a model: nothing pinned, no parent before its children, all or nothing, and the right order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from kvferry.errors import InvariantError
from kvferry.store.eviction import LRU, S3FIFO, EvictionPolicy, Evictor

ROOT = -1


def evict(evictor: Evictor[int], num: int, share: str | None = None) -> list[int] | None:
    """The next `num`, or None and nothing."""
    for _ in range(num):
        if evictor.choose(share) is None:
            evictor.spare()
            return None
    return evictor.evict()


class EvictorMachine(RuleBasedStateMachine):
    """Random life of an evictor beside plain dicts."""

    items: Bundle[int] = Bundle("items")

    def __init__(self) -> None:
        super().__init__()
        self.evictor: Evictor[int] = Evictor(self.make_policy(), ["odd"])
        self.parents: dict[int, int] = {}
        self.pins: Counter[int] = Counter()
        self.used: dict[int, int] = {}
        self.time = 0

    def make_policy(self) -> EvictionPolicy[int]:
        return LRU()

    def evictable(self) -> set[int]:
        return {item for item in self.parents if not self.pins[item] and item not in self.parents.values()}

    @rule(target=items, item=st.integers(0, 40), parent=st.integers(-1, 40))
    def add(self, item: int, parent: int) -> int:
        if item not in self.parents and parent < item:
            self.evictor.add(item, parent, "odd" if item % 2 else None)
            self.parents[item] = parent
            self.pins[item] = 1
            self.use(item)
        return item

    def use(self, item: int) -> None:
        self.time += 1
        self.used[item] = self.time

    @rule(item=items)
    def touch(self, item: int) -> None:
        if item in self.parents:
            self.evictor.touch(item)
            self.use(item)

    @rule(item=items)
    def pin(self, item: int) -> None:
        if item in self.parents:
            self.evictor.pin(item)
            self.pins[item] += 1

    @rule(item=items)
    def unpin(self, item: int) -> None:
        if self.pins[item]:
            self.evictor.unpin(item)
            self.pins[item] -= 1

    @rule(item=consumes(items))
    def remove(self, item: int) -> None:
        if item in self.parents:
            self.evictor.remove(item)
            self.forget(item)

    def forget(self, item: int) -> None:
        del self.parents[item], self.pins[item]

    @precondition(lambda self: self.parents)
    @rule(num=st.integers(1, 12), share=st.sampled_from([None, None, "odd"]))
    def evict(self, num: int, share: str | None) -> None:
        before = dict(self.parents)
        victims = evict(self.evictor, num, share)
        if victims is None:
            removable = 0
            while leaves := self.of_share(share):
                removable += len(leaves)
                for leaf in leaves:
                    del self.parents[leaf]
            assert removable < num, "there was enough to evict"
            self.parents = before
            return
        assert len(victims) == num
        for victim in victims:
            assert victim in self.of_share(share)
            self.check_order(victim, share)
            self.forget(victim)

    def of_share(self, share: str | None) -> set[int]:
        return {item for item in self.evictable() if share is None or item % 2}

    @rule(num=st.integers(1, 5), share=st.sampled_from([None, "odd"]))
    def choose_and_spare(self, num: int, share: str | None) -> None:
        for _ in range(num):
            self.evictor.choose(share)
        self.evictor.spare()

    def check_order(self, victim: int, share: str | None) -> None:
        assert self.used[victim] == min(self.used[item] for item in self.of_share(share))

    @invariant()
    def agrees(self) -> None:
        self.evictor.check(self.pins, self.parents.items())
        assert len(self.evictor) == len(self.parents)


class S3FIFOMachine(EvictorMachine):
    def make_policy(self) -> EvictionPolicy[int]:
        return S3FIFO()

    def check_order(self, victim: int, share: str | None) -> None:
        """Its order depends on history; what it may not do is checked all the same."""


TestLRU = EvictorMachine.TestCase
TestS3FIFO = S3FIFOMachine.TestCase


def chain(evictor: Evictor[int], items: range) -> None:
    for item in items:
        evictor.add(item, item - 1 if item > items.start else ROOT)
    for item in items:
        evictor.unpin(item)


@pytest.mark.parametrize("policy", [LRU[int](), S3FIFO[int]()])
def test_the_coldest_chain_leaves_whole_from_its_end(policy: EvictionPolicy[int]) -> None:
    evictor = Evictor(policy)
    chain(evictor, range(5))
    chain(evictor, range(10, 15))
    assert evict(evictor, 5) == [4, 3, 2, 1, 0]


def test_s3_fifo_keeps_what_is_used_through_a_scan() -> None:
    evictor: Evictor[int] = Evictor(S3FIFO())
    for item in range(10):
        chain(evictor, range(item * 100, item * 100 + 1))
    for _ in range(2):
        for item in range(5):
            evictor.touch(item * 100)
    for scanned in range(2000, 2200):
        chain(evictor, range(scanned, scanned + 1))
        assert evict(evictor, 1) is not None
    assert all(item * 100 in evictor for item in range(5))
    assert not any(item * 100 in evictor for item in range(5, 10))


def test_s3_fifo_lets_what_comes_back_stay() -> None:
    evictor: Evictor[int] = Evictor(S3FIFO())
    for item in range(10):
        chain(evictor, range(item * 100, item * 100 + 1))
    assert evict(evictor, 1) == [0]
    chain(evictor, range(1))
    assert evict(evictor, 9) == [item * 100 for item in range(1, 10)]
    assert 0 in evictor


def test_lru_does_not_slow_down_with_what_is_held() -> None:
    """Work per eviction, counted in heap entries, does not grow with pinned ids or touches."""
    policy: LRU[int] = LRU()
    evictor = Evictor(policy)
    chain(evictor, range(1000))
    for _ in range(20):
        for item in range(0, 1000, 7):
            evictor.touch(item)
    assert len(policy._offered._heap) < 100
    chain(evictor, range(5000, 5001))
    for _ in range(10_000):
        evictor.touch(5000)
    assert len(policy._offered._heap) < 100


def test_check_finds_a_lost_pin() -> None:
    evictor: Evictor[int] = Evictor(LRU())
    chain(evictor, range(3))
    with pytest.raises(InvariantError, match="leases ask for"):
        evictor.check(Counter({1: 1}), [(0, ROOT), (1, 0), (2, 1)])
    with pytest.raises(InvariantError, match="knows 3 residents"):
        evictor.check(Counter(), [(0, ROOT), (1, 0)])
