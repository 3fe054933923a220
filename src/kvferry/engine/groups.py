"""Layer groups: layers that attend alike share block ids, and each group has a pool of its own. Knows no tensor.

A sequence has one list of block ids a group, in the order of its tokens. In a group with a sliding window the blocks
that no later token attends to are given back and stand as NO_BLOCK, so positions in the list stay positions in time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvferry.blocks import GroupKind
from kvferry.connector.api import NO_BLOCK
from kvferry.engine.block_manager import BlockManager, token_bytes
from kvferry.errors import InvariantError, RequestError
from kvferry.hit import longest_hit, needed_units


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one attention window; None: full attention."""

    layers: tuple[int, ...]
    window_tokens: int | None = None

    @property
    def kind(self) -> GroupKind:
        return GroupKind.FULL if self.window_tokens is None else GroupKind.WINDOW

    def first_needed_block(self, position: int, tokens_per_block: int) -> int:
        """The first block that the token at `position` attends to. A window of w tokens counts the token itself."""
        if self.window_tokens is None:
            return 0
        return max(0, position - self.window_tokens + 1) // tokens_per_block

    def most_live_blocks(self, num_tokens: int, tokens_per_block: int) -> int:
        """Most blocks that a sequence of `num_tokens` holds while it decodes."""
        num_blocks = -(-num_tokens // tokens_per_block)
        if self.window_tokens is None:
            return num_blocks
        return min(num_blocks, -(-self.window_tokens // tokens_per_block) + 1)


def group_layers(windows: Sequence[int | None]) -> tuple[LayerGroup, ...]:
    """Groups of layers with equal windows, in the order of their first layers."""
    return tuple(
        LayerGroup(tuple(layer for layer, other in enumerate(windows) if other == window), window)
        for window in dict.fromkeys(windows)
    )


def check_windows(windows: Sequence[int | None], given: Sequence[int] | None, max_positions: int) -> None:
    """RequestError: the windows `given` for the layers in turn are not the model's. One as long as the longest sequence
    says full attention."""
    for layer, window in enumerate(windows if given else ()):
        assert given
        said = given[layer % len(given)]
        if said != window and (window is not None or said < max_positions):
            own = f"a window of {window}" if window is not None else f"all of up to {max_positions}"
            raise RequestError(
                f"max_attention_window gives layer {layer} a window of {said} tokens, but it attends to {own}, and the "
                "engine computes what the model says"
            )


def extend_hashes(hashes: list[bytes], tokens: Sequence[int], root: bytes, tokens_per_block: int) -> None:
    """Append the hashes of full blocks of `tokens` that `hashes` lacks. Different roots share nothing."""
    for index in range(len(hashes), len(tokens) // tokens_per_block):
        parent = hashes[index - 1] if index else root
        content = token_bytes(tokens[index * tokens_per_block : (index + 1) * tokens_per_block])
        hashes.append(hashlib.sha256(parent + content).digest())


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """A prefix that the pools hold: `num_blocks` blocks; `block_ids[group]` has NO_BLOCK where none is needed."""

    num_blocks: int
    block_ids: tuple[list[int], ...]


class GroupedBlocks:
    """The books of all groups' pools, each of `num_blocks` blocks."""

    def __init__(
        self, groups: Sequence[LayerGroup], num_blocks: int, tokens_per_block: int, *, enable_reuse: bool = True
    ) -> None:
        self.groups = tuple(groups)
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.pools = tuple(BlockManager(num_blocks, enable_reuse=enable_reuse) for _ in self.groups)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_block)

    def match_prefix(self, hashes: Sequence[bytes], tokens: Sequence[int], max_tokens: int) -> PrefixMatch:
        """The longest prefix of `tokens`, up to `max_tokens`, that every group can go on from. Changes nothing."""
        size = self.tokens_per_block
        num_candidates = min(len(hashes), max_tokens // size)
        contents = [token_bytes(tokens[index * size : (index + 1) * size]) for index in range(num_candidates)]
        found = [
            [pool.find(block_hash, content) for block_hash, content in zip(hashes, contents, strict=False)]
            for pool in self.pools
        ]
        present = [[block_id != NO_BLOCK for block_id in of_group] for of_group in found]
        num_blocks = longest_hit(self.groups, size, present)
        needed = [set(needed_units(group, size, 0, num_blocks)) for group in self.groups]
        return PrefixMatch(
            num_blocks,
            tuple(
                [of_group[index] if index in wanted else NO_BLOCK for index in range(num_blocks)]
                for of_group, wanted in zip(found, needed, strict=True)
            ),
        )

    def fits(self, match: PrefixMatch, num_prompt: int, max_tokens: int, promised: Sequence[int]) -> bool:
        """Whether every group can hold a sequence of `num_prompt` tokens to its end at `max_tokens`, beside the blocks
        `promised[group]` that others may still take."""
        for group, pool, matched, taken in zip(self.groups, self.pools, match.block_ids, promised, strict=True):
            first = group.first_needed_block(match.num_blocks * self.tokens_per_block, self.tokens_per_block)
            held = self.num_blocks_for(num_prompt) - first
            wanted = max(held, group.most_live_blocks(max_tokens, self.tokens_per_block))
            shared = sum(block_id != NO_BLOCK and pool.is_in_use(block_id) for block_id in matched[first:])
            if wanted - shared > pool.num_free - taken:
                return False
        return True

    def still_needs(self, block_ids: Sequence[Sequence[int]], max_tokens: int) -> list[int]:
        """Blocks that a sequence holding `block_ids` may still take in each group, at one time, to grow to the end."""
        needs = []
        for group, held in zip(self.groups, block_ids, strict=True):
            growth = self.num_blocks_for(max_tokens) - len(held)
            live = sum(block_id != NO_BLOCK for block_id in held)
            needs.append(max(0, min(growth, group.most_live_blocks(max_tokens, self.tokens_per_block) - live)))
        return needs

    def allocate_prompt(self, match: PrefixMatch, num_prompt: int) -> list[list[int]]:
        """Take the matched blocks and fresh ones for the rest of the prompt; in each group from the first block on that
        the first token after the match attends to."""
        num_blocks = self.num_blocks_for(num_prompt)
        block_ids = []
        for group, pool, matched in zip(self.groups, self.pools, match.block_ids, strict=True):
            first = group.first_needed_block(match.num_blocks * self.tokens_per_block, self.tokens_per_block)
            kept = [NO_BLOCK] * min(first, len(matched)) + matched[first:]
            pool.acquire(block_id for block_id in kept if block_id != NO_BLOCK)
            block_ids.append(kept + pool.allocate(num_blocks - len(kept)))
        return block_ids

    def grow(self, block_ids: Sequence[list[int]], num_tokens: int) -> None:
        """Give a sequence the blocks that it lacks for `num_tokens` tokens."""
        for pool, held in zip(self.pools, block_ids, strict=True):
            held.extend(pool.allocate(max(0, self.num_blocks_for(num_tokens) - len(held))))

    def commit(self, block_ids: Sequence[Sequence[int]], index: int, block_hash: bytes, content: bytes) -> None:
        """Block `index` of a sequence is filled in every group: others may share it."""
        for pool, held in zip(self.pools, block_ids, strict=True):
            if held[index] != NO_BLOCK:
                pool.commit(held[index], block_hash, content)

    def release_behind(self, block_ids: Sequence[list[int]], position: int) -> None:
        """Give back the blocks that neither the token at `position` nor any after it attends to."""
        for group, pool, held in zip(self.groups, self.pools, block_ids, strict=True):
            for index in range(min(group.first_needed_block(position, self.tokens_per_block), len(held)) - 1, -1, -1):
                if held[index] == NO_BLOCK:
                    break
                pool.release([held[index]])
                held[index] = NO_BLOCK

    def forget(self, block_ids: Sequence[Sequence[int]], first: int, last: int) -> None:
        """What a sequence's blocks `first` to `last` hold may not be shared."""
        for pool, held in zip(self.pools, block_ids, strict=True):
            pool.forget(block_id for block_id in held[first:last] if block_id != NO_BLOCK)

    def release(self, block_ids: Sequence[Sequence[int]]) -> None:
        """Give back all of a sequence's blocks."""
        for pool, held in zip(self.pools, block_ids, strict=True):
            pool.release([block_id for block_id in held if block_id != NO_BLOCK])

    @property
    def num_free(self) -> int:
        """Free blocks of the group that has fewest."""
        return min(pool.num_free for pool in self.pools)

    def check(self, held: Iterable[Sequence[Sequence[int]]]) -> None:
        """InvariantError unless every pool's books are right and its references are those of the `held` block ids."""
        in_use = [0] * len(self.pools)
        for block_ids in held:
            for group, of_group in enumerate(block_ids):
                in_use[group] += sum(block_id != NO_BLOCK for block_id in of_group)
        for group, pool in enumerate(self.pools):
            pool.check()
            if pool.num_references != in_use[group]:
                raise InvariantError(
                    f"group {group}: {pool.num_references} references on blocks, {in_use[group]} held by requests"
                )
