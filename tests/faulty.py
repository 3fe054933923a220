"""A server or an engine in a process of its own that kills itself, with SIGKILL, at a point of its work.

    python -m tests.faulty server POINT NTH ARGUMENTS...    `kvferry server`
    python -m tests.faulty engine POINT NTH URL             an engine that works until then

The NTH call of the point's function sets a timer of a random half millisecond, so that the end comes before, within or
after it.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

POINTS = {
    "server": {
        "match": "kvferry.store.store:Store.match",
        "reserve": "kvferry.store.arena:Arena.write_header",
        "commit": "kvferry.store.arena:Arena.set_state",
        "evict": "kvferry.store.eviction:Evictor.evict",
        "disk write": "kvferry.store.disk:DiskStore.put",
        "disk read": "kvferry.store.disk:DiskStore.get_into",
    },
    "engine": {
        "match": "kvferry.server.client:StoreClient.match",
        "reserve": "kvferry.server.client:StoreClient.begin_store",
        "copy": "kvferry.transfer.copy:CopyEngine.submit",
        "commit": "kvferry.server.client:StoreClient.done",
    },
}
"""By name, in the order of a chunk's life."""


def arm(point: str, nth: int) -> None:
    """From now on the `nth` call of the function ends this process."""
    module, _, path = point.partition(":")
    owner_name, name = path.split(".")
    owner = getattr(importlib.import_module(module), owner_name)
    function = getattr(owner, name)
    num_calls = 0

    def armed(*arguments: Any, **named: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == nth:
            threading.Thread(target=die, args=(random.uniform(0, 0.0005),)).start()
        return function(*arguments, **named)

    setattr(owner, name, armed)


def die(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def prompt(number: int) -> list[int]:
    """One of many prompts, which share beginnings in pairs."""
    return [number // 2 * 1000 + i for i in range(60)] + [number * 7 + i for i in range(40)]


def work(url: str) -> None:
    """Ask for one prompt after the other, for ever."""
    from tests.test_server_faults import make_engine

    from kvferry.connector import manager
    from kvferry.testing import patience

    manager.SLOW_HOOK_SECONDS = patience.SLOW_HOOK_SECONDS
    engine = make_engine(url)
    print("ready", flush=True)
    while True:
        engine.run(prompt(random.randrange(12)), max_tokens=3)


def main(kind: str, point: str, nth: str, *arguments: str) -> None:
    arm(POINTS[kind][point], int(nth))
    if kind == "engine":
        work(*arguments)
    from kvferry.cli import main as command

    sys.exit(command(["server", *arguments]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(*sys.argv[1:])
