"""What the store has of an engine's prompts, as KV events of vLLM's, for routers that send a prompt to where its
beginning is. Imports vLLM.

Blocks are named by vLLM's own hashes, with the medium "CPU" whichever tier has them. The store is asked for a few
chunks at a time: one is announced once the store has it, and taken back once it is nowhere any more.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core import kv_cache_utils

from kvferry.blocks import Geometry, GroupKind
from kvferry.store.base import BlockStore

_MEDIUM = "CPU"
_LOOK_SECONDS = 0.1
_MOST_AT_ONCE = 256
"""Chunks that the store is asked for at a time."""
_EXPECTED_SECONDS = 30.0
"""A chunk that has not come by then was not kept."""


class BlockEvents:
    """The events of one engine. Of a model with groups of several kinds they tell of the first with full attention, and
    of one that has none there are no events."""

    def __init__(
        self,
        store: BlockStore,
        geometry: Geometry,
        tokens_per_block: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._geometry = geometry
        self._tokens_per_block = tokens_per_block
        self._group = next((at for at, group in enumerate(geometry.groups) if group.kind is GroupKind.FULL), None)
        self._clock = clock
        self._look_at = 0.0
        self._expected: dict[bytes, tuple[BlockStored, float]] = {}
        """By key, of chunks that the store may come to have, and until when they are looked for."""
        self._announced: dict[bytes, list[Any]] = {}
        """By key, the hashes of chunks that it had when last asked."""
        self._turn: deque[bytes] = deque()
        """Announced chunks, those first that were not asked for longest."""
        self._untold: list[KVCacheEvent] = []

    def follow(self, request: Any, keys: Sequence[bytes]) -> None:
        """The store has, or is to have, chunks of a request's beginning with these keys."""
        size = self._tokens_per_block
        if self._group is None or len(request.block_hashes) != request.num_tokens // size:
            return  # Its hashes are those of blocks of another size.
        until = self._clock() + _EXPECTED_SECONDS
        for chunk, key in enumerate(keys):
            if key not in self._announced and key not in self._expected:
                self._expected[key] = self._stored(request, chunk), until

    def hurry(self) -> None:
        """Something was saved: ask at once, as there may be no later step."""
        self._look_at = 0.0

    def disown(self) -> None:
        """No prompt finds any more what was announced."""
        self._untold += [self._removed(hashes) for hashes in self._announced.values()]
        self._expected.clear()
        self._announced.clear()
        self._turn.clear()

    def take(self) -> list[KVCacheEvent]:
        """What is new. Cheap between one look and the next."""
        if self._clock() >= self._look_at and (self._expected or self._turn):
            self._look()
        events, self._untold = self._untold, []
        return events

    def _look(self) -> None:
        now = self._clock()
        self._look_at = now + _LOOK_SECONDS
        expected = [key for key, _ in zip(self._expected, range(_MOST_AT_ONCE), strict=False)]
        announced = [key for key, _ in zip(self._turn, range(_MOST_AT_ONCE), strict=False)]
        tiers = self._store.locate(self._geometry, [*expected, *announced])
        if not tiers:
            return
        for _ in announced:
            self._turn.popleft()
        for key, tier in zip(expected, tiers, strict=False):
            event, until = self._expected.pop(key)
            if tier is not None:
                self._untold.append(event)
                self._announced[key] = event.block_hashes
                self._turn.append(key)
            elif now < until:
                self._expected[key] = event, until
        for key, tier in zip(announced, tiers[len(expected) :], strict=True):
            if tier is None:
                self._untold.append(self._removed(self._announced.pop(key)))
            else:
                self._turn.append(key)

    def _removed(self, hashes: list[Any]) -> BlockRemoved:
        return BlockRemoved(hashes, _MEDIUM, self._group)

    def _stored(self, request: Any, chunk: int) -> BlockStored:
        """The event that `BlockRemoved` of the same hashes takes back."""
        size, num_blocks = self._tokens_per_block, self._geometry.chunk_tokens // self._tokens_per_block
        first = chunk * num_blocks
        of_chunk = request.block_hashes[max(0, first - 1) : first + num_blocks]
        hashes = [kv_cache_utils.maybe_convert_block_hash(of) for of in of_chunk]
        lora = request.lora_request
        return BlockStored(
            block_hashes=hashes[-num_blocks:],
            parent_block_hash=hashes[0] if first else None,
            token_ids=list(request.all_token_ids[first * size : (first + num_blocks) * size]),
            block_size=size,
            lora_id=lora.adapter_id if lora is not None else None,
            medium=_MEDIUM,
            lora_name=lora.name if lora is not None else None,
            extra_keys=_extra_keys(request, [(first + block) * size for block in range(num_blocks)], size),
            group_idx=self._group,
            kv_cache_spec_kind="full_attention",
        )


def _extra_keys(request: Any, starts: Iterable[int], size: int) -> list[tuple[Any, ...] | None] | None:
    """What is in a block's hash besides its tokens, block by block."""
    keys = [kv_cache_utils.generate_block_hash_extra_keys(request, start, start + size, 0)[0] for start in starts]
    untag = getattr(kv_cache_utils, "to_event_extra_keys", None)  # Versions that tag them publish them untagged.
    untagged: list[tuple[Any, ...] | None] | None = untag(keys) if untag is not None else keys
    return untagged
