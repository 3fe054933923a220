"""Text is decoded as it grows; stop strings end it wherever the tokens split them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvferry.engine.text import Detokenizer


class ByteTokenizer:
    """A tokenizer whose tokens are single bytes, so that every split of a character occurs."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {character: index for index, character in enumerate(alphabet)}
        self.backend_tokenizer = Tokenizer(models.BPE(vocab, []))
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend_tokenizer.decoder = decoders.ByteLevel()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend_tokenizer.encode(text).ids
        return ids


TOKENIZER: Any = ByteTokenizer()


def feed(text: str, stops: tuple[str, ...]) -> tuple[str, list[str], bool]:
    """The final text, the texts shown on the way, and whether a stop string was found."""
    detokenizer, shown = Detokenizer(TOKENIZER, stops), []
    for token in TOKENIZER.encode(text):
        if detokenizer.add(token):
            break
        shown.append(detokenizer.text(is_final=False))
    return detokenizer.text(is_final=True), shown, detokenizer.stopped


@given(st.text(st.sampled_from("abné😀"), max_size=30), st.lists(st.text("abné", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_stop_string_that_completes_first(text: str, stops: list[str]) -> None:
    final, shown, stopped = feed(text, tuple(stops))
    completed = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    assert stopped == bool(completed)
    if completed:
        prefix = text[: completed[0]]
        assert final == prefix[: min(prefix.find(stop) for stop in stops if stop in prefix)]
    else:
        assert final == text
    assert all(final.startswith(part) for part in shown)


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    _, shown, _ = feed("one STO", ("STOP",))
    assert shown == ["o", "on", "one", "one ", "one ", "one ", "one "]
    assert feed("one STO", ("STOP",))[0] == "one STO"


@pytest.mark.parametrize("text", ["é", "日本", "a😀b"])
def test_characters_appear_only_when_complete(text: str) -> None:
    _, shown, _ = feed(text, ())
    assert all("\ufffd" not in part for part in shown)
