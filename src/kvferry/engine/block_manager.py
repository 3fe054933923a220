"""Which block holds what: reference counts, prefix reuse, least-recently-used order. Knows block ids, never tensors.

Every block is in exactly one row of this table:

    ref_count   hash    where                 meaning
    0           none    free, front           empty
    0           known   free, in LRU order    a finished request's KV, reusable until the block is handed out again
    >= 1        none    in use                being filled
    >= 1        known   in use                filled, shareable
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvferry.errors import InvariantError


class BlockManager:
    """Hands out `num_blocks` blocks of `tokens_per_block` tokens.

    A block is reused for another request's prefix when its hash *and* its tokens are equal. The hash covers all tokens
    before the block as well, so an equal hash with equal tokens at each block of a chain means an equal prefix.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int, *, enable_reuse: bool = True) -> None:
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.enable_reuse = enable_reuse
        self._ref_counts = [0] * num_blocks
        self._contents: dict[int, tuple[bytes, bytes]] = {}
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, those that still hold reusable KV among them."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_block)

    def is_in_use(self, block_id: int) -> bool:
        return self._ref_counts[block_id] > 0

    def extend_hashes(self, hashes: list[bytes], tokens: Sequence[int], root: bytes) -> None:
        """Append the hashes of full blocks of `tokens` that `hashes` lacks. Different roots share nothing."""
        size = self.tokens_per_block
        for index in range(len(hashes), len(tokens) // size):
            parent = hashes[index - 1] if index else root
            hashes.append(hashlib.sha256(parent + _token_bytes(tokens[index * size : (index + 1) * size])).digest())

    def match_prefix(self, hashes: Sequence[bytes], tokens: Sequence[int], max_tokens: int) -> list[int]:
        """Blocks that hold the longest known prefix of `tokens`, at most `max_tokens` long. Changes nothing."""
        matched: list[int] = []
        if not self.enable_reuse:
            return matched
        size = self.tokens_per_block
        for index, block_hash in enumerate(hashes[: max_tokens // size]):
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            if self._contents[block_id][1] != _token_bytes(tokens[index * size : (index + 1) * size]):
                break
            matched.append(block_id)
        return matched

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Take one more reference on blocks that a match found."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` blocks, least recently used first; what they held is forgotten."""
        assert count <= self.num_free, "admission keeps enough blocks free"
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self._forget(block_id)
            self._ref_counts[block_id] = 1
        return block_ids

    def commit(self, block_id: int, block_hash: bytes, tokens: Sequence[int]) -> None:
        """The block is filled with the KV of `tokens`. The first block of a hash serves it; a twin stays unshared."""
        assert self._ref_counts[block_id] > 0
        if self.enable_reuse and block_hash not in self._by_hash and block_id not in self._contents:
            self._by_hash[block_hash] = block_id
            self._contents[block_id] = (block_hash, _token_bytes(tokens))

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back one reference on each. Later blocks become the least recently used: a prefix outlives its ends."""
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, f"block {block_id} is released but not in use"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._contents:
                    self._free.move_to_end(block_id, last=False)

    def forget(self, block_ids: Iterable[int]) -> None:
        """The content of these blocks may not be reused any more; blocks in use stay in use."""
        for block_id in block_ids:
            self._forget(block_id)

    def _forget(self, block_id: int) -> None:
        content = self._contents.pop(block_id, None)
        if content is not None:
            del self._by_hash[content[0]]

    def check(self) -> None:
        """InvariantError unless free blocks, reference counts and the index agree."""
        for block_id, count in enumerate(self._ref_counts):
            if count < 0 or (count == 0) != (block_id in self._free):
                raise InvariantError(f"block {block_id}: {count} references, in free list: {block_id in self._free}")
        if {content[0]: block_id for block_id, content in self._contents.items()} != self._by_hash:
            raise InvariantError("the hash index and the blocks' contents disagree")


def _token_bytes(tokens: Sequence[int]) -> bytes:
    return array("q", tokens).tobytes()
