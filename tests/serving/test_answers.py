"""What OpenAI's client gets is what the engine says, whole or in a stream, alone or among many."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, SamplingParams
from kvferry.engine.text import chat_tokens

Serve = Callable[..., AbstractContextManager[Any]]
BLOCK, CHUNK, POOL_TOKENS = 4, 16, 512
MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who are you, dear machine?"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 12}
IDS = {"ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def plain(chat_model: Path) -> Iterator[LLM]:
    """An engine that nothing is served from, to compare with."""
    with LLM(str(chat_model), kv_cache_config=KvCacheConfig(tokens_per_block=BLOCK, max_tokens=4096)) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(chat_model: Path, serve: Serve) -> Iterator[Any]:
    connector = KvCacheConnectorConfig(connector="kvferry", options={"chunk_tokens": CHUNK, "l1_size_gb": 0.02})
    cache = KvCacheConfig(tokens_per_block=BLOCK, max_tokens=POOL_TOKENS)
    with LLM(str(chat_model), kv_cache_config=cache, kv_connector_config=connector) as llm, serve(llm) as server:
        yield server
        llm.check()


def test_the_model_is_listed_and_can_be_asked_for(server: Any) -> None:
    with server.openai() as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "kvferry"
        with pytest.raises(openai.NotFoundError, match="no model is called 'other' here"):
            client.models.retrieve("other")


@pytest.mark.parametrize(
    "prompt", ["what is this?", [10, 20, 30, 40], ["one", "or the other"], [[10, 20], [30, 40, 50]]]
)
def test_completions_are_the_engine_s(server: Any, plain: LLM, prompt: Any) -> None:
    with server.openai() as client:
        done = client.completions.create(model="tiny", prompt=prompt, **GREEDY, extra_body=IDS)
    several = isinstance(prompt[0], list) or (isinstance(prompt, list) and isinstance(prompt[0], str))
    outputs = plain.generate(prompt if several else [prompt], SamplingParams(max_tokens=12, ignore_eos=True))
    assert [choice.index for choice in done.choices] == list(range(len(outputs)))
    assert [choice.text for choice in done.choices] == [output.text for output in outputs]
    assert [choice.token_ids for choice in done.choices] == [list(output.token_ids) for output in outputs]
    assert {choice.finish_reason for choice in done.choices} == {"length"}
    assert done.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in outputs)
    assert done.usage.completion_tokens == 12 * len(outputs)


def test_a_chat_is_put_through_the_model_s_template(server: Any, plain: LLM) -> None:
    expected = plain.generate(chat_tokens(plain.tokenizer, MESSAGES), SamplingParams(max_tokens=12))
    parts = [{**MESSAGES[0], "content": [{"type": "text", "text": "be brief"}]}, MESSAGES[1]]
    with server.openai() as client:
        for messages in (MESSAGES, parts):
            done = client.chat.completions.create(model="tiny", messages=messages, **GREEDY)
            message = done.choices[0].message
            assert (message.role, message.content) == ("assistant", expected.text)
            assert done.usage.prompt_tokens == len(expected.prompt_token_ids)


def test_a_chat_without_a_limit_takes_what_the_pool_leaves(server: Any) -> None:
    long: Any = [{"role": "user", "content": "very long indeed " * 28}]
    with server.openai() as client:
        done = client.chat.completions.create(model="tiny", messages=long, extra_body={"ignore_eos": True})
    assert done.choices[0].finish_reason == "length"
    assert done.usage.total_tokens == POOL_TOKENS + 1


def test_streams_add_up_to_whole_answers(server: Any) -> None:
    options: Any = {"model": "tiny", **GREEDY, "extra_body": IDS}
    usage: Any = {"stream": True, "stream_options": {"include_usage": True}}
    with server.openai() as client:
        whole = client.completions.create(prompt=["first", "and second"], **options)
        chunks = list(client.completions.create(prompt=["first", "and second"], **options, **usage))
        for choice in whole.choices:
            parts = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
            assert "".join(part.text for part in parts) == choice.text
            assert [token for part in parts for token in part.token_ids] == choice.token_ids
            assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens

        chat = client.chat.completions.create(messages=MESSAGES, **options)
        deltas = [
            chunk.choices[0].delta
            for chunk in client.chat.completions.create(messages=MESSAGES, **options, stream=True)
        ]
        assert "".join(delta.content for delta in deltas) == chat.choices[0].message.content
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)


def test_a_stream_ends_as_openai_says(server: Any) -> None:
    answer = server.http.post("/v1/completions", json={"prompt": "a", "stream": True, "max_tokens": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]


def test_stop_strings_and_seeds_reach_the_engine(server: Any) -> None:
    with server.openai() as client:
        whole = client.completions.create(model="tiny", prompt="a", **GREEDY, extra_body=IDS).choices[0].text
        stopped = client.completions.create(model="tiny", prompt="a", **GREEDY, stop=[whole[5:8]], extra_body=IDS)
        assert stopped.choices[0].finish_reason == "stop"
        assert stopped.choices[0].text == whole[: whole.index(whole[5:8])]
        drawn = [
            client.completions.create(model="tiny", prompt="a", seed=seed, extra_body=IDS).choices[0]
            for seed in (7, 7, 8)
        ]
    assert drawn[0].text == drawn[1].text != drawn[2].text
    assert len(drawn[0].token_ids) == 16


def test_usage_and_metrics_tell_what_was_cached_and_salts_keep_apart(server: Any) -> None:
    document = "a document that is long enough for a few chunks of sixteen tokens each, yes it is"

    def cached(salt: str | None = None) -> int:
        with server.openai() as client:
            extra = {} if salt is None else {"cache_salt": salt}
            done = client.completions.create(model="tiny", prompt=document, max_tokens=1, extra_body=extra)
        return int(done.usage.prompt_tokens_details.cached_tokens)

    in_blocks = (len(document) - 1) // BLOCK * BLOCK
    assert [cached(), cached(), cached("mine"), cached("mine"), cached("yours")] == [0, in_blocks, 0, in_blocks, 0]
    before = server.readings()
    with server.openai() as client:  # push it out of the pool
        for prompt in ("x" * (POOL_TOKENS - 10), "y" * (POOL_TOKENS - 10)):
            client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert cached() == len(document) // CHUNK * CHUNK
    after = server.readings()
    name = "kvferry_cached_tokens_total"
    assert after[name, "connector"] - before[name, "connector"] == len(document) // CHUNK * CHUNK
    assert after[name, "pool"] == before[name, "pool"]
    loaded = [readings.get(("kvferry_connector_load_tokens_memory",), 0) for readings in (before, after)]
    assert loaded[1] - loaded[0] == len(document) // CHUNK * CHUNK


def test_many_clients_at_once_get_what_each_would_get_alone(server: Any, plain: LLM) -> None:
    prompts = [[3 + (7 * number + 5 * place) % 100 for place in range(20 + number)] for number in range(64)]

    async def ask_all() -> list[Any]:
        async with server.openai_async() as client:
            options: Any = {"model": "tiny", **GREEDY, "extra_body": IDS}
            return await asyncio.gather(*(client.completions.create(prompt=prompt, **options) for prompt in prompts))

    answers = asyncio.run(ask_all())
    expected = plain.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True))
    assert [answer.choices[0].token_ids for answer in answers] == [list(output.token_ids) for output in expected]
    assert server.readings()["kvferry_requests_now", "running"] == 0


CYCLE = "é日😀"


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes that says é日😀 over and over: each of its nine bytes has one successor."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("byte-model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    ids = backend.encode(CYCLE).ids
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(256))
        for projection in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            projection.weight.zero_()
        model.lm_head.weight.zero_()
        for token, successor in zip(ids, ids[1:] + ids[:1], strict=True):
            model.lm_head.weight[successor, token] = 1.0
    model.save_pretrained(folder)
    return folder


def test_a_stream_is_cut_between_characters(byte_model: Path, serve: Serve) -> None:
    with LLM(str(byte_model)) as llm, serve(llm) as server, server.openai() as client:
        for max_tokens in range(1, 12):
            options: Any = {"model": "tiny", "prompt": CYCLE, "temperature": 0, "max_tokens": max_tokens}
            parts = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
            whole = client.completions.create(**options).choices[0].text
            assert "".join(parts) == whole == (CYCLE * 2).encode()[:max_tokens].decode(errors="ignore")
        expected = [*(CYCLE * 4)]
        streamed = [
            chunk.choices[0].text
            for chunk in client.completions.create(
                model="tiny", prompt=CYCLE, temperature=0, max_tokens=36, stream=True
            )
        ]
        assert [character for part in streamed for character in part] == expected
