"""A connector for tests: keeps blocks in a dict of this process, and notes every call that the engine makes.

Its two halves meet on a `Shelf`, found by name through the option `shelf`. Loads and saves are asynchronous where the
shelf says so; then a test lets them finish when it wants to. It keeps the contract, so that a test can break it in one
place.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from kvferry.config import KvCacheConnectorConfig
from kvferry.connector.api import (
    NO_BLOCK,
    KvCacheConnectorScheduler,
    KvCacheConnectorWorker,
    Request,
    SchedulerOutput,
)
from kvferry.connector.config import LlmArgs
from kvferry.connector.layout import KvCacheLayout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a hook: its name and what of its arguments a test may want to see."""

    hook: str
    arguments: tuple[Any, ...] = ()


@dataclass(slots=True)
class Shelf:
    """What the halves share and a test looks at.

    blocks: (layer group, content hash) to one block's bytes. may_end_loads, may_end_saves: whether asynchronous ones
    report themselves.
    """

    asynchronous_loads: bool = False
    asynchronous_saves: bool = False
    may_end_loads: bool = True
    may_end_saves: bool = True
    blocks: dict[tuple[int, bytes], torch.Tensor] = field(default_factory=dict)
    num_groups: int = 1
    calls: list[Call] = field(default_factory=list)

    def note(self, hook: str, *arguments: Any) -> None:
        self.calls.append(Call(hook, arguments))

    def called(self, *hooks: str) -> list[Call]:
        """The calls of these hooks, in order."""
        return [call for call in self.calls if call.hook in hooks]


SHELVES: dict[str, Shelf] = {}


def shelf_config(name: str) -> KvCacheConnectorConfig:
    """The connector below on the shelf of this name, which must be in SHELVES by then."""
    return KvCacheConnectorConfig(
        connector_module=__name__,
        connector_scheduler_class=ShelfScheduler.__name__,
        connector_worker_class=ShelfWorker.__name__,
        options={"shelf": name},
    )


class Copy(NamedTuple):
    """One block of a request, in one layer group."""

    request_id: int
    group: int
    content: bytes
    block_id: int


@dataclass(slots=True)
class Copies:
    """A pass's metadata. later: asynchronous loads."""

    loads: list[Copy] = field(default_factory=list)
    later: list[Copy] = field(default_factory=list)
    saves: list[Copy] = field(default_factory=list)


@dataclass(slots=True)
class Tracked:
    """What the scheduler half remembers of a request: `block_ids` is one list a layer group."""

    tokens: list[int]
    salt: str | None
    block_ids: list[list[int]]


