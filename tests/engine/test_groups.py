"""The pools' books: references, reuse, windows and order, against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvferry.blocks import GroupKind
from kvferry.connector.api import NO_BLOCK
from kvferry.engine.block_manager import BlockManager, token_bytes
from kvferry.engine.groups import (
    GroupedBlocks,
    LayerGroup,
    PrefixMatch,
    Snapshots,
    extend_hashes,
    group_layers,
    place_of_state,
)
from kvferry.errors import InvariantError

SIZE = 2
TEXTS = ([0, 1, 1, 0] * 5, [0, 1, 1, 0, 1, 1] * 4)
"""Requests are beginnings of these, so that many share blocks."""


class Held:
    """A request of the model: its tokens, its blocks, the tokens that are computed and the most it may grow to."""

    def __init__(self, root: bytes, text: list[int], num_tokens: int, block_ids: list[list[int]]) -> None:
        self.root, self.text, self.tokens, self.block_ids = root, text, text[:num_tokens], block_ids
        self.max_tokens = num_tokens
        self.hashes: list[bytes] = []
        self.num_computed = self.num_committed = 0

    def prefix(self, end: int) -> tuple[int, ...]:
        return (*self.root, *self.tokens[:end])


class GroupedBlocksMachine(RuleBasedStateMachine):
    """Requests come, load, are computed in passes, grow and go. What every block holds is known from outside, so a
    wrong reuse shows, and a write to what others share."""

    groups: tuple[LayerGroup, ...] = (LayerGroup((0,)), LayerGroup((1, 2), window_tokens=3))
    num_blocks = 10

    def __init__(self) -> None:
        super().__init__()
        self.blocks = GroupedBlocks(self.groups, self.num_blocks, SIZE)
        self.written: dict[tuple[int, int], tuple[int, ...]] = {}
        self.held: list[Held] = []

    @rule(
        text=st.sampled_from(TEXTS),
        num_tokens=st.integers(1, 12),
        growth=st.integers(0, 6),
        root=st.sampled_from([b"a", b"a", b"a", b"b"]),
        num_loaded=st.sampled_from([0, 0, 1, 2, 3, -3]),
    )
    def admit(self, text: list[int], num_tokens: int, growth: int, root: bytes, num_loaded: int) -> None:
        """num_loaded: blocks; negative where the load fails."""
        tokens, load_fails = text[:num_tokens], num_loaded < 0
        hashes: list[bytes] = []
        extend_hashes(hashes, tokens, root, SIZE)
        match = self.blocks.match_prefix(hashes, tokens, len(tokens) - 1)
        start = match.num_blocks * SIZE
        assert start < len(tokens)
        needs = [self.blocks.still_needs(other.block_ids, other.max_tokens) for other in self.held]
        promised = [sum(of_group) for of_group in zip(*needs, strict=True)] or [0] * len(self.groups)
        if not self.blocks.fits(match, len(tokens), len(tokens) + growth, promised):
            return
        end_of_load = min(match.num_blocks + abs(num_loaded), (len(tokens) - 1) // SIZE) * SIZE
        block_ids = self.blocks.allocate_prompt(match, len(tokens), end_of_load - start)
        request = Held(root, text, num_tokens, block_ids)
        request.max_tokens += growth
        for group, of_group in enumerate(block_ids):
            assert len(of_group) == self.blocks.num_blocks_for(len(tokens))
            for index in range(match.num_blocks, len(of_group)):
                if of_group[index] != NO_BLOCK:
                    is_loaded = (index + 1) * SIZE <= end_of_load and not load_fails
                    self.written[group, of_group[index]] = request.prefix((index + 1) * SIZE) if is_loaded else ()
        request.num_committed = match.num_blocks
        request.num_computed = start if load_fails else end_of_load
        self.held.append(request)

    @rule(budget=st.integers(1, 7), waits=st.integers(0, 3))
    def run_pass(self, budget: int, waits: int) -> None:
        """All requests but one compute, blocks being taken for all of them before any is given back."""
        passes = []
        for number, request in enumerate(self.held):
            if request.num_computed == len(request.tokens) < request.max_tokens:
                request.tokens.append(request.text[len(request.tokens)])
            if number != waits and request.num_computed < len(request.tokens):
                start = request.num_computed
                most = min(budget, self.blocks.tokens_to_snapshot(start) or budget)
                end = min(start + most, len(request.tokens))
                self.blocks.grow(request.block_ids, end)
                passes.append((request, range(start, end)))
        for request, computed in passes:
            for group, of_group in enumerate(request.block_ids):
                if self.groups[group].kind is GroupKind.STATE:
                    self.compute_state(request, group, computed)
                else:
                    self.compute_kv(request, group, of_group, computed)
        for request, computed in passes:
            self.update(request, computed)

    def compute_kv(self, request: Held, group: int, of_group: list[int], computed: range) -> None:
        for index in range(self.groups[group].first_needed_block(computed.start, SIZE), len(of_group)):
            end = min((index + 1) * SIZE, computed.start)
            if index * SIZE < end:
                assert self.written[group, of_group[index]][: len(request.root) + end] == request.prefix(end)
            if index * SIZE < computed.stop and computed.start < (index + 1) * SIZE:
                self.write(request, group, of_group[index], min((index + 1) * SIZE, computed.stop))

    def compute_state(self, request: Held, group: int, computed: range) -> None:
        if computed.start > 0:
            place = place_of_state(request.block_ids[group], computed.start, SIZE)
            assert self.written[group, place] == request.prefix(computed.start)
        self.write(request, group, place_of_state(request.block_ids[group], computed.stop, SIZE), computed.stop)

    def write(self, request: Held, group: int, block_id: int, end: int) -> None:
        pool = self.blocks.pools[group]
        assert pool._ref_counts[block_id] == 1
        assert block_id not in pool._contents
        self.written[group, block_id] = request.prefix(end)

    def update(self, request: Held, computed: range) -> None:
        self.blocks.release_behind(request.block_ids, computed.start)
        extend_hashes(request.hashes, request.tokens, request.root, SIZE)
        for index in range(request.num_committed, computed.stop // SIZE):
            content = token_bytes(request.tokens[index * SIZE : (index + 1) * SIZE])
            self.blocks.commit(request.block_ids, index, request.hashes[index], content, computed)
        request.num_committed = max(request.num_committed, computed.stop // SIZE)
        request.num_computed = computed.stop
        self.blocks.release_behind(request.block_ids, computed.stop)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9))
    def release(self, which: int) -> None:
        self.blocks.release(self.held.pop(which % len(self.held)).block_ids)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 9))
    def forget(self, which: int) -> None:
        request = self.held[which % len(self.held)]
        self.blocks.forget(request.block_ids, 0, len(request.block_ids[0]))

    @invariant()
    def books_agree(self) -> None:
        self.blocks.check([request.block_ids for request in self.held])
        for request in self.held:
            for group, of_group in zip(self.groups, request.block_ids, strict=True):
                live = [index for index, block_id in enumerate(of_group) if block_id != NO_BLOCK]
                if request.num_computed == len(request.tokens):
                    most = 1 if group.kind is GroupKind.STATE else group.most_live_blocks(request.num_computed, SIZE)
                    assert len(live) <= most

    @invariant()
    def what_is_shared_is_what_its_hash_says(self) -> None:
        for group, pool in enumerate(self.blocks.pools):
            for block_id, (_, content) in pool._contents.items():
                assert token_bytes(self.written[group, block_id][-SIZE:]) == content


class WindowsAlone(GroupedBlocksMachine):
    groups = (LayerGroup((0,), window_tokens=2),)
    num_blocks = 4


class StatesBesideAttention(GroupedBlocksMachine):
    groups = (
        LayerGroup((0, 2), snapshots=Snapshots(interval_tokens=2 * SIZE, num_blocks=5)),
        LayerGroup((1,)),
        LayerGroup((3,), window_tokens=3),
    )


for machine in (GroupedBlocksMachine, WindowsAlone, StatesBesideAttention):
    machine.TestCase.settings = settings(max_examples=40)
TestGroupedBlocks = GroupedBlocksMachine.TestCase
TestWindowsAlone = WindowsAlone.TestCase
TestStatesBesideAttention = StatesBesideAttention.TestCase


def commit_all(blocks: GroupedBlocks, tokens: list[int]) -> tuple[list[list[int]], list[bytes]]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, b"", SIZE)
    block_ids = blocks.allocate_prompt(PrefixMatch(0, ([],) * len(blocks.groups)), len(tokens))
    for index in range(len(tokens) // SIZE):
        content = token_bytes(tokens[index * SIZE : (index + 1) * SIZE])
        blocks.commit(block_ids, index, hashes[index], content, range(len(tokens)))
    return block_ids, hashes


def test_a_block_that_windows_share_is_free_after_the_last_of_them_has_passed_it() -> None:
    """So what two requests need until then must fit beside it, or one of them could not go on."""
    blocks = GroupedBlocks([LayerGroup((0,), window_tokens=2)], 3, SIZE)
    first, hashes = commit_all(blocks, [0, 1, 0])
    match = blocks.match_prefix(hashes, [0, 1, 1], 2)
    assert match.block_ids == ([first[0][0]],)
    assert not blocks.fits(match, 3, 8, blocks.still_needs(first, 8))
    larger = GroupedBlocks([LayerGroup((0,), window_tokens=2)], 4, SIZE)
    first, hashes = commit_all(larger, [0, 1, 0])
    match = larger.match_prefix(hashes, [0, 1, 1], 2)
    assert larger.fits(match, 3, 8, larger.still_needs(first, 8))


def test_states_stand_where_they_are_kept_where_a_load_ends_and_at_the_end() -> None:
    group = LayerGroup((0,), snapshots=Snapshots(interval_tokens=4 * SIZE, num_blocks=9))
    assert group.prompt_blocks(0, 25, SIZE) == [3, 7, 11, 12]
    assert group.prompt_blocks(0, 25, SIZE, end_of_load=10) == [3, 4, 7, 11, 12]
    assert group.prompt_blocks(16, 25, SIZE) == [7, 11, 12]
    assert group.prompt_blocks(24, 25, SIZE) == [11, 12]
    assert place_of_state([5, NO_BLOCK, NO_BLOCK, 6], 2, SIZE) == 5
    assert place_of_state([5, NO_BLOCK, NO_BLOCK, 6], 3, SIZE) == 6


def one_group(num_blocks: int) -> GroupedBlocks:
    return GroupedBlocks([LayerGroup((0,))], num_blocks, SIZE)


def test_layers_of_equal_windows_form_a_group() -> None:
    assert group_layers([16, 16, None, 16, 8]) == (
        LayerGroup((0, 1, 3), 16),
        LayerGroup((2,)),
        LayerGroup((4,), 8),
    )
    snapshots = Snapshots(interval_tokens=16, num_blocks=4)
    assert group_layers([None, None, 8, None], {0, 3}, snapshots) == (
        LayerGroup((0, 3), snapshots=snapshots),
        LayerGroup((1,)),
        LayerGroup((2,), 8),
    )


def test_equal_hash_with_other_tokens_is_no_match() -> None:
    pool = BlockManager(2)
    (block_id,) = pool.allocate(1)
    pool.commit(block_id, b"same", token_bytes([1, 2]))
    assert pool.find(b"same", token_bytes([1, 2])) == block_id
    assert pool.find(b"same", token_bytes([1, 9])) == NO_BLOCK


def test_the_end_of_a_prefix_is_given_away_before_its_beginning() -> None:
    blocks = one_group(4)
    tokens = [1, 2, 3, 4, 5, 6, 0]
    (first,), hashes = commit_all(blocks, tokens[:6])
    blocks.release([first])
    assert blocks.pools[0].allocate(2) == [3, first[2]]
    assert blocks.match_prefix(hashes, tokens, 6).block_ids == (first[:2],)


def test_empty_blocks_are_given_away_before_reusable_ones() -> None:
    blocks = one_group(3)
    (kept,), _ = commit_all(blocks, [1, 2])
    blocks.release([kept])
    assert blocks.pools[0].allocate(2) == [1, 2]


def test_a_reference_that_nobody_holds_is_found() -> None:
    blocks = one_group(3)
    block_ids, _ = commit_all(blocks, [1, 2])
    blocks.check([block_ids])
    with pytest.raises(InvariantError, match="1 references on blocks, 0 held by requests"):
        blocks.check([])
