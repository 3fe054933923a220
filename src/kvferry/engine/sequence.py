"""A request inside the engine, and one forward pass over several of them. Knows no tensor, no policy, no connector."""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import overload

from kvferry.connector.api import RequestState
from kvferry.engine.outputs import FinishReason
from kvferry.engine.sampling import SamplingParams


class SequenceStatus(enum.Enum):
    """Where a sequence is. Blocks are held from LOADING on, until it is finished and saved."""

    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One request's tokens, blocks and progress. Satisfies `connector.api.Request`, and has what else connectors for
    TensorRT-LLM read of its requests: `prompt_len`, `context_current_position`, `multimodal_positions`, `state`.

    num_computed: tokens whose KV is in the pool. num_pool_tokens of them came with reused blocks,
    num_connector_matched_tokens from the connector; the rest was computed here.
    block_ids: one list a layer group. num_committed_blocks: leading blocks that other requests may share.
    num_told_tokens, num_told_blocks: what the connector was told of in earlier passes. uses_connector: false once the
    connector has failed to end its load.
    """

    multimodal_positions: tuple[int, ...] = ()

    def __init__(
        self, request_id: int, prompt: AbstractSequence[int], params: SamplingParams, lora_id: str | None = None
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.tokens = list(prompt)
        self.num_prompt_tokens = len(self.tokens)
        self.cache_salt = params.cache_salt
        self.lora_id = lora_id
        self.uses_connector = True
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.block_ids: list[list[int]] = []
        self.block_hashes: list[bytes] = []
        self.told_hashes: list[int] = []
        self.num_committed_blocks = 0
        self.num_told_tokens = 0
        self.num_told_blocks = 0
        self.num_computed = 0
        self.num_pool_tokens = 0
        self.num_connector_matched_tokens = 0
        self.arrived_at = time.perf_counter()
        self.first_token_at: float | None = None
        self.finished_at: float | None = None

    def start_over(self) -> None:
        """Forget blocks and progress, as if it were new, and go on without the connector."""
        self.status = SequenceStatus.WAITING
        self.uses_connector = False
        self.block_ids = []
        self.num_committed_blocks = self.num_told_tokens = self.num_told_blocks = 0
        self.num_computed = self.num_pool_tokens = self.num_connector_matched_tokens = 0

    @overload
    def get_tokens(self, beam: int) -> list[int]: ...

    @overload
    def get_tokens(self) -> list[list[int]]: ...

    def get_tokens(self, beam: int | None = None) -> list[int] | list[list[int]]:
        """Prompt and generated tokens of the one beam, 0, or of all; the list itself, not to be changed."""
        assert not beam, "there are no beams"
        return [self.tokens] if beam is None else self.tokens

    @property
    def prompt_len(self) -> int:
        return self.num_prompt_tokens

    @property
    def context_current_position(self) -> int:
        return self.num_computed

    @property
    def state(self) -> RequestState:
        match self.status:
            case SequenceStatus.LOADING:
                return RequestState.DISAGG_GENERATION_TRANS_IN_PROGRESS
            case SequenceStatus.FINISHED:
                return RequestState.GENERATION_COMPLETE
            case _ if self.num_output_tokens:
                return RequestState.GENERATION_IN_PROGRESS
        return RequestState.CONTEXT_INIT

    @property
    def hash_root(self) -> bytes:
        """Start of the chain of block hashes: sequences with other roots share no blocks."""
        salt, lora = (text.encode() if text is not None else b"" for text in (self.cache_salt, self.lora_id))
        return b"%d:%b%d:%b" % (len(salt), salt, len(lora), lora)

    @property
    def output_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def max_kv_tokens(self) -> int:
        """Most tokens whose KV it can ever hold: the last generated token's is never needed."""
        return self.num_prompt_tokens + self.params.max_tokens - 1

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED


@dataclass(slots=True)
class Slice:
    """A sequence's share of a forward pass: `tokens` at positions `start` and on.

    block_ids: one list a layer group, all blocks up to the end; NO_BLOCK where none of the tokens attends.

    draws: whether the last token's logits give the sequence its next token.
    """

    request_id: int
    tokens: list[int]
    start: int
    block_ids: list[list[int]]
    draws: bool

    @property
    def is_decode_step(self) -> bool:
        """Whether it is one token with a past: those attend together."""
        return len(self.tokens) == 1 and self.start > 0

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(slots=True)
class Batch:
    """One forward pass. Decode steps (slices of one token that have a past) come first, then prefill slices.

    lora_id: the adapter that all of them use, or None.
    """

    slices: list[Slice] = field(default_factory=list)
    lora_id: str | None = None
