"""What a client may ask, in OpenAI's names, and what that means to the engine. Knows no route.

A parameter that the engine lacks is refused unless its value changes nothing: it is never ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from kvferry.engine.sampling import SamplingParams
from kvferry.engine.text import chat_tokens
from kvferry.serving.refusals import refusal

if TYPE_CHECKING:
    from kvferry.engine.llm import LLM, Prompt

DEFAULT_COMPLETION_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0
_PASSED_ON = ("temperature", "top_p", "seed", "stop", "ignore_eos", "cache_salt")

HARMLESS = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prediction"),
    *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
}
"""Parameters that say nothing about the answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
}
"""Parameters that the engine lacks, with the values that ask for nothing. null asks for nothing everywhere."""


class StreamOptions(BaseModel):
    """How to stream. include_usage: a last chunk counts tokens."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = False


class Body(BaseModel):
    """What both endpoints take. Values of another JSON type are refused, not converted."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_supported(self) -> None:
        """HTTPException: a parameter asks for what the engine lacks."""
        for name, value in (self.model_extra or {}).items():
            if not _asks_for_nothing(name, value):
                choices = " or ".join(json.dumps(choice) for choice in NEUTRAL.get(name, ()))
                message = f"{name} is supported only as {choices}" if choices else f"{name} is not supported"
                raise refusal(400, message, name, "unsupported_parameter")

    @property
    def num_requests(self) -> int:
        """How many requests to the engine this makes."""
        return 1

    def requests(self, llm: LLM) -> Sequence[tuple[Prompt, SamplingParams]]:
        """The prompts and how to go on from each; may take as long as tokenising does. RequestError: a wrong value."""
        raise NotImplementedError

    def _sampling(self, default_max_tokens: int) -> SamplingParams:
        """As OpenAI, vLLM and trtllm-serve: a temperature of 1 unless asked otherwise. -1 is vLLM's top_k of all."""
        asked = [self.max_completion_tokens, self.max_tokens, default_max_tokens]
        given = {name: getattr(self, name) for name in _PASSED_ON if getattr(self, name) is not None}
        return SamplingParams(
            max_tokens=next(number for number in asked if number is not None),
            top_k=0 if self.top_k in (None, -1) else self.top_k,
            **({"temperature": DEFAULT_TEMPERATURE} | given),
        )


class CompletionBody(Body):
    """`POST /v1/completions`. prompt: a text or token ids, or a list of such."""

    prompt: str | list[int] | list[str | list[int]]

    @property
    def prompts(self) -> Sequence[Prompt]:
        is_single = isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int)
        return cast("Sequence[Prompt]", [self.prompt] if is_single else self.prompt)

    @property
    def num_requests(self) -> int:
        return len(self.prompts)

    def requests(self, llm: LLM) -> Sequence[tuple[Prompt, SamplingParams]]:
        params = self._sampling(DEFAULT_COMPLETION_TOKENS)
        return [(prompt, params) for prompt in self.prompts]


class TextPart(BaseModel):
    """A part of a message. Images and sounds are refused by their type."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. What else it holds is for the model's template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: str
    content: str | list[TextPart]

    def as_template_reads_it(self) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": self.role, "content": content, **(self.model_extra or {})}


class ChatBody(Body):
    """`POST /v1/chat/completions`. Without a limit of its own an answer may take all that model and pool leave it."""

    messages: Annotated[list[Message], Field(min_length=1)]

    def requests(self, llm: LLM) -> Sequence[tuple[Prompt, SamplingParams]]:
        prompt = chat_tokens(llm.tokenizer, [message.as_template_reads_it() for message in self.messages])
        # At least 1: where nothing is left the engine says by which limit.
        return [(prompt, self._sampling(max(1, llm.max_new_tokens(len(prompt)))))]


def _asks_for_nothing(name: str, value: Any) -> bool:
    if value is None or name in HARMLESS:
        return True
    # In Python, but not in JSON, true is 1.
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL.get(name, ())
    )
