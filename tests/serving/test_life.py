"""Requests end with their clients; the server refuses beyond its queue, outlives its engine and ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from kvferry import LLM, KvCacheConfig
from kvferry.cli import main
from kvferry.offload.connector import KVFerryConnectorScheduler
from kvferry.serving import server as server_module
from kvferry.serving.service import Service
from kvferry.testing.patience import ENGINE_COMMAND

Serve = Callable[..., AbstractContextManager[Any]]
LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True}
NOW = "kvferry_requests_now"


@pytest.fixture(autouse=True)
def long_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection is cut because nothing moved for seconds."""
    monkeypatch.setattr(server_module, "_LAST_WORDS_SECONDS", 60)


@pytest.fixture
def llm(chat_model: Path) -> Iterator[LLM]:
    with LLM(str(chat_model), kv_cache_config=KvCacheConfig(max_tokens=8192), max_batch_size=2) as llm:
        yield llm


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def send(server: Any, body: dict[str, Any]) -> socket.socket:
    """A request on a socket of its own, the answer unread."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    client = socket.create_connection((host, int(port)))
    client.sendall(head.encode() + b"\r\n\r\n" + content)
    return client


def states(server: Any) -> tuple[float, float]:
    readings = server.readings()
    return readings[NOW, "running"], readings[NOW, "waiting"]


@pytest.mark.parametrize("stream", [False, True])
def test_requests_end_when_their_clients_go(llm: LLM, serve: Serve, stream: bool) -> None:
    with serve(llm) as server:
        # Two run, the third waits, the fourth asks for two of which none runs.
        bodies = [LONG | {"stream": stream, "prompt": prompt} for prompt in ("a", "b", "c", ["d", "e"])]
        clients = []
        for body in bodies:
            clients.append(send(server, body))
            wait_until(lambda: sum(states(server)) == len(clients) + (len(clients) == 4))
        assert states(server) == (2, 3)
        if stream:
            assert b"200 OK" in clients[0].recv(100)
        for client in clients:
            client.close()
        wait_until(lambda: states(server) == (0, 0))
        llm.check()
        assert not llm._scheduler.has_requests
        readings = server.readings()
        assert readings["kvferry_requests_total", "abort"] == 5
        assert readings[("kvferry_generated_tokens_total",)] < 8000
        assert server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_client_of_openai_s_that_closes_its_stream_ends_the_request(llm: LLM, serve: Serve) -> None:
    with serve(llm) as server, server.openai() as client:
        chunks = client.completions.create(
            model="tiny", prompt="a", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(chunks))
        chunks.close()
        wait_until(lambda: states(server) == (0, 0))
        llm.check()


def test_who_comes_when_the_queue_is_full_is_told_to_come_again(llm: LLM, serve: Serve) -> None:
    with serve(llm, max_queued=2) as server, contextlib.ExitStack() as stack:
        for number in range(4):
            stack.enter_context(send(server, LONG))
            wait_until(lambda: states(server) == (min(number + 1, 2), max(number - 1, 0)))  # noqa: B023 - called at once
        refused = server.http.post("/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "queue_full"
        with server.openai() as client, pytest.raises(openai.RateLimitError, match="2 requests wait already"):
            client.completions.create(model="tiny", prompt="a")
    assert llm.failure is None


def test_when_the_engine_dies_clients_are_told_and_health_says_so(
    llm: LLM, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(llm) as server, server.openai() as client:
        assert server.http.get("/health").status_code == 200
        answers: list[Any] = []
        whole = threading.Thread(target=lambda: answers.append(server.http.post("/v1/completions", json=LONG)))
        whole.start()
        stream = iter(
            client.completions.create(
                model="tiny", prompt="b", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
            )
        )
        next(stream)
        wait_until(lambda: states(server) == (2, 0))
        monkeypatch.setattr(llm._core._executor, "forward", lambda *_: {}[0])
        with pytest.raises(openai.APIError, match="the engine ended"):
            list(stream)
        whole.join()
        after = server.http.post("/v1/completions", json={"prompt": "a"})
        for answer in (*answers, after, server.http.get("/health")):
            assert answer.status_code == 503
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("server_error", "unavailable")
        wait_until(lambda: states(server) == (0, 0))


def test_a_bug_is_a_500_in_openai_s_shape(
    llm: LLM, serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(llm, "generate_async", lambda *_: {}["no such key"])
    with serve(llm) as server:
        answer = server.http.post("/v1/completions", json={"prompt": "a"})
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert "no such key" not in answer.text
    assert "no such key" in caplog.text


def test_what_runs_at_the_end_may_finish_and_what_does_not_is_told(
    llm: LLM, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs is not ended before the grace is over, and here, as nothing may move for seconds, not before what is
    short has ended."""
    answers: dict[str, Any] = {}
    abort_all, aborted_at = Service.abort_all, []

    def abort_all_once_the_short_has_ended(service: Service) -> None:
        aborted_at.append(time.monotonic())
        if "short" in answers:
            abort_all(service)
        else:
            asyncio.get_running_loop().call_later(0.05, service.abort_all)

    monkeypatch.setattr(Service, "abort_all", abort_all_once_the_short_has_ended)

    def ask(name: str, max_tokens: int) -> None:
        body = LONG | {"max_tokens": max_tokens, "stream": name == "stream"}
        answers[name] = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60)

    with serve(llm, grace_seconds=1.0) as server:
        threads = [threading.Thread(target=ask, args=("short", 20))]
        threads += [threading.Thread(target=ask, args=(name, 8000)) for name in ("stream", "whole")]
        for number, thread in enumerate(threads, 1):
            thread.start()
            wait_until(lambda: ("short" in answers) + sum(states(server)) == number)  # noqa: B023 - called at once
        ended_at = time.monotonic()
    assert aborted_at[0] >= ended_at + 1.0
    for thread in threads:
        thread.join()
    assert answers["short"].status_code == 200
    assert answers["whole"].status_code == 503
    assert "gave the request up" in answers["whole"].json()["error"]["message"]
    assert '"error"' in answers["stream"].text
    assert answers["stream"].text.endswith("data: [DONE]\n\n")


