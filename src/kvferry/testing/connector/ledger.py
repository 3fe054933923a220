"""What the engine told of its requests, kept as a connector must keep it, and whether the engine kept the contract.

Used by the probe and by the recorder of the truth. Knows no tensor and no connector under test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvferry.connector.api import NO_BLOCK, Request, RequestData, SchedulerOutput
from kvferry.engine.block_manager import token_bytes
from kvferry.engine.groups import extend_hashes

Violation = Callable[[str], None]


def content_name(tokens: Sequence[int]) -> bytes:
    """Names a block's own tokens, without those before it."""
    return hashlib.blake2b(token_bytes(tokens), digest_size=16).digest()


@dataclass(slots=True)
class Entry:
    """One request. names[i]: of its i-th block, by all tokens up to its end; only full blocks have one.

    pool_tokens, num_matched, is_async: of the last match. num_taken: what the engine took of it. end: tokens whose KV
    is there after the last pass. num_first_pass: blocks that were full after the first pass.
    """

    request: Request
    tokens: list[int]
    num_prompt: int
    names: list[bytes] = field(default_factory=list)
    block_ids: list[list[int]] = field(default_factory=list)
    pool_tokens: int = 0
    num_matched: int = 0
    is_async: bool = False
    num_taken: int = 0
    end: int = 0
    num_first_pass: int = 0
    is_allocated: bool = False
    has_run: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """One request's part of a pass: the tokens `start` to `end` are computed."""

    entry: Entry
    start: int
    end: int
    is_first: bool