class ShelfScheduler(KvCacheConnectorScheduler):
    """Matches and saves whole blocks, of prompts and of what is generated."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._shelf = SHELVES[llm_args.kv_connector_config.options["shelf"]]
        self._block = llm_args.tokens_per_block
        self._planned_loads: dict[int, tuple[int, list[bytes]]] = {}
        self._num_taken: dict[int, int] = {}
        self._tracked: dict[int, Tracked] = {}
        self._copies = Copies()

    def _hashes(self, tokens: Sequence[int], salt: str | None) -> list[bytes]:
        """Contents of full blocks, each named by all tokens up to its end."""
        digest = hashlib.sha256(repr(salt).encode())
        hashes = []
        for start in range(0, len(tokens) - self._block + 1, self._block):
            digest.update(array("q", tokens[start : start + self._block]).tobytes())
            hashes.append(digest.digest())
        return hashes

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        self._shelf.note("get_num_new_matched_tokens", request.request_id, num_computed_tokens)
        tokens = request.get_tokens(0)
        first = num_computed_tokens // self._block
        hashes = self._hashes(tokens[: len(tokens) - 1], request.cache_salt)[first:]
        found = list(itertools.takewhile(self._is_whole, hashes))
        self._planned_loads[request.request_id] = (first, found)
        return len(found) * self._block, bool(found) and self._shelf.asynchronous_loads

    def _is_whole(self, content: bytes) -> bool:
        return all((group, content) in self._shelf.blocks for group in range(self._shelf.num_groups))

    def update_state_after_alloc_by_layer_group(
        self, request: Request, block_ids_by_layer_group: list[list[int]]
    ) -> None:
        self._shelf.note("update_state_after_alloc", request.request_id, _frozen(block_ids_by_layer_group))
        first, found = self._planned_loads.pop(request.request_id)
        self._num_taken[request.request_id] = request.num_connector_matched_tokens
        if request.num_connector_matched_tokens:
            loads = self._copies.later if self._shelf.asynchronous_loads else self._copies.loads
            for group, block_ids in enumerate(block_ids_by_layer_group):
                loads += _existing(request.request_id, group, found, block_ids[first:])

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Copies:
        self._shelf.note("build_connector_meta", scheduler_output)
        for data in scheduler_output.new_requests:
            block_ids = [list(of_group) for of_group in data.new_block_ids_by_layer_group]
            self._tracked[data.request_id] = Tracked(list(data.new_tokens), data.cache_salt, block_ids)
            computed = data.computed_position + self._num_taken.get(data.request_id, 0)
            # From the first block on: what the pool had may be new to the shelf.
            self._save(data.request_id, 0, computed + data.num_scheduled_tokens)
        for data in scheduler_output.cached_requests:
            tracked = self._tracked[data.request_id]
            tracked.tokens += data.new_tokens
            for held, added in zip(tracked.block_ids, data.new_block_ids_by_layer_group, strict=True):
                held.extend(added)
            self._save(data.request_id, data.computed_position, data.computed_position + data.num_scheduled_tokens)
        copies, self._copies = self._copies, Copies()
        return copies

    def _save(self, request_id: int, start: int, end: int) -> None:
        """Plan to save the blocks that a pass over tokens `start` to `end` fills."""
        tracked = self._tracked[request_id]
        first, last = start // self._block, end // self._block
        contents = self._hashes(tracked.tokens[:end], tracked.salt)[first:] if last > first else []
        for group, block_ids in enumerate(tracked.block_ids):
            self._copies.saves += _existing(request_id, group, contents, block_ids[first:last])

    def request_finished_by_layer_group(
        self, request: Request, cache_block_ids_by_layer_group: list[list[int]]
    ) -> bool:
        self._shelf.note("request_finished", request.request_id, _frozen(cache_block_ids_by_layer_group))
        self._tracked.pop(request.request_id, None)
        self._num_taken.pop(request.request_id, None)
        return self._shelf.asynchronous_saves

    def cancel_load(self, request: Request, start: int, end: int) -> None:
        self._shelf.note("cancel_load", request.request_id, start, end)

    def shutdown(self) -> None:
        self._shelf.note("scheduler.shutdown")


def _existing(request_id: int, group: int, contents: Sequence[bytes], block_ids: Sequence[int]) -> list[Copy]:
    """Contents with their blocks, less those that the group does not have."""
    pairs = zip(contents, block_ids, strict=False)
    return [Copy(request_id, group, content, block_id) for content, block_id in pairs if block_id != NO_BLOCK]


def _frozen(groups: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(of_group) for of_group in groups)


class ShelfWorker(KvCacheConnectorWorker):
    """Loads when a pass starts, asynchronously when it reports so, and saves when a pass ends."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        # In another rank's process the worker is alone with a shelf of its own, for its part of the KV.
        self._shelf = SHELVES.setdefault(llm_args.kv_connector_config.options["shelf"], Shelf())
        self._has_loaded = False
        self._later: list[Copy] = []
        self._loading: list[int] = []
        self._saving: list[int] = []

    def register_kv_cache_layout(self, layout: KvCacheLayout) -> None:
        self._shelf.note("register_kv_cache_layout", layout)
        self._shelf.num_groups = len(layout.groups)
        self._pools = [group.regions[0].as_tensor() for group in layout.groups]

    def bind_connector_meta(self, metadata: object) -> None:
        self._shelf.note("bind_connector_meta")
        super().bind_connector_meta(metadata)
        self._has_loaded = False
        self._later += self._metadata.later

    def _load(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self._pools[copy.group][copy.block_id] = self._shelf.blocks[copy.group, copy.content]

    def _save(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            self._shelf.blocks.setdefault((copy.group, copy.content), self._pools[copy.group][copy.block_id].clone())

    def start_load_kv(self, stream: Any) -> None:
        self._shelf.note("start_load_kv")
        self._load(self._metadata.loads)
        self._has_loaded = True

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        self._shelf.note("wait_for_layer_load", layer_idx)

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        self._shelf.note("save_kv_layer", layer_idx)

    def wait_for_save(self, stream: Any) -> None:
        self._shelf.note("wait_for_save")
        if self._has_loaded:  # or else the pass computed on garbage
            self._save(self._metadata.saves)

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        self._shelf.note("get_finished", tuple(finished_gen_req_ids), tuple(started_loading_req_ids))
        self._saving += finished_gen_req_ids
        self._loading += started_loading_req_ids
        saved, loaded = [], []
        if self._shelf.may_end_saves:
            saved, self._saving = self._saving, []
        if self._shelf.may_end_loads:
            loaded, self._loading = self._loading, []
            self._load(self._take_later(loaded))
        return saved, loaded

    def _take_later(self, request_ids: list[int]) -> list[Copy]:
        taken = [copy for copy in self._later if copy.request_id in request_ids]
        self._later = [copy for copy in self._later if copy.request_id not in request_ids]
        return taken

    def shutdown(self) -> None:
        self._shelf.note("worker.shutdown")
