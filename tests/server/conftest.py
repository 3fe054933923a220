"""Servers with a store of the test's own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvferry.config import StoreOptions
from kvferry.server.answers import Answerer
from kvferry.server.client import StoreClient
from kvferry.server.endpoint import Endpoint
from kvferry.server.server import StoreServer
from kvferry.store.assembly import open_store
from kvferry.store.store import Store


@dataclass
class Served:
    """A store and its server in this process."""

    store: Store
    server: StoreServer
    url: str
    options: StoreOptions

    def close(self) -> None:
        self.server.close()
        self.store.check()
        self.store.close()


def serve(folder: Path, **options: object) -> Served:
    """A small store, with a socket in `folder`."""
    known = {"chunk_tokens": 16, "l1_size_gb": 0.002, "arena_dir": str(folder / "arena")}
    settings = StoreOptions(**(known | options))  # type: ignore[arg-type]
    store = open_store(settings)
    url = f"ipc://{folder / 'server.sock'}"
    return Served(store, StoreServer(Answerer(store, settings), Endpoint.parse(url)), url, settings)


class ServerProcess:
    """`kvferry server` in a process of its own, with its socket and arena in `folder`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.url = f"ipc://{folder / 'server.sock'}"
        self.arguments = [*arguments, "--socket", self.url, "--arena-dir", str(folder / "arena")]
        self.start()

    def start(self) -> None:
        """Return when it listens."""
        command = [sys.executable, "-m", "kvferry", "server", "--chunk-size", "16", "--l1-size-gb", "0.002"]
        self.popen = subprocess.Popen([*command, *self.arguments], stdout=subprocess.PIPE)
        assert self.popen.stdout is not None
        assert self.popen.stdout.readline().startswith(b"kvferry server: ")

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.communicate()

    def stop(self) -> None:
        """Cleanly, which leaves nothing."""
        self.popen.terminate()
        self.popen.communicate(timeout=30)
        assert self.popen.returncode == 0
        assert [path for path in self.folder.rglob("*") if path.suffix in {".sock", ".lock", ".arena"}] == []


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Look every few milliseconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.003)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = serve(tmp_path)
    yield served
    served.close()
    assert [path.name for path in tmp_path.iterdir()] == ["arena"]
    assert not [thread for thread in threading.enumerate() if thread.name == "kvferry-server"]


@pytest.fixture
def make_client() -> Iterator[Callable[..., StoreClient]]:
    """`make_client(url, maps_arena, **options)`; closed at the end."""
    clients: list[StoreClient] = []

    def make(url: str, *, maps_arena: bool = False, **options: object) -> StoreClient:
        clients.append(StoreClient(url, StoreOptions(**options), name="test", maps_arena=maps_arena))  # type: ignore[arg-type]
        return clients[-1]

    yield make
    for client in clients:
        client.close()