ENGINE_YAML = """
kv_cache_config: {max_tokens: 16384}
kv_connector_config: {connector: kvferry, options: {l1_size_gb: 0.05}}
dtype: bfloat16
"""


@pytest.fixture
def arguments(chat_model: Path, tmp_path: Path) -> list[str]:
    """Of a command whose engine has the connector `kvferry`; the type of the file is not the one that counts."""
    config = tmp_path / "engine.yaml"
    config.write_text(ENGINE_YAML)
    engine = ["--config", str(config), "--dtype", "float32"]
    return ["serve", str(chat_model), *engine, "--port", "0", "--served-model-name", "mine", "--grace-seconds", "0.2"]


class Clients:
    """Two clients of a command whose requests go on for long, whole and streamed."""

    def __init__(self, ready_line: str) -> None:
        found = re.fullmatch(r"mine is served at (http://127\.0\.0\.1:\d+)\n", ready_line)
        assert found, ready_line
        self.url = found[1]
        self.answers: list[Any] = []
        self.threads = [threading.Thread(target=self._ask, args=(stream,)) for stream in (False, True)]
        for thread in self.threads:
            thread.start()
        wait_until(lambda: f'{NOW}{{state="running"}} 2.0' in httpx2.get(f"{self.url}/metrics").text)

    def _ask(self, stream: bool) -> None:
        body = LONG | {"max_tokens": 8000, "stream": stream, "model": "mine"}
        self.answers.append(httpx2.post(f"{self.url}/v1/completions", json=body, timeout=60))

    def join(self) -> list[int]:
        """The status of each answer."""
        for thread in self.threads:
            thread.join()
        return sorted(answer.status_code for answer in self.answers)


def maps_arena(pid: int, folder: Path) -> bool:
    return str(folder) in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


def test_sigterm_ends_the_command_in_order(arguments: list[str], arena_folder: Path) -> None:
    python, _, start = ENGINE_COMMAND
    start = f"from kvferry.serving import server\nserver._LAST_WORDS_SECONDS = 60\n{start}"
    command = [python, "-c", start, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            clients = Clients(process.stdout.readline())
            assert maps_arena(process.pid, arena_folder)
            process.terminate()
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, output) == (0, ""), errors
    assert re.fullmatch(r"Loading \S+ \.\.\.\n", errors)
    assert clients.join() == [200, 503]
    assert not list(arena_folder.iterdir())


def test_ctrl_c_ends_the_command_in_order(
    arguments: list[str], arena_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    clients: list[Clients] = []

    def ask_then_interrupt() -> None:
        clients.append(Clients(lines[0]))
        os.kill(os.getpid(), signal.SIGINT)

    def ready(line: str, **_: Any) -> None:
        lines.append(f"{line}\n")
        threading.Thread(target=ask_then_interrupt).start()

    monkeypatch.setattr("kvferry.cli.serve.print", lambda *given, **how: "file" in how or ready(*given), raising=False)
    assert main(arguments) == 0
    assert clients[0].join() == [200, 503]
    assert not list(arena_folder.iterdir())


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_leaves_nothing(
    arguments: list[str], arena_folder: Path, monkeypatch: pytest.MonkeyPatch, end: signal.Signals
) -> None:
    def be_interrupted(_: object) -> None:
        assert maps_arena(os.getpid(), arena_folder)
        signal.raise_signal(end)

    monkeypatch.setattr(KVFerryConnectorScheduler, "wait_for_initialization", be_interrupted)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell leaves it to what it starts with `&`
    try:
        assert main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(arena_folder.iterdir())
    assert not maps_arena(os.getpid(), arena_folder)


def test_an_address_in_use_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "/no/such/model", "--port", str(port)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"kvferry serve: cannot listen on 127.0.0.1:{port}: ")
    assert "in use" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "99999"], "cannot listen on 127.0.0.1:99999"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--max-queued", "0"], "--max-queued must be at least 1"),
        (["--grace-seconds", "inf"], "--grace-seconds a finite number"),
        ([], "/no/such/model is no model"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["serve", "/no/such/model", "--port", "0", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
    assert signal.getsignal(signal.SIGTERM) is before
