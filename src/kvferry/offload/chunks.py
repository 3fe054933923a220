"""Which of a request's blocks hold which parts of its chunks. Pure arithmetic: knows no store and no request."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.blocks import Geometry, GroupKind, Part
from kvferry.connector.api import NO_BLOCK
from kvferry.offload.metadata import PartCopy

BlockIds = Sequence[Sequence[int]]
"""A request's blocks in the order of its tokens, one list a layer group."""


class ChunkBlocks:
    """The chunks of one geometry in blocks of `tokens_per_block` tokens, of which a chunk is a whole number."""

    def __init__(self, geometry: Geometry, tokens_per_block: int) -> None:
        assert geometry.chunk_tokens % tokens_per_block == 0
        self.tokens_per_block = tokens_per_block
        self._groups = geometry.groups
        self._chunk_tokens = geometry.chunk_tokens
        self._blocks_per_chunk = geometry.chunk_tokens // tokens_per_block
        kinds = [group.kind for group in geometry.groups]
        self.has_windows = GroupKind.WINDOW in kinds
        self.state_groups = [index for index, kind in enumerate(kinds) if kind is GroupKind.STATE]

    def loaded(self, part: Part, start: int, end: int, block_ids: BlockIds) -> PartCopy:
        """What of a part is loaded if tokens `start` to `end` are, perhaps nothing."""
        if part.group in self.state_groups:
            return self._state(part, block_ids)
        chunk_start = part.chunk * self._blocks_per_chunk
        first = max(start // self.tokens_per_block, self._first_live(part.group, end))
        begin = max(first, chunk_start)
        last = min(end // self.tokens_per_block, chunk_start + self._blocks_per_chunk)
        return PartCopy(part.group, part.slots, begin - chunk_start, list(block_ids[part.group][begin:last]))

    def saved(self, part: Part, block_ids: BlockIds) -> PartCopy:
        """All of a part."""
        if part.group in self.state_groups:
            return self._state(part, block_ids)
        start = part.chunk * self._blocks_per_chunk
        of_chunk = list(block_ids[part.group][start : start + self._blocks_per_chunk])
        return PartCopy(part.group, part.slots, 0, of_chunk)

    def ends_in_states(self, block_ids: BlockIds, end: int) -> bool:
        """Whether a request can go on where a pass ends: only there are states known, and where the engine keeps
        them."""
        last = end // self.tokens_per_block - 1
        return end % self._chunk_tokens == 0 and all(
            last < len(block_ids[group]) and block_ids[group][last] != NO_BLOCK for group in self.state_groups
        )

    def are_known(self, block_ids: BlockIds, num_chunks: int) -> bool:
        """Whether the blocks of these chunks are known. Where every token is kept none may be missing."""
        return all(
            num_chunks * self._blocks_per_chunk <= len(of_group)
            and (group.kind is not GroupKind.FULL or NO_BLOCK not in of_group)
            for group, of_group in zip(self._groups, block_ids, strict=True)
        )

    def first_whole(self, block_ids: BlockIds, computed: int) -> int:
        """The first chunk of which no window's group lacks blocks, before a pass that begins with token `computed`: the
        engine takes those behind a window back."""
        first_block = 0
        for group, of_group in enumerate(block_ids):
            if self._groups[group].kind is GroupKind.WINDOW:
                last_gone = max((index for index, block in enumerate(of_group) if block == NO_BLOCK), default=-1)
                first_block = max(first_block, last_gone + 1, self._first_live(group, computed))
        return -(-first_block // self._blocks_per_chunk)

    def _first_live(self, group: int, position: int) -> int:
        """The first block of a group that the token at `position` attends to; a window counts the token itself."""
        window_tokens = self._groups[group].window_tokens
        return 0 if window_tokens is None else max(0, position - window_tokens + 1) // self.tokens_per_block

    def _state(self, part: Part, block_ids: BlockIds) -> PartCopy:
        last = (part.chunk + 1) * self._blocks_per_chunk - 1
        return PartCopy(part.group, part.slots, 0, [block_ids[part.group][last]])
