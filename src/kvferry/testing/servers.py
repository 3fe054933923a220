"""Cache servers for tests and benchmarks: in this process, where their store can be seen, or in one of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from kvferry.config import StoreOptions
from kvferry.server.answers import Answerer
from kvferry.server.endpoint import Endpoint
from kvferry.server.server import StoreServer
from kvferry.store.assembly import open_store
from kvferry.store.managed import ManagedStore

PATIENT: Final = {"connect_deadline_seconds": 30.0, "match_deadline_seconds": 8.0, "job_deadline_seconds": 8.0}
"""Deadlines for clients of which the test is about something else: the machine may stand still for seconds."""
COMMAND = [sys.executable, "-m", "kvferry", "server"]
"""What a `ServerProcess` runs, before its arguments."""


@dataclass
class Served:
    """A store and its server in this process."""

    store: ManagedStore
    server: StoreServer
    url: str

    def close(self) -> None:
        """End both, in between which the books must be right."""
        self.server.close()
        self.store.check()
        self.store.close()


def serve(folder: Path, **options: Any) -> Served:
    """A small store, with socket and arena in `folder`."""
    known: dict[str, Any] = {"chunk_tokens": 16, "l1_size_gb": 0.002, "arena_dir": str(folder / "arena")}
    settings = StoreOptions(**(known | options))
    store = open_store(settings)
    url = f"ipc://{folder / 'server.sock'}"
    return Served(store, StoreServer(Answerer(store, settings), Endpoint.parse(url)), url)


class ServerProcess:
    """`kvferry server` with socket and arena in `folder`. `arguments` are more of them. Listens when made, and is
    stopped at the end of a with block."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.url = f"ipc://{folder / 'server.sock'}"
        self._folder = folder
        self.place = ["--socket", self.url, "--arena-dir", str(folder / "arena")]
        self.command = COMMAND
        self.arguments = [*arguments, *self.place]
        self.start()

    def start(self) -> None:
        """Start it again. Returns when it listens."""
        self.popen = subprocess.Popen([*self.command, *self.arguments], stdout=subprocess.PIPE)
        assert self.popen.stdout is not None
        if not self.popen.stdout.readline().startswith(b"kvferry server: "):
            self.kill()
            raise AssertionError("the server does not start")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """End it as nothing else does."""
        self.popen.kill()
        self.popen.wait()
        assert self.popen.stdout is not None
        self.popen.stdout.close()

    def stop(self) -> None:
        """End it cleanly, which leaves nothing."""
        self.popen.terminate()
        try:
            self.popen.wait(30)
        finally:
            self.kill()
        assert self.popen.returncode == 0, f"exit code {self.popen.returncode}"
        left = [path for path in self._folder.rglob("*") if path.suffix in {".sock", ".lock", ".arena"}]
        assert not left, f"left behind: {left}"


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look every few milliseconds. AssertionError: it never was so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.003)
