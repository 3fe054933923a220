"""Engines and a cache server under random kills, for as long as one likes: nothing may grow.

    python -m tests.soak --seconds 60

Four engines in processes of their own share a server with a small arena. Every few seconds one of them, or the server,
is killed and started again. Each engine proves every byte that it reads. In the end the server's books must be right,
no lease and no withdrawn slot may be left, and its memory, descriptors and threads must be what they were.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from kvferry.config import StoreOptions
from kvferry.errors import KVFerryError
from kvferry.server.console import Console
from kvferry.testing.servers import ServerProcess

NUM_ENGINES = 4
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Footprint:
    """What a server's process holds."""

    resident_mb: float
    num_fds: int
    num_threads: int


def footprint(server: ServerProcess) -> Footprint:
    process = Path("/proc", str(server.popen.pid))
    (resident,) = re.findall(r"VmRSS:\s*(\d+) kB", (process / "status").read_text())
    return Footprint(int(resident) / 1e3, len([*(process / "fd").iterdir()]), len([*(process / "task").iterdir()]))


def start_engine(url: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.faulty", "engine", "match", "1000000000", url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)


def end_engine(engine: subprocess.Popen[bytes], number: signal.Signals) -> None:
    engine.send_signal(number)
    engine.wait()
    assert engine.stdout is not None
    engine.stdout.close()


def settled(url: str, seconds: float = 10.0) -> dict[str, float]:
    """The server's figures once nothing is leased or withdrawn. AssertionError: something stays so."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(KVFerryError), Console(url, StoreOptions()) as console:
            console.check()
            stats = console.stats()
            if not (stats["leases"] or stats["slots_withdrawn"]) and stats["server_clients"] == 1:
                return stats
        assert time.monotonic() < end, "leases, slots or clients are left"
        time.sleep(0.1)


def soak(folder: Path, seconds: float, rng: random.Random) -> None:
    arguments = ("--chunk-size", "16", "--l1-size-gb", "0.00006", "--disk-path", str(folder / "disk"))
    with ServerProcess(folder, *arguments, "--disk-size-gb", "0.001") as server:
        engines = [start_engine(server.url) for _ in range(NUM_ENGINES)]
        assert [engine.stdout.readline() for engine in engines if engine.stdout] == [b"ready\n"] * NUM_ENGINES
        time.sleep(2.0)
        first, kills = footprint(server), {"engine": 0, "server": 0}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(rng.uniform(0.2, 3.0))
            assert all(engine.poll() is None for engine in engines), "an engine met a wrong byte or an error"
            if rng.random() < 0.3:
                server.kill()
                server.start()
                kills["server"] += 1
            else:
                number = rng.randrange(NUM_ENGINES)
                end_engine(engines[number], rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
                engines[number] = start_engine(server.url)
                kills["engine"] += 1
        busy = footprint(server)
        for engine in engines:
            end_engine(engine, signal.SIGKILL)
        stats = settled(server.url)
        print(
            f"{seconds:g} s, kills {kills}, evicted {stats.get('evicted_entries', 0):,.0f}, first {first}, last {busy}"
        )
        assert busy.resident_mb < first.resident_mb * 1.3 + 10, "the server's memory grows"
        assert busy.num_fds <= first.num_fds + 8 * NUM_ENGINES, "the server's descriptors grow"
        assert busy.num_threads <= first.num_threads + 2, "the server's threads grow"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvferry-soak-", dir="/dev/shm") as folder:
        soak(Path(folder), arguments.seconds, random.Random(arguments.seed))


if __name__ == "__main__":
    main()
