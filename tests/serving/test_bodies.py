"""What is wrong with a body is said in OpenAI's shape; what cannot be done is refused, never left out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from kvferry import LLM, KvCacheConfig
from kvferry.serving import app

Serve = Callable[..., AbstractContextManager[Any]]
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(chat_model: Path, serve: Serve) -> Iterator[Any]:
    with LLM(str(chat_model), kv_cache_config=KvCacheConfig(max_tokens=512)) as llm:
        with serve(llm, max_queued=8) as server:
            yield server
        llm.check()


def ask(server: Any, body: Any, path: str = "/v1/completions", **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return server.http.post(path, content=content, headers={"Content-Type": "application/json"} | headers)


def explained(answer: Any, status: int) -> dict[str, Any]:
    """The error of an answer, which has nothing but the fields that OpenAI's have."""
    assert answer.status_code == status, answer.text
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return dict(error)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (b"{", None, "not JSON"),
        (b"", None, "must be a JSON object"),
        (b"\xff{}", None, "parsing the body"),
        (b"[" * 100_000, None, "parsing the body"),
        (b"[]", None, "must be a JSON object"),
        (b'"text"', None, "must be a JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', None, "temperature must be a finite number"),
        ({}, "prompt", "Field required"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": 5}, "prompt", "valid string; or Input should be a valid list"),
        ({"prompt": [True]}, "prompt", "valid integer"),
        ({"prompt": [1.5]}, "prompt", "valid integer"),
        ({"prompt": ["a", 5]}, "prompt", "valid string"),
        ({"prompt": ""}, None, "the prompt is empty"),
        ({"prompt": []}, None, "the prompt is empty"),
        ({"prompt": ["a", []]}, None, "the prompt is empty"),
        ({"prompt": "a\ud800"}, None, "surrogate"),
        ({"prompt": [103]}, None, "103 is no token id"),
        ({"prompt": [2**70]}, None, "is no token id"),
        ({"prompt": ["a"] * 9}, "prompt", "9 prompts are more than may ever wait here (8)"),
        ({"prompt": "a" * 512}, None, "exceed the pool's limit of 512 tokens"),
        ({"prompt": "a" * 9000}, None, "exceed the model's limit of 8192 tokens"),
        ({"prompt": "a", "max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"prompt": "a", "max_tokens": 5.0}, "max_tokens", "valid integer"),
        ({"prompt": "a", "max_tokens": 0}, None, "max_tokens must be an integer of at least 1"),
        ({"prompt": "a", "max_tokens": 10**30}, None, "exceed the model's limit"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", "valid number"),
        ({"prompt": "a", "temperature": -1}, None, "temperature must be"),
        ({"prompt": "a", "top_p": 0}, None, "top_p must be"),
        ({"prompt": "a", "top_k": -2}, None, "top_k must be"),
        ({"prompt": "a", "seed": -1}, None, "seed must be"),
        ({"prompt": "a", "stop": 5}, "stop", "valid string"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop", "at most 16 items"),
        ({"prompt": "a", "stop": [""]}, None, "stop must be non-empty"),
        ({"prompt": "a", "cache_salt": ""}, None, "cache_salt must be a non-empty"),
        ({"prompt": "a", "cache_salt": "s" * 257}, "cache_salt", "at most 256 characters"),
        ({"prompt": "a", "cache_salt": "\ud800"}, "cache_salt", "valid string"),
        ({"prompt": "a", "stream": 1}, "stream", "valid boolean"),
        ({"prompt": "a", "stream_options": {"include_usage": 1}}, "stream_options", "valid boolean"),
        ({"prompt": "a", "n": 2}, "n", "n is supported only as 1"),
        ({"prompt": "a", "n": True}, "n", "n is supported only as 1"),
        ({"prompt": "a", "best_of": 3}, "best_of", "best_of is supported only as 1"),
        ({"prompt": "a", "logprobs": 0}, "logprobs", "logprobs is supported only as false"),
        ({"prompt": "a", "echo": True}, "echo", "echo is supported only as false"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "supported only as 0"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias", "supported only as {}"),
        ({"prompt": "a", "tempreature": 0.5}, "tempreature", "tempreature is not supported"),
    ],
)
def test_a_wrong_completion_body_is_a_400(server: Any, body: Any, param: str | None, words: str) -> None:
    error = explained(ask(server, body), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert "surrogate" in words or "\\ud800" not in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "Field required"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": ["hi"]}, "messages", "valid dictionary"),
        ({"messages": [{"role": "user"}]}, "messages", "Field required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "valid string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", "'text'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "does not take these messages"),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools", "tools is supported only as []"),
        ({"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format", 'as {"type": "text"}'),
        ({"messages": CHAT, "logprobs": True}, "logprobs", "logprobs is supported only as false"),
        ({"messages": CHAT, "reasoning_effort": "high"}, "reasoning_effort", "reasoning_effort is not supported"),
        ({"messages": [{"role": "user", "content": "a" * 600}]}, None, "exceed the pool's limit"),
    ],
)
def test_a_wrong_chat_body_is_a_400(server: Any, body: Any, param: str | None, words: str) -> None:
    error = explained(ask(server, body, "/v1/chat/completions"), 400)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
        {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "logit_bias": {}, "suffix": None},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_p": 0.0},
        {"temperature": None, "top_p": None, "stop": None, "seed": None, "max_tokens": None, "tools": None},
        {"top_k": -1, "temperature": 2, "max_completion_tokens": 3, "max_tokens": 500},
        {"temperature": 1e-300, "top_p": 1e-300, "top_k": 2**80},
        {"model": "tiny", "cache_salt": "ä", "stop": [], "stream_options": {"include_usage": True}},
    ],
)
def test_what_changes_nothing_is_taken(server: Any, extra: dict[str, Any]) -> None:
    answer = ask(server, {"prompt": "a", "max_tokens": 2} | extra)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 16


def test_another_model_or_path_is_a_404_and_another_method_a_405(server: Any) -> None:
    error = explained(ask(server, {"prompt": "a", "model": "gpt"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "there is 'tiny'" in error["message"]
    explained(ask(server, {}, "/v1/embeddings"), 404)
    explained(ask(server, {}, "/health"), 405)


def test_a_body_that_is_not_called_json_is_refused(server: Any) -> None:
    error = explained(ask(server, {"prompt": "a"}, **{"Content-Type": "text/plain"}), 400)
    assert "sent as application/json" in error["message"]


def test_a_large_body_is_refused_however_it_comes(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_BODY_BYTES", 1000)
    text = json.dumps({"prompt": "a" * 1000}).encode()
    assert "more than 1000 bytes" in explained(ask(server, text), 413)["message"]
    parts: Iterator[bytes] = iter([text[:600], text[600:]])
    answer = server.http.post("/v1/completions", content=parts, headers={"Content-Type": "application/json"})
    explained(answer, 413)
    assert ask(server, {"prompt": "a" * 400, "max_tokens": 1}).status_code == 200


def test_refused_bodies_are_counted(server: Any) -> None:
    before = server.readings()["kvferry_requests_total", "refused"]
    ask(server, {"prompt": ""})
    ask(server, b"{")
    assert server.readings()["kvferry_requests_total", "refused"] == before + 2


def test_without_a_template_or_tokenizer_there_is_only_what_is_left(tmp_path: Path, serve: Serve) -> None:
    from kvferry.testing.models import make_model

    with LLM(str(make_model("llama", tmp_path))) as llm, serve(llm) as server:
        assert "chat template" in explained(ask(server, {"messages": CHAT}, "/v1/chat/completions"), 400)["message"]
        assert "token ids" in explained(ask(server, {"prompt": "a"}), 400)["message"]
        answer = ask(server, {"prompt": [5, 6], "max_tokens": 3, "return_token_ids": True, "ignore_eos": True}).json()
        assert (answer["choices"][0]["text"], len(answer["choices"][0]["token_ids"])) == ("", 3)
