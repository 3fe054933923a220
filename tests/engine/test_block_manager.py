"""The pool's books: references, reuse and order, against a plain model."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvferry.engine.block_manager import BlockManager

SIZE = 2
NUM_BLOCKS = 8


class BlockManagerMachine(RuleBasedStateMachine):
    """Requests over a two-letter alphabet come and go; what a block holds is known from outside."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, SIZE)
        self.written: dict[int, tuple[int, ...]] = {}
        self.references: dict[int, int] = {}

    @rule(target=held, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), root=st.sampled_from([b"a", b"b"]))
    def start(self, tokens: list[int], root: bytes) -> list[int]:
        hashes: list[bytes] = []
        self.blocks.extend_hashes(hashes, tokens, root)
        matched = self.blocks.match_prefix(hashes, tokens, len(tokens) - 1)
        for index, block_id in enumerate(matched):
            assert self.written[block_id] == (*root, *tokens[: (index + 1) * SIZE])
        wanted = self.blocks.num_blocks_for(len(tokens)) - len(matched)
        shared = sum(not self.blocks.is_in_use(block_id) for block_id in matched)
        if wanted + shared > self.blocks.num_free:
            return []
        self.blocks.acquire(matched)
        fresh = self.blocks.allocate(wanted)
        assert not set(fresh) & set(matched)
        block_ids = matched + fresh
        for block_id in block_ids:
            self.references[block_id] = self.references.get(block_id, 0) + 1
        for index in range(len(matched), len(tokens) // SIZE):
            self.written[block_ids[index]] = (*root, *tokens[: (index + 1) * SIZE])
            self.blocks.commit(block_ids[index], hashes[index], tokens[index * SIZE : (index + 1) * SIZE])
        for block_id in block_ids[len(tokens) // SIZE :]:
            self.written.pop(block_id, None)
        return block_ids

    @rule(block_ids=consumes(held))
    def release(self, block_ids: list[int]) -> None:
        self.blocks.release(block_ids)
        for block_id in block_ids:
            self.references[block_id] -= 1

    @rule(block_ids=held)
    def forget(self, block_ids: list[int]) -> None:
        self.blocks.forget(block_ids)

    @invariant()
    def books_agree(self) -> None:
        self.blocks.check()
        in_use = {block_id for block_id, count in self.references.items() if count}
        assert in_use == {block_id for block_id in range(NUM_BLOCKS) if self.blocks.is_in_use(block_id)}
        assert self.blocks.num_free == NUM_BLOCKS - len(in_use)


TestBlockManager = BlockManagerMachine.TestCase


def commit_all(blocks: BlockManager, tokens: list[int]) -> tuple[list[int], list[bytes]]:
    hashes: list[bytes] = []
    blocks.extend_hashes(hashes, tokens, b"")
    block_ids = blocks.allocate(len(tokens) // SIZE)
    for index, block_id in enumerate(block_ids):
        blocks.commit(block_id, hashes[index], tokens[index * SIZE : (index + 1) * SIZE])
    return block_ids, hashes


def test_equal_hash_with_other_tokens_is_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BlockManager(4, SIZE)
    monkeypatch.setattr(blocks, "extend_hashes", lambda hashes, *_: hashes.extend([b"same", b"sama"]))
    commit_all(blocks, [1, 2, 3, 4])
    assert blocks.match_prefix([b"same", b"sama"], [1, 2, 3, 4], 4) != []
    assert blocks.match_prefix([b"same", b"sama"], [1, 9, 3, 4], 4) == []


def test_the_end_of_a_prefix_is_given_away_before_its_beginning() -> None:
    blocks = BlockManager(4, SIZE)
    first, hashes = commit_all(blocks, [1, 2, 3, 4, 5, 6])
    blocks.release(first)
    assert blocks.allocate(2) == [3, first[2]]
    assert blocks.match_prefix(hashes, [1, 2, 3, 4, 5, 6], 6) == first[:2]


def test_empty_blocks_are_given_away_before_reusable_ones() -> None:
    blocks = BlockManager(3, SIZE)
    kept, _ = commit_all(blocks, [1, 2])
    blocks.release(kept)
    assert blocks.allocate(2) == [1, 2]
