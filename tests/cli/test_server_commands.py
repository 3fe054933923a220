"""The commands that look after a cache server, on a server with a store that the test filled."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvferry.blocks import Geometry, GroupKind, GroupSpec
from kvferry.cli import main
from kvferry.config import StoreOptions
from kvferry.errors import InvariantError
from kvferry.server.client import StoreClient
from kvferry.store.keys import Extras, chunk_keys, geometry_tag, root_key
from kvferry.testing import patience
from kvferry.testing.servers import PATIENT, Served, serve

CHUNK, PART_BYTES = 16, 4096
GEOMETRY = Geometry('{"model": "weights"}', "layout", CHUNK, 1, (GroupSpec(GroupKind.FULL, (0,), PART_BYTES),))
ROOT = root_key(GEOMETRY)
TAG = geometry_tag(ROOT).hex()
TOKENS = list(range(5 * CHUNK + 3))
SALTS = [None, "tenant"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """Five chunks without a salt and five with one, in memory and on disk, and an engine that is connected."""
    served = serve(tmp_path, disk_path=str(tmp_path / "disk"), disk_size_gb=0.01)
    client = StoreClient(served.url, StoreOptions(**PATIENT), name="some/folder/tiny-model")
    client.register("engine", 0, GEOMETRY)
    for salt in SALTS:
        job = client.begin_store(GEOMETRY, chunk_keys(ROOT, TOKENS, CHUNK, Extras(cache_salt=salt)), 0, salt=salt)
        assert job is not None
        client.done(job.job_id, 0, True)
        assert client.match(GEOMETRY, chunk_keys(ROOT, TOKENS, CHUNK, Extras(cache_salt=salt))).num_chunks == 5
    deadline = time.monotonic() + 60
    while served.store.stats().get("disk_written_bytes", 0) < 10 * PART_BYTES:
        assert time.monotonic() < deadline
    yield served
    client.close()
    served.close()


@pytest.fixture
def tokens_file(tmp_path: Path) -> str:
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps(TOKENS))
    return str(path)


def num_entries(served: Served) -> int:
    return sum(use.num_entries for use in served.store.usage())


def test_ls_shows_models_and_salts(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--socket", served.url]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["tag", "salt", "entries", "size", "model"]
    assert len(rows) == 2
    assert all(row.split()[0] == TAG and row.endswith("some/folder/tiny-model") for row in rows)
    for name, count in (("tiny-model", 2), (TAG, 2), ("another", 0)):
        assert main(["ls", "--socket", served.url, "--model", name]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1 + count


def test_stats_as_a_table_and_as_json(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "--socket", served.url, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["entries_committed"] == 10
    assert values["server_clients"] == 2
    assert values["AskMatch_calls"] >= 2
    assert main(["stats", "--socket", served.url]) == 0
    assert "entries_committed" in capsys.readouterr().out


def test_clear_drops_what_is_selected(served: Served, tokens_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["clear", "--socket", served.url]
    assert main([*command, "--older-than", "1h"]) == 0
    assert num_entries(served) == 10
    assert main([*command, "--salt", "nobody"]) == 0
    assert num_entries(served) == 10
    assert main([*command, "--model", "tiny-model", "--salt", "tenant"]) == 0
    assert num_entries(served) == 5
    capsys.readouterr()
    assert main([*command, "--model", TAG, "--tokens-file", tokens_file]) == 0
    assert capsys.readouterr().out.startswith("5 entries dropped")
    assert num_entries(served) == 0


def test_what_is_pinned_is_not_cleared(served: Served, tokens_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pin", "--socket", served.url, "--model", "tiny-model", "--tokens-file", tokens_file]) == 0
    assert capsys.readouterr().out.startswith("5 entries kept for 3600 s")
    assert main(["clear", "--socket", served.url]) == 0
    assert num_entries(served) == 5
    assert main(["unpin", "--socket", served.url]) == 0
    assert main(["clear", "--socket", served.url]) == 0
    assert num_entries(served) == 0


def test_warm_brings_prompts_from_disk(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for entry in [*served.store._index]:  # what `clear` does, but for the disk
        served.store._index.drop(entry)
    assert num_entries(served) == 0
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"model": "tiny-model", "tokens": TOKENS, "salt": salt} for salt in SALTS]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["warm", "--socket", served.url, str(prompts)]) == 0
    assert capsys.readouterr().out.startswith("2 prompts: 10 of the 10 entries")
    assert num_entries(served) == 10
    for text, reason in (("{}", "line 1"), ('{"model": "x", "tokens": []}', "those that are: some/folder")):
        prompts.write_text(text)
        assert main(["warm", "--socket", served.url, str(prompts)]) == 2
        assert reason in capsys.readouterr().err


def test_check_store_says_whether_the_books_are_right(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-store", "--socket", served.url]) == 0
    assert "all is well: 10 entries" in capsys.readouterr().out

    def broken() -> None:
        raise InvariantError("two entries in one slot")

    with monkeypatch.context() as patch:
        patch.setattr(served.store, "check", broken)
        assert main(["check-store", "--socket", served.url]) == 1
    assert "two entries in one slot" in capsys.readouterr().err


def test_top_once(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--socket", served.url, "--once", "--interval", "0.1"]) == 0
    shown = capsys.readouterr().out
    for expected in ("hit rate", "memory", "leases     0", "engine/0", "some/folder/tiny-model", "AskMatch"):
        assert expected in shown


def test_top_in_a_terminal_ends_with_q(served: Served) -> None:
    leader, terminal = pty.openpty()
    command = [*patience.COMMAND, "top", "--socket", served.url, "--interval", "0.1"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    while shown.count(b"\033[H\033[J") < 2:
        shown += os.read(leader, 4096)
    os.write(leader, b"q")
    assert process.wait(60) == 0
    os.close(leader)
    assert b"hit rate" in shown


@pytest.mark.usefixtures("real_limits")
@pytest.mark.parametrize(
    "command",
    [["stats"], ["ls"], ["top"], ["clear"], ["pin", "--salt", "x"], ["unpin"], ["check-store"], ["warm", os.devnull]],
    ids=" ".join,
)
def test_without_a_server_it_is_soon_said(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    assert main([*command, "--socket", f"ipc://{tmp_path / 'server.sock'}"]) == 2
    assert time.monotonic() - start < 15.0, "1 if the machine does not stand still"
    assert "no cache server answers at ipc://" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["pin"], "give --model"),
        (["clear", "--tokens-file", "x"], "takes --model"),
        (["clear", "--tokens-file", "missing", "--model", "tiny-model"], "missing"),
        (["clear", "--model", "another"], "no engine that is connected"),
    ],
)
def test_what_is_wrong_is_said(
    served: Served, command: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--socket", served.url]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["pin", "--ttl", "soon"], ["server", "--quota", "a"], ["server", "--quota", "a=-1"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--host", "127.0.0.1"],
        ["--host", "h", "--port", "1", "--socket", "x"],
        ["--socket", "nonsense"],
        ["--disk-size-gb", "10"],
    ],
)
def test_a_server_without_a_place_is_not_started(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["server", *arguments]) == 2
    assert "kvferry server: " in capsys.readouterr().err
