"""A real server on a loopback port around a tiny model, and OpenAI's own client."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
from openai import AsyncOpenAI, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from kvferry import LLM
from kvferry.serving.server import Server
from kvferry.serving.service import Service
from kvferry.testing.models import make_model

NAME = "tiny"


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A Llama whose likeliest tokens vary, with the tokenizer and chat template of the tiny model."""
    folder = tmp_path_factory.mktemp("chat-model")
    make_model("llama", folder, vocab_size=103, eos_token_id=2, max_position_embeddings=8192)
    for file in tiny_model.iterdir():
        if not (folder / file.name).exists() and file.suffix in {".json", ".jinja"}:
            shutil.copy(file, folder)
    return folder


@dataclass(frozen=True)
class Running:
    """A server in a thread of this process."""

    llm: LLM
    url: str
    http: httpx2.Client

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def openai_async(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def readings(self) -> dict[tuple[str, ...], float]:
        """`/metrics`: (name, values of labels) to value."""
        families = list(text_string_to_metric_families(self.http.get("/metrics").text))
        samples = [sample for family in families for sample in family.samples]
        return {(sample.name, *sample.labels.values()): sample.value for sample in samples}


@contextlib.contextmanager
def running(llm: LLM, *, max_queued: int = 256, grace_seconds: float = 0.0) -> Iterator[Running]:
    ready = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(Service(llm, NAME, max_queued), grace_seconds)
        thread = threading.Thread(target=server.serve_on, args=(listener, ready.set))
        thread.start()
        try:
            assert ready.wait(30)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx2.Client(base_url=url, timeout=60) as http:
                yield Running(llm, url, http)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def serve() -> Callable[..., contextlib.AbstractContextManager[Running]]:
    """A server around an engine for the length of a `with`: (llm, max_queued=256, grace_seconds=0)."""
    return running