class Ledger:
    """All requests of one engine, by id. `violation` is told what the engine did against the contract."""

    def __init__(self, block_tokens: int, violation: Violation) -> None:
        self.entries: dict[int, Entry] = {}
        self.block_tokens = block_tokens
        self._violation = violation
        self._asked: int | None = None
        """The request that was asked about and has no blocks yet."""

    def _demand(self, holds: bool, what: str) -> None:
        if not holds:
            self._violation(what)

    def matched(self, request: Request, num_computed: int) -> Entry:
        """The match question."""
        request_id, tokens = request.request_id, list(request.get_tokens(0))
        self._demand(self._asked is None, f"request {self._asked} was matched and got no blocks")
        self._demand(request_id not in self.entries, f"request {request_id} was matched twice")
        whole = num_computed % self.block_tokens == 0 and 0 <= num_computed < len(tokens)
        self._demand(whole, f"request {request_id} has {num_computed} of {len(tokens)} tokens in the pool")
        entry = self.entries[request_id] = Entry(request, tokens, len(tokens), pool_tokens=num_computed)
        extend_hashes(entry.names, tokens, b"", self.block_tokens)
        self._asked = request_id
        return entry

    def allocated(self, request: Request, block_ids: Sequence[Sequence[int]]) -> Entry:
        """The blocks of the prompt."""
        entry = self.entries[request.request_id]
        self._demand(self._asked == request.request_id, f"request {request.request_id} got blocks without a match")
        self._asked = None
        self._check_prompt(entry, block_ids)
        entry.block_ids = [list(of_group) for of_group in block_ids]
        entry.num_taken = request.num_connector_matched_tokens
        entry.is_allocated = True
        return entry

    def _check_prompt(self, entry: Entry, block_ids: Sequence[Sequence[int]]) -> None:
        num_blocks = -(-entry.num_prompt // self.block_tokens)
        for of_group in block_ids:
            held = [block_id for block_id in of_group if block_id != NO_BLOCK]
            self._demand(
                len(of_group) == num_blocks and len(held) == len(set(held)) and min(held, default=0) >= 0,
                f"request {entry.request.request_id} of {entry.num_prompt} tokens has blocks {list(of_group)}",
            )

    def advance(self, output: SchedulerOutput) -> list[Share]:
        """A forward pass is planned."""
        shares = [self._share(data, is_first=True) for data in output.new_requests]
        shares += [self._share(data, is_first=False) for data in output.cached_requests]
        return [share for share in shares if share is not None]

    def _share(self, data: RequestData, is_first: bool) -> Share | None:
        entry = self.entries.get(data.request_id)
        if entry is None or not entry.is_allocated:
            self._violation(f"request {data.request_id} is in a pass and was never allocated")
            return None
        self._demand(entry.has_run is not is_first, f"request {data.request_id} is new twice, or was never new")
        start = self._check_first(entry, data) if is_first else self._check_later(entry, data)
        entry.has_run = True
        entry.end = start + data.num_scheduled_tokens
        extend_hashes(entry.names, entry.tokens, b"", self.block_tokens)
        if is_first:
            entry.num_first_pass = entry.end // self.block_tokens
        self._demand(
            data.num_scheduled_tokens > 0 and entry.end <= len(entry.tokens),
            f"request {data.request_id} of {len(entry.tokens)} tokens computes {start} to {entry.end}",
        )
        for of_group in entry.block_ids:
            needed = max(-(-entry.end // self.block_tokens), -(-entry.num_prompt // self.block_tokens))
            self._demand(
                len(of_group) == needed, f"request {data.request_id} has {len(of_group)} of {needed} blocks told"
            )
        return Share(entry, start, entry.end, is_first)

    def _check_first(self, entry: Entry, data: RequestData) -> int:
        self._demand(data.new_tokens == entry.tokens, f"new request {data.request_id} does not bring its prompt")
        self._demand(
            data.computed_position == entry.pool_tokens,
            f"new request {data.request_id}: computed_position {data.computed_position}, pool {entry.pool_tokens}",
        )
        self._check_prompt(entry, data.new_block_ids_by_layer_group)
        entry.block_ids = [list(of_group) for of_group in data.new_block_ids_by_layer_group]
        # The engine takes its word back where an asynchronous load failed.
        entry.num_taken = entry.request.num_connector_matched_tokens
        return data.computed_position + entry.num_taken

    def _check_later(self, entry: Entry, data: RequestData) -> int:
        went_back = entry.num_taken and data.computed_position == entry.pool_tokens
        self._demand(
            bool(went_back) or data.computed_position == entry.end,
            f"request {data.request_id}: computed_position {data.computed_position} after a pass up to {entry.end}",
        )
        self._demand(len(data.new_tokens) <= 1, f"request {data.request_id} brings {len(data.new_tokens)} more tokens")
        entry.tokens += data.new_tokens
        for held, more in zip(entry.block_ids, data.new_block_ids_by_layer_group, strict=True):
            held.extend(more)
        return data.computed_position

    def finished(self, request: Request) -> None:
        """No more tokens."""
        entry = self.entries.pop(request.request_id, None)
        self._demand(entry is not None and entry.is_allocated, f"request {request.request_id} ended twice, or unheard")


_AFTER = {
    "bind_connector_meta": ("get_finished",),
    "start_load_kv": ("bind_connector_meta",),
    "wait_for_layer_load": ("start_load_kv", "save_kv_layer"),
    "save_kv_layer": ("wait_for_layer_load",),
    "wait_for_save": ("start_load_kv", "save_kv_layer"),
    "get_finished": ("wait_for_save", "get_finished"),
}
"""Which hooks of the worker half may come before each. What an engine calls outside iterations is not among them."""


class PassOrder:
    """Whether a worker half is called in the order of the contract."""

    def __init__(self, num_layers: int, violation: Violation) -> None:
        self._num_layers = num_layers
        self._violation = violation
        self._last = "get_finished"
        self._layer = 0

    def called(self, hook: str, layer: int | None = None) -> None:
        """A hook of the worker half is called."""
        if self._last not in _AFTER[hook]:
            self._violation(f"{hook} comes after {self._last}")
        if hook == "wait_for_layer_load" and layer != self._layer:
            self._violation(f"wait_for_layer_load({layer}) where layer {self._layer} is next")
        if hook == "save_kv_layer":
            if layer != self._layer:
                self._violation(f"save_kv_layer({layer}) in layer {self._layer}")
            self._layer += 1
        if hook == "wait_for_save":
            if self._layer not in {0, self._num_layers}:
                self._violation(f"wait_for_save after {self._layer} of {self._num_layers} layers")
            self._layer = 0
        self._last = hook
