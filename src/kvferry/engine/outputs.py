"""What a caller gets back for a request: text, tokens, why it ended, and where its KV came from."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class FinishReason(enum.StrEnum):
    """Why a request generates no more."""

    STOP = "stop"
    """An end-of-sequence token or a stop string."""
    LENGTH = "length"
    """`max_tokens` were generated."""
    ABORT = "abort"
    """The caller gave it up or the engine ended."""


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Where a prompt's KV came from and how long the first token took.

    num_pool_tokens + num_connector_tokens + num_computed_tokens is the length of the prompt. `ttft_seconds` counts from
    submission; None before the first token.
    """

    num_prompt_tokens: int
    num_pool_tokens: int = 0
    num_connector_tokens: int = 0
    num_computed_tokens: int = 0
    ttft_seconds: float | None = None
    duration_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """What was generated. `finish_reason` is None while it goes on."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request so far. `outputs` has one element, as there are no beams; its fields are readable here too."""

    request_id: int
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    metrics: RequestMetrics
    outputs: tuple[CompletionOutput, ...] = field(default=(CompletionOutput("", ()),))

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.outputs[0].finish_reason

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None
