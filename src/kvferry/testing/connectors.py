"""A connector for tests: keeps blocks in a dict of this process, and notes every call that the engine makes.

Its two halves meet on a `Shelf`, found by name through the option `shelf`. Loads and saves are asynchronous where the
shelf says so; then a test lets them finish when it wants to.
"""

from __future__ import annotations

import hashlib
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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


@dataclass(slots=True)
class _Copies:
    """A pass's metadata: (layer group, content hash, block id)."""

    loads: list[tuple[int, bytes, int]] = field(default_factory=list)
    saves: list[tuple[int, bytes, int]] = field(default_factory=list)


class ShelfScheduler(KvCacheConnectorScheduler):
    """Matches and saves whole blocks of prompts."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._shelf = SHELVES[llm_args.kv_connector_config.options["shelf"]]
        self._block = llm_args.tokens_per_block
        self._planned_loads: dict[int, tuple[int, list[bytes]]] = {}
        self._loads: list[tuple[int, bytes, int]] = []

    def _hashes(self, tokens: Sequence[int], salt: str | None) -> list[bytes]:
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
        if request.num_connector_matched_tokens:
            for group, block_ids in enumerate(block_ids_by_layer_group):
                self._loads += _existing(group, found, block_ids[first:])

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> _Copies:
        self._shelf.note("build_connector_meta", scheduler_output)
        copies, self._loads = _Copies(loads=self._loads), []
        for data in scheduler_output.new_requests:
            hashes = self._hashes(data.new_tokens, data.cache_salt)
            for group, block_ids in enumerate(data.new_block_ids_by_layer_group):
                copies.saves += _existing(group, hashes, block_ids)
        return copies

    def request_finished_by_layer_group(
        self, request: Request, cache_block_ids_by_layer_group: list[list[int]]
    ) -> bool:
        self._shelf.note("request_finished", request.request_id, _frozen(cache_block_ids_by_layer_group))
        return self._shelf.asynchronous_saves

    def cancel_load(self, request: Request, start: int, end: int) -> None:
        self._shelf.note("cancel_load", request.request_id, start, end)

    def shutdown(self) -> None:
        self._shelf.note("scheduler.shutdown")


def _existing(group: int, contents: Sequence[bytes], block_ids: Sequence[int]) -> list[tuple[int, bytes, int]]:
    """Contents with their blocks, less those that the group does not have."""
    pairs = zip(contents, block_ids, strict=False)
    return [(group, content, block_id) for content, block_id in pairs if block_id != NO_BLOCK]


def _frozen(groups: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(of_group) for of_group in groups)


class ShelfWorker(KvCacheConnectorWorker):
    """Copies blocks when a pass starts and when it ends. Saves of a chunked prompt's later blocks come too early to be
    of use, so tests that chunk prompts do not look for hits."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        # In another rank's process the worker is alone with a shelf of its own, for its part of the KV.
        self._shelf = SHELVES.setdefault(llm_args.kv_connector_config.options["shelf"], Shelf())
        self._loading: list[int] = []
        self._saving: list[int] = []

    def register_kv_cache_layout(self, layout: KvCacheLayout) -> None:
        self._shelf.note("register_kv_cache_layout", layout)
        self._shelf.num_groups = len(layout.groups)
        self._pools = [group.regions[0].as_tensor() for group in layout.groups]

    def bind_connector_meta(self, metadata: object) -> None:
        self._shelf.note("bind_connector_meta")
        super().bind_connector_meta(metadata)

    def start_load_kv(self, stream: Any) -> None:
        self._shelf.note("start_load_kv")
        for group, content, block_id in self._metadata.loads:
            self._pools[group][block_id] = self._shelf.blocks[group, content]

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        self._shelf.note("wait_for_layer_load", layer_idx)

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        self._shelf.note("save_kv_layer", layer_idx)

    def wait_for_save(self, stream: Any) -> None:
        self._shelf.note("wait_for_save")
        for group, content, block_id in self._metadata.saves:
            self._shelf.blocks.setdefault((group, content), self._pools[group][block_id].clone())

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
        return saved, loaded

    def shutdown(self) -> None:
        self._shelf.note("worker.shutdown")
