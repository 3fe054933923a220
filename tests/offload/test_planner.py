"""The planner's decisions, driven by hand against a real store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest

from kvferry.blocks import Geometry, GroupKind, GroupSpec, Tier
from kvferry.config import StoreOptions
from kvferry.connector.api import NO_BLOCK, RequestData, SchedulerOutput
from kvferry.offload.metadata import CopyJob, PartCopy, PassMetadata
from kvferry.offload.planner import Offer, Planner
from kvferry.store.keys import chunk_keys, root_key
from kvferry.store.store import Store
from kvferry.store.tier import ByteTier

BLOCK, CHUNK = 4, 16
OPTIONS = StoreOptions(load_deadline_seconds=1.0, async_load="never")
GEOMETRY = Geometry("weights", "layout", CHUNK, 1, (GroupSpec(GroupKind.FULL, (0,), 4096),))


@dataclass
class FakeRequest:
    request_id: int
    tokens: list[int]
    cache_salt: str | None = None
    lora_id: str | None = None
    num_connector_matched_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)

    def get_tokens(self, beam: int) -> list[int]:
        assert beam == 0
        return self.tokens


@dataclass
class Hand:
    """Plays the engine and the mover: whatever is planned is reported done at once."""

    store: Store
    planner: Planner
    next_block: int = 100

    def blocks_for(self, num_tokens: int) -> list[int]:
        count = -(-num_tokens // BLOCK)
        self.next_block += count
        return list(range(self.next_block - count, self.next_block))

    def admit(self, request: FakeRequest, num_pool_tokens: int = 0) -> int:
        """Match, take all of it, allocate."""
        matched = self.planner.match(request, num_pool_tokens).num_tokens
        request.num_connector_matched_tokens = matched
        request.block_ids = self.blocks_for(len(request.tokens))
        self.planner.allocated(request, [request.block_ids])
        return matched

    def first_pass(self, request: FakeRequest, num_scheduled: int, num_pool_tokens: int = 0) -> PassMetadata:
        data = RequestData(request.request_id, request.tokens, request.block_ids, num_pool_tokens, num_scheduled)
        return self.planner.plan(SchedulerOutput(new_requests=[data]))

    def later_pass(
        self, request: FakeRequest, computed: int, num_scheduled: int = 1, new_tokens: tuple[int, ...] = ()
    ) -> PassMetadata:
        request.tokens = [*request.tokens, *new_tokens]
        new_blocks = self.blocks_for(computed + num_scheduled - len(request.block_ids) * BLOCK)
        request.block_ids = [*request.block_ids, *new_blocks]
        data = RequestData(request.request_id, list(new_tokens), new_blocks, computed, num_scheduled)
        return self.planner.plan(SchedulerOutput(cached_requests=[data]))

    def finish_jobs(self, metadata: PassMetadata, *, ok: bool = True) -> None:
        for order in [*metadata.loads, *metadata.stores]:
            self.store.done(order.job.job_id, 0, ok)

    def keep(self, tokens: list[int], salt: str | None = None, lora: str | None = None) -> None:
        """A whole life of a request whose full chunks get stored."""
        request = FakeRequest(-1, tokens, salt, lora)
        matched = self.admit(request)
        self.finish_jobs(self.first_pass(request, len(tokens) - matched))
        self.planner.finished(request.request_id)

    def num_leases(self) -> float:
        return self.store.stats()["leases"]


@pytest.fixture
def hand(tmp_path: Path) -> Iterator[Hand]:
    store = Store(StoreOptions(chunk_tokens=CHUNK, l1_size_gb=0.002, arena_dir=str(tmp_path / "arena")))
    store.register("engine", 0, GEOMETRY)
    planner = Planner(store, GEOMETRY, BLOCK, OPTIONS)
    yield Hand(store, planner)
    planner.close()
    assert store.stats()["leases"] == 0
    store.check()
    store.close()


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [(i * 7 + seed * 1001) % 5000 for i in range(num_tokens)]


def copies(job: CopyJob) -> list[tuple[int, list[int]]]:
    return [(part.first_block, part.block_ids) for part in job.parts]


def test_a_prefill_saves_its_full_chunks_from_their_blocks(hand: Hand) -> None:
    request = FakeRequest(1, prompt(40))
    assert hand.admit(request) == 0
    metadata = hand.first_pass(request, 40)
    (order,) = metadata.stores
    assert order.request_id == 1
    assert copies(order.job) == [(0, request.block_ids[0:4]), (0, request.block_ids[4:8])]
    assert not metadata.loads
    hand.finish_jobs(metadata)
    assert hand.planner.match(FakeRequest(2, prompt(40)), 0).num_tokens == 32


def test_a_request_that_waits_for_room_keeps_its_offer(hand: Hand) -> None:
    hand.keep(prompt(40))
    request = FakeRequest(1, prompt(40))
    offer = hand.planner.match(request, 0)
    matched = hand.store.stats()["matched_chunks_memory"]
    assert hand.planner.match(request, 0) == offer == Offer(32)
    assert hand.store.stats()["matched_chunks_memory"] == matched
    assert hand.planner.match(request, 16) == Offer(16)
    assert hand.planner.match(request, 16, may_load=False) == Offer()
    assert hand.num_leases() == 0


def test_a_preempted_request_is_matched_with_what_it_has_generated(hand: Hand) -> None:
    request = FakeRequest(1, prompt(24))
    hand.admit(request)
    hand.finish_jobs(hand.first_pass(request, 24))
    for position in range(24, 33):
        hand.finish_jobs(hand.later_pass(request, position, new_tokens=(9,)))
    assert hand.admit(request) == 32
    metadata = hand.first_pass(request, 1)
    assert [order.request_id for order in metadata.loads] == [1]
    hand.finish_jobs(metadata)


def test_an_engine_whose_weights_changed_has_nothing_in_common_with_anybody(hand: Hand) -> None:
    hand.keep(prompt(40))
    request = FakeRequest(1, prompt(40))
    hand.admit(request)
    hand.finish_jobs(hand.first_pass(request, 8))
    hand.planner.disown()
    assert not hand.later_pass(request, 8, 32).stores, "computed by the old weights"
    assert hand.planner.finished(1) is False
    assert hand.planner.match(FakeRequest(2, prompt(40)), 0) == Offer()
    hand.keep(prompt(40))
    assert hand.planner.match(FakeRequest(2, prompt(40)), 0) == Offer(32)
    other = Planner(hand.store, GEOMETRY, BLOCK, OPTIONS)
    assert other.match(FakeRequest(3, prompt(33, seed=1)), 0) == Offer()
    other.close()


def test_a_chunked_prefill_saves_each_chunk_in_the_pass_that_completes_it(hand: Hand) -> None:
    request = FakeRequest(1, prompt(40))
    hand.admit(request)
    saved = []
    for start, size in ((0, 10), (10, 10), (20, 11), (31, 9)):
        metadata = hand.first_pass(request, size) if start == 0 else hand.later_pass(request, start, size)
        saved.append([copies(order.job) for order in metadata.stores])
        hand.finish_jobs(metadata)
    assert saved == [[], [[(0, request.block_ids[0:4])]], [], [[(0, request.block_ids[4:8])]]]


def test_saves_can_be_planned_with_the_next_pass(hand: Hand) -> None:
    hand.planner.saves_late = True
    request = FakeRequest(1, prompt(32))
    hand.admit(request)
    assert not hand.first_pass(request, 20).stores
    metadata = hand.later_pass(request, 20, 12)
    assert [copies(order.job) for order in metadata.stores] == [[(0, request.block_ids[0:4])]]
    hand.finish_jobs(metadata)
    assert hand.planner.finished(1), "its blocks are still to be saved"
    metadata = hand.planner.plan(SchedulerOutput())
    assert [copies(order.job) for order in metadata.stores] == [[(0, request.block_ids[4:8])]]
    hand.finish_jobs(metadata)
    assert not hand.planner.plan(SchedulerOutput()).stores


def test_late_saves_of_blocks_that_are_gone_are_given_up(hand: Hand) -> None:
    hand.planner.saves_late = True
    request = FakeRequest(1, prompt(32))
    for how in ("preempted", "begun anew", "disowned"):
        hand.admit(request)
        assert not hand.first_pass(request, 32).stores
        if how == "begun anew":
            hand.admit(request)
        elif how == "disowned":
            hand.planner.disown()
        assert not hand.planner.plan(SchedulerOutput(), preempted=[1] * (how == "preempted")).stores
    hand.admit(request)
    hand.first_pass(request, 15)
    assert not hand.planner.finished(1), "it has nothing to save"


def test_decode_saves_a_chunk_with_the_token_that_fills_it(hand: Hand) -> None:
    request = FakeRequest(1, prompt(14))
    hand.admit(request)
    assert not hand.first_pass(request, 14).stores
    assert not hand.later_pass(request, 14, new_tokens=(77,)).stores
    metadata = hand.later_pass(request, 15, new_tokens=(78,))
    (order,) = metadata.stores
    assert copies(order.job) == [(0, request.block_ids)]
    hand.finish_jobs(metadata)
    assert not hand.later_pass(request, 16, new_tokens=(79,)).stores
    assert hand.planner.match(FakeRequest(2, [*prompt(14), 77, 78, 5]), 0).num_tokens == CHUNK


@pytest.mark.parametrize(
    ("num_tokens", "num_pool_tokens", "offered"),
    [
        (31, 0, 16),
        (32, 0, 28),
        (33, 0, 32),
        (100, 0, 32),
        (40, 8, 24),
        (40, 16, 16),
        (40, 28, 4),
        (40, 32, 0),
        (40, 36, 0),
        (32, 28, 0),
        (40, 10, 0),
        (3, 0, 0),
    ],
)
def test_offers_whole_blocks_beyond_the_pool_and_never_the_last_token(
    hand: Hand, num_tokens: int, num_pool_tokens: int, offered: int
) -> None:
    hand.keep(prompt(33))
    request = FakeRequest(1, (prompt(33)[:32] + prompt(80, seed=9))[:num_tokens])
    assert hand.planner.match(request, num_pool_tokens).num_tokens == offered
    assert hand.num_leases() == (1 if offered else 0)


def test_a_load_fills_only_the_blocks_that_the_pool_lacks(hand: Hand) -> None:
    hand.keep(prompt(48))
    request = FakeRequest(1, prompt(48))
    assert hand.admit(request, num_pool_tokens=8) == 36
    metadata = hand.first_pass(request, 4, num_pool_tokens=8)
    (order,) = metadata.loads
    blocks = request.block_ids
    assert copies(order.job) == [(2, blocks[2:4]), (0, blocks[4:8]), (0, blocks[8:11])]
    assert not metadata.stores
    hand.finish_jobs(metadata)
    assert hand.planner.meter.snapshot()["load_tokens_memory"] == 36


def test_chunks_that_came_from_the_pool_are_saved_if_the_store_lacks_them(hand: Hand) -> None:
    request = FakeRequest(1, prompt(40))
    hand.admit(request, num_pool_tokens=36)
    (order,) = hand.first_pass(request, 4, num_pool_tokens=36).stores
    assert copies(order.job) == [(0, request.block_ids[0:4]), (0, request.block_ids[4:8])]
    hand.store.done(order.job.job_id, 0, ok=True)


def test_salt_and_adapter_keep_requests_apart(hand: Hand) -> None:
    hand.keep(prompt(33), salt="a")
    hand.keep(prompt(33), lora="b")
    others = [(None, None), ("b", None), (None, "a"), ("a", "b"), ("", None)]
    assert all(hand.planner.match(FakeRequest(1, prompt(33), *other), 0) == Offer() for other in others)
    assert hand.planner.match(FakeRequest(1, prompt(33), "a"), 0).num_tokens == 32
    assert hand.planner.match(FakeRequest(1, prompt(33), None, "b"), 0).num_tokens == 32


@pytest.mark.parametrize("end", ["finished", "matched again", "closed", "forgotten"])
def test_a_match_that_is_never_taken_gives_its_lease_back(
    hand: Hand, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    hand.keep(prompt(33))
    assert hand.planner.match(FakeRequest(1, prompt(33)), 0).num_tokens == 32
    assert hand.num_leases() == 1
    if end == "finished":
        hand.planner.finished(1)
    elif end == "matched again":
        hand.planner.match(FakeRequest(1, prompt(33, seed=5)), 0)
    elif end == "closed":
        hand.planner.close()
    else:
        monkeypatch.setattr("kvferry.offload.planner._MOST_UNALLOCATED", 1)
        hand.planner.match(FakeRequest(2, prompt(33, seed=5)), 0)
    assert hand.num_leases() == 0


def test_a_request_that_ends_between_allocation_and_pass_gives_its_lease_back(hand: Hand) -> None:
    hand.keep(prompt(33))
    request = FakeRequest(1, prompt(33))
    hand.admit(request)
    hand.planner.finished(1)
    assert hand.num_leases() == 0
    assert hand.first_pass(request, 1) == PassMetadata()


@pytest.mark.parametrize("num_taken", [0, 16])
def test_a_match_that_is_not_taken_whole_is_no_load(hand: Hand, num_taken: int) -> None:
    """Taking nothing is the engine's right; taking a part is not in the API, and ends as a failed load."""
    hand.keep(prompt(33))
    request = FakeRequest(1, prompt(33))
    hand.planner.match(request, 0)
    request.num_connector_matched_tokens = num_taken
    request.block_ids = hand.blocks_for(33)
    hand.planner.allocated(request, [request.block_ids])
    assert hand.num_leases() == 0
    metadata = hand.first_pass(request, 33 - num_taken)
    assert metadata.lost_loads == ([1] if num_taken else [])
    assert not metadata.loads
    assert not metadata.stores


