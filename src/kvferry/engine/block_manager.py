"""Which block of one layer group holds what: reference counts, reuse, least-recently-used order. Knows no tensor.

Every block is in exactly one row of this table:

    ref_count   hash    where                 meaning
    0           none    free, front           empty
    0           known   free, in LRU order    a finished request's KV, reusable until the block is handed out again
    >= 1        none    in use                being filled
    >= 1        known   in use                filled, shareable
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from kvferry.connector.api import NO_BLOCK
from kvferry.errors import InvariantError


class BlockManager:
    """Hands out `num_blocks` blocks.

    A block is reused for another request's prefix when its hash *and* its tokens are equal. The hash covers all tokens
    before the block as well (`groups.extend_hashes`), so equality along a chain means an equal prefix.
    """

    def __init__(self, num_blocks: int, *, enable_reuse: bool = True) -> None:
        self.num_blocks = num_blocks
        self.enable_reuse = enable_reuse
        self._ref_counts = [0] * num_blocks
        self._contents: dict[int, tuple[bytes, bytes]] = {}
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, those that still hold reusable KV among them."""
        return len(self._free)

    @property
    def num_references(self) -> int:
        """References on all blocks."""
        return sum(self._ref_counts)

    def is_in_use(self, block_id: int) -> bool:
        return self._ref_counts[block_id] > 0

    def find(self, block_hash: bytes, content: bytes) -> int:
        """The block that holds the tokens of this hash, or NO_BLOCK. `content` is `token_bytes` of its tokens."""
        block_id = self._by_hash.get(block_hash, NO_BLOCK) if self.enable_reuse else NO_BLOCK
        return block_id if block_id != NO_BLOCK and self._contents[block_id][1] == content else NO_BLOCK

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
        self.forget(block_ids)
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def commit(self, block_id: int, block_hash: bytes, content: bytes) -> None:
        """The block holds the KV of these tokens. The first block of a hash serves it; a twin stays unshared."""
        assert self._ref_counts[block_id] > 0
        if self.enable_reuse and block_hash not in self._by_hash and block_id not in self._contents:
            self._by_hash[block_hash] = block_id
            self._contents[block_id] = (block_hash, content)

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


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Tokens as they are hashed and compared."""
    return array("q", tokens).tobytes()
