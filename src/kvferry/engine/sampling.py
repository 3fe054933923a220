"""What a request asks of generation, and how a token is drawn from logits. Knows no sequence and no schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvferry.errors import RequestError

if TYPE_CHECKING:
    import torch


LOWEST_TEMPERATURE = 1e-6
"""Below it the likeliest token is all but certain, and numbers of 32 bits end."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to generate. Greedy by default.

    max_tokens: most tokens to generate, at least 1.
    temperature: 0 takes the most likely token; above 0 divides the logits before drawing.
    top_k: draw among the k most likely tokens; 0 means all.
    top_p: draw among the fewest tokens whose probabilities add up to this, in (0, 1].
    seed: makes a draw repeatable, whatever else is in the batch; None draws differently each time.
    stop: strings that end generation; the text ends before the first of them. Needs a tokenizer.
    ignore_eos: generate on past the model's end-of-sequence tokens.
    cache_salt: requests of different salts share no KV, neither in the pool nor through a connector.
    retention_priority: how much a connector should want to keep this request's blocks, 0 to 100; told to it as
        `priorities`. None: it is not told.
    """

    max_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    cache_salt: str | None = None
    retention_priority: int | None = None

    def __post_init__(self) -> None:
        if not is_int(self.max_tokens) or self.max_tokens < 1:
            raise RequestError(f"max_tokens must be an integer of at least 1, not {self.max_tokens!r}")
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise RequestError(f"temperature must be a finite number of at least 0, not {self.temperature!r}")
        if not is_int(self.top_k) or self.top_k < 0:
            raise RequestError(f"top_k must be an integer of at least 0 (0: all tokens), not {self.top_k!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be a number above 0 and at most 1, not {self.top_p!r}")
        if self.seed is not None and not (is_int(self.seed) and 0 <= self.seed < 2**63):
            raise RequestError(f"seed must be an integer from 0 to 2**63 - 1, not {self.seed!r}")
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            raise RequestError(f"stop must be non-empty strings, not {self.stop!r}")
        if not (self.cache_salt is None or (isinstance(self.cache_salt, str) and self.cache_salt)):
            raise RequestError(f"cache_salt must be a non-empty string, not {self.cache_salt!r}")
        if self.cache_salt is not None and not is_unicode(self.cache_salt):
            raise RequestError(f"cache_salt must be Unicode text, not {self.cache_salt!r}")
        priority = self.retention_priority
        if not (priority is None or (is_int(priority) and 0 <= priority <= 100)):
            raise RequestError(f"retention_priority must be an integer from 0 to 100, not {priority!r}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: Python's and JSON's may hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_int(value: object) -> bool:
    """Whether it is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def sample(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """Draw one token id from `logits` of shape `[vocab]`."""
    import torch

    if params.temperature == 0:
        return int(logits.argmax())
    logits = logits.float()
    # Measured from the largest: a tiny temperature then ends in minus infinity, which can be drawn from, not in NaN.
    logits = (logits - logits.max()) / max(params.temperature, LOWEST_TEMPERATURE)
    if 0 < params.top_k < logits.numel():
        kth = torch.topk(logits, params.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # A token stays if those before it have not reached top_p yet; the first does, also where top_p rounds to 0.
        beyond = probabilities.cumsum(-1) - probabilities >= params.top_p
        beyond[0] = False
        logits = logits.scatter(0, order, ordered.masked_fill(beyond, -math.inf))
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