def test_a_pool_that_changed_since_the_match_loses_the_load(hand: Hand) -> None:
    """Nor is anything saved: until the engine puts the request back, it computes on tokens that were not loaded."""
    hand.keep(prompt(17))
    request = FakeRequest(1, prompt(16) + prompt(40, seed=4))
    assert hand.admit(request, num_pool_tokens=8) == 8
    metadata = hand.first_pass(request, 40, num_pool_tokens=4)
    assert metadata == PassMetadata(lost_loads=[1])
    assert hand.num_leases() == 0
    metadata = hand.later_pass(request, computed=4, num_scheduled=52)
    assert [copies(order.job) for order in metadata.stores] == [
        [(0, request.block_ids[4:8]), (0, request.block_ids[8:12])]
    ]
    hand.finish_jobs(metadata)


def test_a_promise_that_was_forgotten_is_a_failed_load(hand: Hand) -> None:
    request = FakeRequest(1, prompt(33), num_connector_matched_tokens=32)
    hand.planner.allocated(request, [hand.blocks_for(33)])
    assert hand.planner.plan(SchedulerOutput()).lost_loads == [1]
    assert hand.planner.plan(SchedulerOutput()).lost_loads == []


def test_a_request_put_back_by_a_failed_load_is_saved_when_computed(hand: Hand) -> None:
    hand.keep(prompt(33))
    request = FakeRequest(1, prompt(50))
    assert hand.admit(request) == 32
    metadata = hand.first_pass(request, 18)
    assert [part.first_block for order in metadata.stores for part in order.job.parts] == [0]
    hand.finish_jobs(metadata, ok=False)
    metadata = hand.later_pass(request, computed=0, num_scheduled=50)
    (order,) = metadata.stores
    assert [part.block_ids for part in order.job.parts] == [request.block_ids[8:12]]
    hand.finish_jobs(metadata)
    assert hand.planner.match(FakeRequest(2, prompt(50)), 0).num_tokens == 48


