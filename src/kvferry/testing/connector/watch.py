"""Watches one rank's pool: what a connector loads is the truth, is there when it says so, and nothing else is written.

Before the connector sees a new block it is filled with a mark, a large number that names it. So a block that was saved
too early, too late or never loaded is recognised by what it holds. Knows tensors and block ids; no request's state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from kvferry.connector.api import NO_BLOCK
from kvferry.connector.layout import KvCacheLayout
from kvferry.testing.connector.faults import Fault
from kvferry.testing.connector.session import Session
from kvferry.testing.connector.truth import is_close, kv_pools

_FIRST_MARK = 1 << 20
"""Marks are whole numbers that float32 holds exactly, and larger than any KV."""

Block = tuple[int, int]
"""Layer group and block id."""


@dataclass(slots=True)
class Blocks:
    """A request's blocks from the `first` on: `names[i]` of what is to be there (b"": never full), one list of ids a
    layer group, and whether the block was full only after a later pass."""

    request_id: int
    first: int
    names: list[bytes]
    block_ids: list[list[int]]
    is_late: list[bool] = field(default_factory=list)

    def in_pool(self) -> Iterable[Block]:
        for group, of_group in enumerate(self.block_ids):
            yield from ((group, block_id) for block_id in of_group if block_id != NO_BLOCK)


@dataclass(slots=True)
class PassNotes:
    """What the probe's scheduler half tells its worker halves of a pass, around the connector's own metadata.

    is_broken: there is no metadata, as the connector failed to make it or it cannot cross. hides: the engine computes
    requests that it tells the connector no more of. fresh: blocks that were just handed out. loads, async_loads: what
    the connector promised to load. written: (layer group, block id) that the pass computes into. told: blocks that
    requests own from now on. ended: requests that ended.
    """

    metadata: Any = None
    is_broken: bool = False
    hides: bool = False
    fresh: list[Blocks] = field(default_factory=list)
    loads: list[Blocks] = field(default_factory=list)
    async_loads: list[Blocks] = field(default_factory=list)
    written: list[tuple[int, int]] = field(default_factory=list)
    told: list[Blocks] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)


class PoolWatch:
    """One rank's pool. `part` is (rank, number of ranks)."""

    def __init__(self, session: Session, layout: KvCacheLayout, part: tuple[int, int]) -> None:
        self._session = session
        self._part = part
        self._block_tokens = layout.tokens_per_block
        self._windows = [group.window_size for group in layout.groups]
        self._pools = kv_pools(layout)
        self._place = {
            layer: (group, at) for group in self._pools for at, layer in enumerate(layout.group(group).layer_ids)
        }
        self._words = {group: pool.view(pool.shape[0], -1).view(torch.int32) for group, pool in self._pools.items()}
        self._before = {group: words.clone() for group, words in self._words.items()}
        self._own_marks: dict[Block, float] = {}
        self._held: dict[Block, list[bytes]] = {}
        """Names of what each block was given out for, in order."""
        self._owner: dict[Block, int] = {}
        self._alive: set[int] = set()
        self._loads: list[Blocks] = []
        """The pass's loads that are to be right."""
        self._writable: set[Block] = set()
        """Blocks that the pass's loads or its computing may write."""
        self._async_loads: dict[int, Blocks] = {}
        self._missing: dict[Block, Fault] = {}
        """Blocks that were not loaded when their load was said to be done: it may still write them."""
        self._pending: dict[int, tuple[Fault, str]] = {}
        """What was found of requests' loads, which does not count if the connector says that they failed."""
        self._is_blind = False

    # -- around the hooks --------------------------------------------------------------------------------------------

    def begin_pass(self, notes: PassNotes) -> None:
        """Before the connector is given the pass's metadata."""
        self._alive.difference_update(notes.ended)
        self._find_foreign_writes("between two passes", set())
        for told in notes.told:
            self._alive.add(told.request_id)
            self._owner.update(dict.fromkeys(told.in_pool(), told.request_id))
        for fresh in notes.fresh:
            self._mark(fresh)
        self._alive.difference_update(notes.ended)  # some ended before their first pass
        self._loads = [] if notes.is_broken else notes.loads
        self._writable = {*notes.written, *(block for load in notes.loads for block in load.in_pool())}
        self._async_loads.update({load.request_id: load for load in notes.async_loads})
        self._is_blind = notes.hides
        self._look()

    def _mark(self, blocks: Blocks) -> None:
        for group in self._pools:
            for name, block_id in zip(blocks.names, blocks.block_ids[group], strict=True):
                if block_id != NO_BLOCK:
                    mark = float(_FIRST_MARK + len(self._session.marks))
                    self._session.marks[mark] = name
                    self._own_marks[group, block_id] = mark
                    self._held.setdefault((group, block_id), []).append(name)
                    self._missing.pop((group, block_id), None)
                    self._pools[group][block_id] = mark

    def give_up_loads(self) -> None:
        """A hook raised that the pass's loads depend on: the engine does not trust them."""
        self._loads = []

    def after_layer_load(self, layer: int) -> None:
        """`wait_for_layer_load(layer)` returned."""
        if layer in self._place:
            group, at = self._place[layer]
            for load in self._loads:
                self._check(load, group, at, Fault.LOAD_NOT_AWAITED)

    def end_pass(self) -> None:
        """All layers ran, and the connector was not told yet."""
        self._find_foreign_writes("during a pass", self._writable)
        self._loads = []

    def after_finished(self, loaded: Iterable[int]) -> None:
        """`get_finished` returned: these loads are done on this rank."""
        self._find_foreign_writes("in wait_for_save or get_finished", set())
        for request_id in loaded:
            load = self._async_loads.pop(request_id, None)
            if load is not None:
                for group in self._pools:
                    self._check(load, group, slice(None), Fault.LOAD_EARLY)

    def settle_loads(self, failed: Iterable[int]) -> None:
        """The connector named the loads that failed; what was found of all others counts."""
        for request_id in failed:
            self._pending.pop(request_id, None)
        for fault, seen in self._pending.values():
            self._session.found(fault, seen)
        self._pending.clear()

    # -- bytes of loads ----------------------------------------------------------------------------------------------

    def _check(self, load: Blocks, group: int, layers: int | slice, if_missing: Fault) -> None:
        """Compare a load's blocks, in some layers of a group, with the truth."""
        window = self._windows[group]
        end = (load.first + len(load.names)) * self._block_tokens
        first_needed = 0 if window is None else max(0, end - window + 1) // self._block_tokens
        for index, (name, block_id) in enumerate(zip(load.names, load.block_ids[group], strict=True)):
            if block_id == NO_BLOCK or load.first + index < first_needed:
                continue
            wanted = self._session.truth.get(name, group, *self._part)
            if wanted is None:
                continue
            found = self._pools[group][block_id][layers].to("cpu", torch.float32)
            same = is_close(found, wanted[layers])
            if bool(same.all()):
                continue
            if self._is_marked(found, (group, block_id)):
                self._missing[group, block_id] = if_missing
            if load.request_id not in self._pending:  # one block tells what is wrong with all of a load
                fault, what = self._judge((group, block_id), name, layers, (found, same), if_missing)
                fault = Fault.STALE_IDS if fault is Fault.WRONG_BLOCK and load.is_late[index] else fault
                self._pending[load.request_id] = (
                    fault,
                    f"block {load.first + index} of request {load.request_id} {what}",
                )

    def _is_marked(self, found: torch.Tensor, block: Block) -> bool:
        """Whether some of it is as it was before the connector saw it."""
        return bool((found == self._own_marks.get(block, 0.0)).any())

    def _judge(
        self,
        block: Block,
        name: bytes,
        layers: int | slice,
        compared: tuple[torch.Tensor, torch.Tensor],
        if_missing: Fault,
    ) -> tuple[Fault, str]:
        """What is wrong with a block that does not hold the truth."""
        found, same = compared
        wrong = found[~same]
        marks = wrong[(wrong >= _FIRST_MARK) & (wrong < _FIRST_MARK + len(self._session.marks))]
        if self._is_marked(found, block):
            part = "was not loaded" if marks.numel() == found.numel() else "was loaded in part"
            return if_missing, f"{part} when the connector said it was"
        if marks.numel():
            if self._session.marks.get(float(marks[0]), name) == name:
                return Fault.SAVED_EARLY, "brings what its block held before the pass that computes it"
            return Fault.SAVED_LATE, "brings what its block held after another request was given it"
        if bool((wrong == 0).all()) and bool(same.any()):
            return Fault.SAVED_EARLY, "was saved when it was filled in part"
        truth, (rank, num_ranks) = self._session.truth, self._part
        for other_rank in range(num_ranks):
            if truth.name_of(found, block[0], layers, (other_rank, num_ranks)) == name and other_rank != rank:
                return Fault.RANK_IGNORED, f"brings rank {other_rank}'s part of it"
        other = truth.name_of(found, block[0], layers, self._part)
        if other is None:
            return Fault.WRONG_BYTES, "brings bytes that no block ever held"
        if truth.has_equal_tokens(name, other):
            return Fault.PREFIX_IGNORED, "brings the KV of the same tokens after another prefix"
        if any(name in held and other in held[held.index(name) :] for held in self._held.values()):
            return Fault.SAVED_LATE, "brings the KV of what its block held later"
        return Fault.WRONG_BLOCK, "brings another block's KV"

    # -- writes ------------------------------------------------------------------------------------------------------

    def _find_foreign_writes(self, when: str, allowed: set[Block]) -> None:
        """Complain of blocks that changed since the last look, other than `allowed` and those of asynchronous loads."""
        allowed = allowed.union(*(load.in_pool() for load in self._async_loads.values()))
        for group, words in self._words.items():
            for block_id in (words != self._before[group]).any(1).nonzero()[:, 0].tolist():
                if (group, block_id) not in allowed and not self._is_blind:
                    self._complain((group, block_id), when)
        self._look()

    def _look(self) -> None:
        for group, words in self._words.items():
            self._before[group].copy_(words)

    def _complain(self, block: Block, when: str) -> None:
        owner = self._owner.get(block)
        what = f"pool block {block[1]} was written {when}"
        if owner is None:
            self._session.found(Fault.WRITE_TO_OTHERS, f"{what}; no request has had it")
        elif owner not in self._alive:
            self._session.found(Fault.WRITE_AFTER_END, f"{what}; its request {owner} had ended")
        elif block in self._missing:
            self._session.found(self._missing[block], f"{what}, after the load of request {owner} was said to be done")
        else:
            self._session.found(Fault.WRITE_TO_OTHERS, f"{what}; it is request {owner}'s, and no load was for it")
