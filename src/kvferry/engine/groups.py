"""Layer groups: layers that attend alike share block ids, and each group has a pool of its own. Knows no tensor.

A sequence has one list of block ids a group, in the order of its tokens. In a group with a sliding window the blocks
that no later token attends to are given back and stand as NO_BLOCK, so positions in the list stay positions in time.

In a group of recurrent layers a block holds one state, and most places in the list have none:

    a state that is kept            in the block at whose end it was taken: each `interval_tokens`, and where a load
                                    ended
    the state after the last token  in the first block there is from that token's place on; a pass reads it there, and
    that is computed                writes it to where it belongs after the pass

So no pass writes to a block that others may share: its end lies behind the tokens that the pass computes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvferry.blocks import GroupKind
from kvferry.connector.api import NO_BLOCK
from kvferry.engine.block_manager import BlockManager, token_bytes
from kvferry.errors import InvariantError, RequestError
from kvferry.hit import longest_hit, needed_units


@dataclass(frozen=True, slots=True)
class Snapshots:
    """A group of recurrent layers: a pool of `num_blocks` states, one kept each `interval_tokens`, which is a multiple
    of the block size."""

    interval_tokens: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers of one attention window (None: full attention), or recurrent layers."""

    layers: tuple[int, ...]
    window_tokens: int | None = None
    snapshots: Snapshots | None = None

    @property
    def kind(self) -> GroupKind:
        if self.snapshots is not None:
            return GroupKind.STATE
        return GroupKind.FULL if self.window_tokens is None else GroupKind.WINDOW

    def first_needed_block(self, position: int, tokens_per_block: int) -> int:
        """The first block that the token at `position` attends to, or that has the state before it. A window of w
        tokens counts the token itself."""
        match self.kind:
            case GroupKind.FULL:
                return 0
            case GroupKind.WINDOW:
                assert self.window_tokens is not None
                return max(0, position - self.window_tokens + 1) // tokens_per_block
            case GroupKind.STATE:
                return max(0, position - 1) // tokens_per_block

    def most_live_blocks(self, num_tokens: int, tokens_per_block: int) -> int:
        """Most blocks that a sequence of `num_tokens` holds while it decodes."""
        num_blocks = -(-num_tokens // tokens_per_block)
        if self.kind is GroupKind.FULL:
            return num_blocks
        return min(num_blocks, -(-(self.window_tokens or 1) // tokens_per_block) + 1)

    def prompt_blocks(self, start: int, num_prompt: int, tokens_per_block: int, end_of_load: int = 0) -> Sequence[int]:
        """The blocks, in order, that a prompt takes whose first `start` tokens are in the pool, and whose tokens up to
        `end_of_load` will be loaded."""
        num_blocks = -(-num_prompt // tokens_per_block)
        if self.snapshots is None:
            return range(self.first_needed_block(start, tokens_per_block), num_blocks)
        interval = self.snapshots.interval_tokens // tokens_per_block
        known = start // tokens_per_block
        kept = range((known // interval + 1) * interval, num_blocks, interval)
        return [end - 1 for end in sorted({known, *kept, end_of_load // tokens_per_block, num_blocks}) if end > 0]

    def keeps_state(self, position: int, computed: range) -> bool:
        """Whether the block that ends at `position` is to be shared after a pass over `computed`: it held the state
        there when the pass began, which then was a load's end, or holds it now."""
        assert self.snapshots is not None
        is_snapshot = position == computed.stop and position % self.snapshots.interval_tokens == 0
        return is_snapshot or position == computed.start


def group_layers(
    windows: Sequence[int | None], state_layers: Collection[int] = (), snapshots: Snapshots | None = None
) -> tuple[LayerGroup, ...]:
    """Groups of layers with equal windows, and one of the recurrent `state_layers`, in the order of their first
    layers."""
    rules = [(None, snapshots) if layer in state_layers else (window, None) for layer, window in enumerate(windows)]
    return tuple(
        LayerGroup(tuple(layer for layer, other in enumerate(rules) if other == rule), *rule)
        for rule in dict.fromkeys(rules)
    )


def place_of_state(block_ids: Sequence[int], num_tokens: int, tokens_per_block: int) -> int:
    """The block among a sequence's that holds its state after `num_tokens` (at least 1), or that will."""
    first = (num_tokens - 1) // tokens_per_block
    return next(block_id for block_id in itertools.islice(block_ids, first, None) if block_id != NO_BLOCK)


def check_windows(windows: Sequence[int | None], given: Sequence[int] | None, max_positions: int) -> None:
    """RequestError: the windows `given` for the layers in turn are not the model's. One as long as the longest sequence
    says full attention."""
    for layer, (window, said) in enumerate(zip(windows, itertools.cycle(given or ()), strict=False)):
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
    """The books of all groups' pools, each of `num_blocks` blocks, but for those of states."""

    def __init__(
        self, groups: Sequence[LayerGroup], num_blocks: int, tokens_per_block: int, *, enable_reuse: bool = True
    ) -> None:
        self.groups = tuple(groups)
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.pools = tuple(
            BlockManager(group.snapshots.num_blocks if group.snapshots else num_blocks, enable_reuse=enable_reuse)
            for group in self.groups
        )

    @property
    def has_states(self) -> bool:
        return any(group.kind is GroupKind.STATE for group in self.groups)

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
        start = match.num_blocks * self.tokens_per_block
        for group, pool, matched, taken in zip(self.groups, self.pools, match.block_ids, promised, strict=True):
            held = len(group.prompt_blocks(start, num_prompt, self.tokens_per_block))
            if group.kind is GroupKind.STATE:
                held += 1  # where a load ends
            wanted = max(held, group.most_live_blocks(max_tokens, self.tokens_per_block))
            if group.kind is GroupKind.FULL:
                shared = sum(block_id != NO_BLOCK and pool.is_in_use(block_id) for block_id in matched)
                room = pool.num_free + shared
            else:
                # A shared block that its sequences give up one by one is free after the last of them: each counts it.
                room = pool.num_blocks - pool.num_references
            if wanted > room - taken:
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

    def allocate_prompt(self, match: PrefixMatch, num_prompt: int, num_loaded: int = 0) -> list[list[int]]:
        """Take the matched blocks and fresh ones for the rest of the prompt, `num_loaded` tokens of which are loaded;
        in each group what the first token after the match and all later ones need."""
        start = match.num_blocks * self.tokens_per_block
        block_ids = []
        for group, pool, matched in zip(self.groups, self.pools, match.block_ids, strict=True):
            taken = group.prompt_blocks(start, num_prompt, self.tokens_per_block, start + num_loaded)
            shared = [matched[index] for index in taken if index < match.num_blocks]
            pool.acquire(shared)
            held = [NO_BLOCK] * self.num_blocks_for(num_prompt)
            for index, block_id in zip(taken, shared + pool.allocate(len(taken) - len(shared)), strict=True):
                held[index] = block_id
            block_ids.append(held)
        return block_ids

    def tokens_to_snapshot(self, position: int) -> int | None:
        """Most tokens that one pass may compute from `position` on; None: any number."""
        intervals = [group.snapshots.interval_tokens for group in self.groups if group.snapshots]
        return min((interval - position % interval for interval in intervals), default=None)

    def grow(self, block_ids: Sequence[list[int]], num_tokens: int) -> None:
        """Give a sequence the blocks that it lacks for `num_tokens` tokens."""
        for pool, held in zip(self.pools, block_ids, strict=True):
            held.extend(pool.allocate(max(0, self.num_blocks_for(num_tokens) - len(held))))

    def commit(
        self, block_ids: Sequence[Sequence[int]], index: int, block_hash: bytes, content: bytes, computed: range
    ) -> None:
        """Block `index` of a sequence is filled in every group by now: others may share it. computed: the positions
        of the pass."""
        end = (index + 1) * self.tokens_per_block
        for group, pool, held in zip(self.groups, self.pools, block_ids, strict=True):
            if held[index] != NO_BLOCK and (group.snapshots is None or group.keeps_state(end, computed)):
                pool.commit(held[index], block_hash, content)

    def release_behind(self, block_ids: Sequence[list[int]], position: int) -> None:
        """Give back the blocks that neither the token at `position` nor any after it attends to."""
        for group, pool, held in zip(self.groups, self.pools, block_ids, strict=True):
            num_behind = min(group.first_needed_block(position, self.tokens_per_block), len(held))
            widest_gap = group.snapshots.interval_tokens // self.tokens_per_block if group.snapshots else 1
            gap = 0
            for index in range(num_behind - 1, -1, -1):
                if held[index] != NO_BLOCK:
                    pool.release([held[index]])
                    held[index], gap = NO_BLOCK, 0
                elif (gap := gap + 1) == widest_gap:
                    break  # what lies before was given back already

    def forget(self, block_ids: Sequence[Sequence[int]], first: int, last: int) -> None:
        """What a sequence's blocks `first` to `last` hold may not be shared."""
        for pool, held in zip(self.pools, block_ids, strict=True):
            pool.forget(block_id for block_id in held[first:last] if block_id != NO_BLOCK)

    def release(self, block_ids: Sequence[Sequence[int]]) -> None:
        """Give back all of a sequence's blocks."""
        for pool, held in zip(self.pools, block_ids, strict=True):
            pool.release([block_id for block_id in held if block_id != NO_BLOCK])

    def check(self, held: Sequence[Sequence[Sequence[int]]]) -> None:
        """InvariantError unless every pool's books are right and its references are those of the `held` block ids."""
        for group, pool in enumerate(self.pools):
            pool.check()
            in_use = sum(block_id != NO_BLOCK for block_ids in held for block_id in block_ids[group])
            if pool.num_references != in_use:
                raise InvariantError(
                    f"group {group}: {pool.num_references} references on blocks, {in_use} held by requests"
                )