def test_after_a_missed_pass_a_request_is_left_alone(hand: Hand) -> None:
    """A token that was never told would shift all later ones, and so give a chunk another chunk's key."""
    request = FakeRequest(1, prompt(14))
    hand.admit(request)
    hand.first_pass(request, 14)
    request.tokens = [*request.tokens, 77]  # computed in a pass whose plan broke off
    for computed in range(15, 40):
        assert not hand.later_pass(request, computed, new_tokens=(78,)).stores
    assert hand.planner.meter.snapshot()["requests_not_followed"] == 1


def test_a_request_that_is_left_alone_waits_for_its_saves(hand: Hand) -> None:
    request = FakeRequest(1, prompt(CHUNK))
    hand.admit(request)
    (order,) = hand.first_pass(request, CHUNK).stores
    request.tokens = [*request.tokens, 77]  # computed in a pass whose plan broke off
    for computed in range(CHUNK + 1, 2 * CHUNK):
        assert not hand.later_pass(request, computed, new_tokens=(78,)).stores
    assert hand.planner.meter.snapshot()["requests_not_followed"] == 1
    assert hand.planner.finished(request.request_id), "its blocks are being saved"
    hand.store.done(order.job.job_id, 0, ok=True)


def test_blocks_that_do_not_exist_are_never_saved(hand: Hand) -> None:
    request = FakeRequest(1, prompt(40))
    hand.admit(request)
    request.block_ids = [NO_BLOCK, *request.block_ids[1:]]
    assert not hand.first_pass(request, 40).stores


