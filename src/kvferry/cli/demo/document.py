"""The demo's prompts: questions about a real document, put as a chat. Knows a tokenizer, but no engine."""

from __future__ import annotations

import bisect
import itertools
import re
from dataclasses import dataclass
from typing import Any

from kvferry.engine.text import chat_tokens

TOPICS = ("execmodel", "import", "exceptions", "naming", "strings", "calls")
"""Topics of the standard library's `pydoc_data`, which the document is cut from, in this order."""

QUESTIONS = (
    "What is a code block?",
    "What is a free variable?",
    "When is a NameError raised?",
    "What does the global statement do?",
    "What is a block in Python?",
)

_INSTRUCTION = (
    "You are given a part of Python's language reference. Answer in one short sentence, from this text alone.\n\n"
)


@dataclass(frozen=True, slots=True)
class Prompts:
    """One prompt a question, as token ids; the first `num_shared_tokens` are the same in all of them."""

    questions: tuple[str, ...]
    token_ids: tuple[list[int], ...]
    num_shared_tokens: int


def make_prompts(tokenizer: Any, min_shared_tokens: int) -> Prompts:
    """Cut the document at the first end of a sentence at which the prompts share `min_shared_tokens`.

    tokenizer: transformers' fast tokenizer. ValueError: all topics together are too short.
    """
    text = document()
    ends = [match.end() for match in re.finditer(r"[.:](?=\s*\n|\s+[A-Z*\"])", text)]
    first = bisect.bisect_left(ends, min_shared_tokens, key=lambda end: _ask(tokenizer, text[:end]).num_shared_tokens)
    if first == len(ends):
        raise ValueError(f"the document is too short for {min_shared_tokens} shared tokens")
    return _ask(tokenizer, text[: ends[first]])


def document() -> str:
    """The topics, one after the other."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in TOPICS if name in topics)


def make_other_prompts(tokenizer: Any, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Prompts of `num_tokens` tokens each that share nothing with the document: later pieces of it."""
    tokens = tokenizer.encode(document())
    pieces = [tokens[len(tokens) - (i + 1) * num_tokens : len(tokens) - i * num_tokens] for i in range(num_prompts)]
    assert all(len(piece) == num_tokens for piece in pieces), "the topics are long enough"
    return pieces


def _ask(tokenizer: Any, text: str) -> Prompts:
    system = {"role": "system", "content": _INSTRUCTION + text}
    prompts = [chat_tokens(tokenizer, [system, {"role": "user", "content": question}]) for question in QUESTIONS]
    return Prompts(QUESTIONS, tuple(prompts), _count_shared(prompts))


def _count_shared(prompts: list[list[int]]) -> int:
    columns = zip(*prompts, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
