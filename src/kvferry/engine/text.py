"""Between texts and token ids: chats become prompts, and growing lists of ids become text. Knows no request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream

from kvferry.errors import RequestError


def chat_tokens(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The prompt that puts these messages (each with `role` and `content`) to the model, up to where its answer begins.

    RequestError: there is no tokenizer or no chat template, or it does not take these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("a chat needs a model with a tokenizer and a chat template")
    try:
        encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except (TemplateError, TypeError, ValueError, LookupError) as error:
        raise RequestError(f"the model's chat template does not take these messages: {error}") from error
    return list(encoded["input_ids"])


class Detokenizer:
    """One request's text.

    Text that may begin a stop string is held back until that is decided: what was shown is never taken back.
    """

    def __init__(self, tokenizer: Any, stop_strings: tuple[str, ...]) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop_strings = stop_strings
        self._text = ""
        self.stopped = False

    def add(self, token_id: int) -> bool:
        """Take in the next token; true if the text now holds a stop string, before which it ends."""
        piece = self._stream.step(self._backend, token_id)
        if not piece:
            return False
        # A stop string that was not there before must end inside the new piece.
        search_from = max(0, len(self._text) + 1 - max(map(len, self._stop_strings), default=1))
        self._text += piece
        found = [at for stop in self._stop_strings if (at := self._text.find(stop, search_from)) >= 0]
        if found:
            self._text = self._text[: min(found)]
            self.stopped = True
        return self.stopped

    def text(self, *, is_final: bool) -> str:
        """The text so far, without an end that may begin a stop string unless it is final."""
        if is_final or self.stopped:
            return self._text
        held = max((_overlap(self._text, stop) for stop in self._stop_strings), default=0)
        return self._text[: len(self._text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