def test_chunks_without_room_are_saved_once_there_is_some(hand: Hand, tmp_path: Path) -> None:
    big = replace(GEOMETRY, groups=(GroupSpec(GroupKind.FULL, (0,), 300_000),))
    store = Store(StoreOptions(chunk_tokens=CHUNK, l1_size_gb=0.001, arena_dir=str(tmp_path / "small")))
    store.register("engine", 0, big)
    small = Hand(store, Planner(store, big, BLOCK, OPTIONS))
    small.keep(prompt(33))
    request = FakeRequest(1, prompt(33))
    assert small.admit(request) == 32
    loading = small.first_pass(request, 1)

    other = FakeRequest(2, prompt(80, seed=3))
    small.admit(other)
    first = small.first_pass(other, 79)
    num_first = sum(len(order.job.parts) for order in first.stores)
    assert num_first < 4, "the leased chunks leave no room for all"
    small.finish_jobs(first)
    small.finish_jobs(loading)
    small.planner.finished(1)

    second = small.later_pass(other, 79, 1)
    num_second = sum(len(order.job.parts) for order in second.stores)
    assert num_second > 0
    small.finish_jobs(second)
    store.check()
    small.planner.close()
    store.close()


class StuckStore:
    """A backend that has everything and hands over nothing until `release` is set; then it has nothing."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def put(self, name: bytes, view: memoryview) -> None:
        pass

    def get_into(self, name: bytes, view: memoryview) -> bool:
        assert self.release.wait(60)
        return False

    def contains(self, names: Sequence[bytes]) -> list[bool]:
        return [True] * len(names)

    def delete(self, names: Sequence[bytes]) -> None:
        pass

    def touch(self, names: Sequence[bytes]) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("answers", [False, True])
def test_a_lower_tier_that_is_slow_or_empty_leaves_what_is_in_memory(tmp_path: Path, answers: bool) -> None:
    backend = StuckStore()
    options = StoreOptions(
        chunk_tokens=CHUNK, l1_size_gb=0.002, arena_dir=str(tmp_path / "arena"), load_deadline_seconds=0.05
    )
    store = Store(options, tiers=[ByteTier(backend, Tier.DISK)])
    store.register("engine", 0, GEOMETRY)
    waiting = StoreOptions(async_load="never", load_deadline_seconds=60 if answers else 0.05)
    planner = Planner(store, GEOMETRY, BLOCK, waiting)
    hand = Hand(store, planner)
    job = store.begin_store(GEOMETRY, planner_keys(33), 0)
    assert job is not None
    store.done(job.job_id, 0, ok=True)
    if answers:
        backend.release.set()

    started = time.monotonic()
    request = FakeRequest(1, prompt(100))
    assert hand.admit(request) == 32
    assert time.monotonic() - started < 30
    metadata = hand.first_pass(request, 68)
    hand.finish_jobs(metadata)
    assert hand.num_leases() == 0
    backend.release.set()
    planner.close()
    store.close()


def planner_keys(num_tokens: int) -> list[bytes]:
    return chunk_keys(root_key(GEOMETRY), prompt(num_tokens), CHUNK)


def test_metadata_survives_msgpack(hand: Hand) -> None:
    hand.keep(prompt(33))
    request = FakeRequest(1, prompt(50))
    hand.admit(request)
    metadata = hand.first_pass(request, 18)
    assert metadata.loads
    assert metadata.stores
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(metadata), type=PassMetadata) == metadata
    assert isinstance(metadata.loads[0].job.parts[0], PartCopy)
    hand.finish_jobs(metadata)


def test_states_are_saved_and_loaded_where_a_pass_ends_with_a_chunk(tmp_path: Path) -> None:
    groups = (*GEOMETRY.groups, GroupSpec(GroupKind.STATE, (1,), 8192))
    store = Store(StoreOptions(chunk_tokens=CHUNK, l1_size_gb=0.002, arena_dir=str(tmp_path)))
    geometry = replace(GEOMETRY, groups=groups)
    store.register("engine", 0, geometry)
    planner = Planner(store, geometry, BLOCK, OPTIONS)
    full, states = list(range(100, 110)), [NO_BLOCK] * 7 + [207, NO_BLOCK, 209]

    def run(request: FakeRequest, ends: Sequence[int], start: int = 0) -> list[list[PartCopy]]:
        """The copies of each pass: of its loads, and of its saves."""
        planned, told = [], RequestData(request.request_id, request.tokens, [], 0, 0)
        told.new_block_ids_by_layer_group = [full, states]
        for end in ends:
            told.computed_position, told.num_scheduled_tokens = start, end - start
            output = SchedulerOutput(new_requests=[told]) if not planned else SchedulerOutput(cached_requests=[told])
            metadata = planner.plan(output)
            orders = [*metadata.loads, *metadata.stores]
            planned.append([part for order in orders for part in order.job.parts])
            for order in orders:
                store.done(order.job.job_id, 0, ok=True)
            told = RequestData(request.request_id, [], [], 0, 0, new_block_ids_by_layer_group=[[], []])
            start = end
        planner.finished(request.request_id)
        return planned

    first = FakeRequest(1, prompt(40))
    assert planner.match(first, 0) == Offer()
    planner.allocated(first, [full, states])
    # At 16 the engine keeps no state, at 24 no chunk ends.
    *without, saved, last = run(first, [16, 24, 32, 40])
    assert without == [[], []]
    assert last == []
    assert [(part.group, part.first_block, part.block_ids) for part in saved] == [
        (0, 0, full[0:4]),
        (0, 0, full[4:8]),
        (1, 0, [207]),
    ]
    again = FakeRequest(2, prompt(40))
    assert planner.match(again, 16).num_tokens == 16
    again.num_connector_matched_tokens = 16
    planner.allocated(again, [full, states])
    (loaded,) = run(again, [24], start=16)
    assert [(part.group, part.first_block, part.block_ids) for part in loaded] == [(0, 0, full[4:8]), (1, 0, [207])]
    planner.close()
    store.check()
    store.close()
