"""The pools' books: references, reuse, windows and order, against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from kvferry.connector.api import NO_BLOCK
from kvferry.engine.block_manager import BlockManager, token_bytes
from kvferry.engine.groups import GroupedBlocks, LayerGroup, PrefixMatch, extend_hashes, group_layers
from kvferry.errors import InvariantError

SIZE = 2
NUM_BLOCKS = 10
GROUPS = (LayerGroup((0,)), LayerGroup((1, 2), window_tokens=3))


class Held:
    """A request of the model: its tokens, its blocks, the tokens that are computed and the most it may grow to."""

    def __init__(self, root: bytes, tokens: list[int], max_tokens: int, block_ids: list[list[int]]) -> None:
        self.root, self.tokens, self.max_tokens, self.block_ids = root, tokens, max_tokens, block_ids
        self.hashes: list[bytes] = []
        self.num_computed = 0


class GroupedBlocksMachine(RuleBasedStateMachine):
    """Requests over a two-letter alphabet come, grow and go, in two groups of which one slides over three tokens. What
    every block holds is known from outside, so a wrong reuse shows."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = GroupedBlocks(GROUPS, NUM_BLOCKS, SIZE)
        self.written: dict[tuple[int, int], tuple[int, ...]] = {}
        self.held: list[Held] = []

    @rule(
        target=requests,
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        growth=st.integers(0, 6),
        root=st.sampled_from([b"a", b"b"]),
    )
    def admit(self, tokens: list[int], growth: int, root: bytes) -> Held:
        hashes: list[bytes] = []
        extend_hashes(hashes, tokens, root, SIZE)
        match = self.blocks.match_prefix(hashes, tokens, len(tokens) - 1)
        assert match.num_blocks * SIZE < len(tokens)
        for group, block_ids in enumerate(match.block_ids):
            for index, block_id in enumerate(block_ids):
                if block_id != NO_BLOCK:
                    assert self.written[group, block_id] == (*root, *tokens[: (index + 1) * SIZE])
        needs = [self.blocks.still_needs(other.block_ids, other.max_tokens) for other in self.held]
        promised = [sum(of_group) for of_group in zip(*needs, strict=True)] or [0, 0]
        if not self.blocks.fits(match, len(tokens), len(tokens) + growth, promised):
            return multiple()
        request = Held(root, list(tokens), len(tokens) + growth, self.blocks.allocate_prompt(match, len(tokens)))
        for group, block_ids in zip(GROUPS, request.block_ids, strict=True):
            first = group.first_needed_block(match.num_blocks * SIZE, SIZE)
            assert [block_id == NO_BLOCK for block_id in block_ids] == [at < first for at in range(len(block_ids))]
        self.compute(request, len(tokens), match.num_blocks)
        self.held.append(request)
        return request

    def compute(self, request: Held, num_tokens: int, num_committed: int) -> None:
        extend_hashes(request.hashes, request.tokens, request.root, SIZE)
        for group, block_ids in enumerate(request.block_ids):
            for index in range(num_committed, len(block_ids)):
                if block_ids[index] != NO_BLOCK:
                    self.written[group, block_ids[index]] = (*request.root, *request.tokens[: (index + 1) * SIZE])
        for index in range(num_committed, num_tokens // SIZE):
            content = token_bytes(request.tokens[index * SIZE : (index + 1) * SIZE])
            self.blocks.commit(request.block_ids, index, request.hashes[index], content)
        request.num_computed = num_tokens
        self.blocks.release_behind(request.block_ids, num_tokens)

    @rule(request=requests, token=st.integers(0, 1))
    def grow(self, request: Held, token: int) -> None:
        if request not in self.held or len(request.tokens) == request.max_tokens:
            return
        request.tokens.append(token)
        self.blocks.grow(request.block_ids, len(request.tokens))
        for group, block_ids in zip(GROUPS, request.block_ids, strict=True):
            needed = block_ids[group.first_needed_block(len(request.tokens) - 1, SIZE) :]
            assert NO_BLOCK not in needed
        self.compute(request, len(request.tokens), (len(request.tokens) - 1) // SIZE)

    @rule(request=consumes(requests))
    def release(self, request: Held) -> None:
        if request in self.held:
            self.held.remove(request)
            self.blocks.release(request.block_ids)

    @rule(request=requests)
    def forget(self, request: Held) -> None:
        self.blocks.forget(request.block_ids, 0, len(request.block_ids[0]))

    @invariant()
    def books_agree(self) -> None:
        self.blocks.check([request.block_ids for request in self.held])
        for request in self.held:
            window = request.block_ids[1]
            live = [index for index, block_id in enumerate(window) if block_id != NO_BLOCK]
            assert len(live) <= GROUPS[1].most_live_blocks(len(request.tokens), SIZE)
            assert all(index >= GROUPS[1].first_needed_block(request.num_computed, SIZE) for index in live)


TestGroupedBlocks = GroupedBlocksMachine.TestCase


def commit_all(blocks: GroupedBlocks, tokens: list[int]) -> tuple[list[list[int]], list[bytes]]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, b"", SIZE)
    block_ids = blocks.allocate_prompt(PrefixMatch(0, ([],) * len(blocks.groups)), len(tokens))
    for index in range(len(tokens) // SIZE):
        blocks.commit(block_ids, index, hashes[index], token_bytes(tokens[index * SIZE : (index + 1) * SIZE]))
    return block_ids, hashes


def one_group(num_blocks: int) -> GroupedBlocks:
    return GroupedBlocks([LayerGroup((0,))], num_blocks, SIZE)


def test_layers_of_equal_windows_form_a_group() -> None:
    assert group_layers([16, 16, None, 16, 8]) == (
        LayerGroup((0, 1, 3), 16),
        LayerGroup((2,)),
        LayerGroup((4,), 8),
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
