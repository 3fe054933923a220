"""What the kit can find in a connector, by name, each with what the API's contract says. Knows no engine."""

from __future__ import annotations

import enum


class Fault(enum.Enum):
    """`label` is the name in reports, `contract` what holds instead."""

    CANNOT_START = "cannot-start", "both halves are made from LlmArgs alone, and the worker takes the pool it is given"
    HOOK_MISSING = "hook-missing", "the engine calls every hook of the base classes: derive from them, or write all"
    HOOK_RAISED = "hook-raised", "a hook does not raise: whatever it was about becomes a miss"
    HOOK_HANGS = "hook-hangs", "hooks run in the engine's loop: none may wait without an end"
    BAD_ANSWER = "bad-answer", "a match is (int, bool); get_finished gives a list of saved and a list of loaded ids"
    PARTIAL_BLOCK = "partial-block-matched", "a match is whole blocks; a block that is not full has no KV to be named"
    BEYOND_PROMPT = "matched-beyond-prompt", "a match and the tokens before it are at most the prompt"
    ASYNC_NOTHING = "async-without-tokens", "only a match of tokens can be asynchronous: a miss is (0, False)"
    SALT_IGNORED = "salt-ignored", "requests of different cache_salt never share KV: it belongs into the name"
    PREFIX_IGNORED = "prefix-ignored", "KV depends on all tokens before it: name a block by every token up to its end"
    SAVED_EARLY = "saved-before-computed", "a block is full after the pass that computes its last token; save it then"
    SAVED_LATE = "saved-after-end", "blocks are the engine's again once request_finished answers False: save before"
    LOAD_EARLY = "load-reported-early", "get_finished reports a load when its last byte is in the pool, and not before"
    LOAD_NOT_AWAITED = "load-not-awaited", "when wait_for_layer_load(i) returns, layer i of all loads is in the pool"
    LOAD_ENDLESS = "load-never-ends", "get_finished reports each load that was offered, also one that was cancelled"
    SAVE_ENDLESS = "save-never-ends", "get_finished reports each save that was offered: its blocks wait for it"
    WRONG_BLOCK = "wrong-block", "block i of the prompt goes to the i-th of the request's block ids, and comes from it"
    STALE_IDS = "stale-block-ids", "cached_requests bring only new block ids: append them to those of earlier passes"
    RANK_IGNORED = "rank-ignored", "each rank has its own heads: what one saves is another's only by mistake"
    WRONG_BYTES = "wrong-bytes", "what is loaded is what the engine computed, byte for byte"
    REPORTED_TWICE = "id-reported-twice", "get_finished reports each id once"
    NEVER_OFFERED = "id-never-offered", "get_finished reports only ids that it was offered, each of its own kind"
    WRITE_AFTER_END = "write-after-end", "nothing is written to the blocks of a request that has ended"
    WRITE_TO_OTHERS = "write-to-others", "only blocks that a load was promised for are written, and while it runs"
    METADATA_STUCK = "metadata-cannot-cross", "ranks are processes: metadata is builtins, dataclasses, msgspec Structs"
    WRONG_TOKENS = "wrong-tokens", "tokens are those of an engine without the connector"
    REQUEST_LOST = "request-lost", "every request ends, with its tokens"
    NO_RESTART_HIT = "no-hit-after-restart", "what a persistent connector saved is found by the next engine"
    COMPLAINT = "complaint", "an engine counts what it has to refuse; there is to be nothing"
    ENGINE = "engine-broke-contract", "this is kvferry's own fault, not the connector's: please report it"
    NO_HIT = "no-external-hit", "a prompt that has left the pool is found by the connector, in part at least"
    WHOLE_PROMPT = "matched-whole-prompt", "the last token is always computed: leave it, and with it its block"
    SLOW_HOOK = "slow-hook", "hooks run in the engine's loop: what takes long belongs into a thread"
    LOAD_FAILED = "load-failed", "what was matched can be loaded; now and then a failure is a miss, reported as such"

    def __init__(self, label: str, contract: str) -> None:
        self.label = label
        self.contract = contract

    @property
    def is_warning(self) -> bool:
        """Worth a look, and no breach of the contract."""
        return self in _WARNINGS


_WARNINGS = frozenset({Fault.NO_HIT, Fault.WHOLE_PROMPT, Fault.SLOW_HOOK, Fault.LOAD_FAILED})
