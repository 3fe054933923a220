"""How answers look: whole, or as the chunks of a stream of server-sent events. Knows outputs, no HTTP and no engine."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from kvferry.engine.handle import GenerationHandle, follow
from kvferry.engine.outputs import FinishReason, RequestOutput
from kvferry.errors import EngineDeadError
from kvferry.serving.refusals import error_body

DONE = "data: [DONE]\n\n"


class CompletionAnswer:
    """The answer to one body of `/v1/completions`: a choice for each of its prompts.

    model: the name to put on it. shows_tokens: choices and chunks also carry `token_ids`.
    """

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, model: str, *, shows_tokens: bool) -> None:
        self._head = {"id": self.id_prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}
        self._shows_tokens = shows_tokens

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """All choices and what they cost."""
        choices = [
            self._choice(index, self.content(output.text), output.token_ids, output.finish_reason)
            for index, output in enumerate(outputs)
        ]
        return {"object": self.kind, **self._head, "choices": choices, "usage": usage(outputs)}

    def chunk(self, index: int, shown: RequestOutput | None, output: RequestOutput) -> dict[str, Any] | None:
        """What `output` adds to what was shown of choice `index`; None if that is nothing yet.

        An output's text only grows, by whole characters, so the end of it is what is new.
        """
        num_characters, num_tokens = (len(shown.text), len(shown.token_ids)) if shown is not None else (0, 0)
        text, token_ids = output.text[num_characters:], output.token_ids[num_tokens:]
        if not (text or output.finished or (self._shows_tokens and token_ids)):
            return None
        content = self.added(text, is_first=shown is None)
        choice = self._choice(index, content, token_ids, output.finish_reason)
        return {"object": self.chunk_kind, **self._head, "choices": [choice]}

    def usage_chunk(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The last chunk of a client that asked for it."""
        return {"object": self.chunk_kind, **self._head, "choices": [], "usage": usage(outputs)}

    def content(self, text: str) -> dict[str, Any]:
        """A choice's text."""
        return {"text": text}

    def added(self, text: str, *, is_first: bool) -> dict[str, Any]:
        """What a chunk adds to a choice's text."""
        return {"text": text}

    def _choice(
        self, index: int, content: dict[str, Any], token_ids: Sequence[int], reason: FinishReason | None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return choice | {"token_ids": list(token_ids)} if self._shows_tokens else choice


class ChatAnswer(CompletionAnswer):
    """The answer to `/v1/chat/completions`: the assistant's message."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def added(self, text: str, *, is_first: bool) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text} if is_first else {"content": text}}


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens of all choices; cached are those whose KV came from the pool or from the connector."""
    metrics = [output.metrics for output in outputs]
    num_prompt = sum(of_one.num_prompt_tokens for of_one in metrics)
    num_generated = sum(len(output.token_ids) for output in outputs)
    num_cached = sum(of_one.num_pool_tokens + of_one.num_connector_tokens for of_one in metrics)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


async def wait(handles: Sequence[GenerationHandle]) -> list[RequestOutput]:
    """The finished outputs. EngineDeadError: there will be none."""
    outputs = {index: output async for index, output in _follow_to_end(handles)}
    return [outputs[index] for index in range(len(handles))]


async def stream(
    answer: CompletionAnswer, handles: Sequence[GenerationHandle], *, include_usage: bool
) -> AsyncIterator[str]:
    """The answer as server-sent events. An error comes as an event too: the status has long been sent."""
    shown: dict[int, RequestOutput] = {}
    try:
        async for index, output in _follow_to_end(handles):
            chunk = answer.chunk(index, shown.get(index), output)
            if chunk is not None:
                shown[index] = output
                yield _event(chunk | {"usage": None} if include_usage else chunk)
    except EngineDeadError as error:
        yield _event(error_body(error)[1])
    else:
        if include_usage:
            yield _event(answer.usage_chunk([shown[index] for index in range(len(handles))]))
    yield DONE


async def _follow_to_end(handles: Sequence[GenerationHandle]) -> AsyncIterator[tuple[int, RequestOutput]]:
    async for index, output in follow(handles):
        if output.finish_reason is FinishReason.ABORT:
            raise EngineDeadError("the engine gave the request up")
        yield index, output


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
