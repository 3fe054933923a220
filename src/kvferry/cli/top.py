"""Watch a cache server: hits, bytes, leases, clients and slow answers, drawn anew every second. q or Ctrl-C ends it.

examples:
  kvferry top
  kvferry top --once
"""

from __future__ import annotations

import argparse
import contextlib
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from kvferry.cli.connection import add_connection_arguments, connect, duration, megabytes

if TYPE_CHECKING:
    from kvferry.server.console import Console

_HOME_AND_CLEAR: Final = "\033[H\033[J"
_RATES: Final = {
    "loaded": "loaded_bytes",
    "stored": "stored_bytes",
    "from disk": "disk_read_bytes",
    "to disk": "disk_written_bytes",
}
_MOST_ROWS: Final = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server, and how often."""
    add_connection_arguments(parser)
    parser.add_argument("--interval", type=duration, default=1.0, metavar="TIME", help="between two looks (default 1)")
    parser.add_argument("--once", action="store_true", help="one look, over one interval")


def run(arguments: argparse.Namespace) -> int:
    """Draw until it is ended; where there is no terminal, once."""
    with connect(arguments) as console, _keys() as has_key:
        last, at = console.stats(), time.monotonic()
        while not has_key(arguments.interval):
            now, values = time.monotonic(), console.stats()
            text = "\n".join(_lines(console, values, last, now - at))
            if arguments.once or not sys.stdout.isatty():
                print(text)
                return 0
            print(_HOME_AND_CLEAR + text, flush=True)
            last, at = values, now
    return 0


def _lines(console: Console, values: Mapping[str, float], last: Mapping[str, float], seconds: float) -> Iterator[str]:
    def of(name: str) -> float:
        return values.get(name, 0.0)

    def since(name: str) -> float:
        return of(name) - last.get(name, 0.0)

    hits = {tier: since(f"matched_chunks_{tier}") for tier in ("memory", "disk", "remote")}
    asked = sum(hits.values()) + since("unmatched_chunks")
    shares = ", ".join(f"{tier} {count / asked:.0%}" for tier, count in hits.items() if count)
    yield (
        f"hit rate   {sum(hits.values()) / asked:.0%} of {asked:,.0f} chunks ({shares or 'none'})"
        if asked
        else "hit rate   -"
    )
    size = f"{megabytes(of('entries_bytes'))} of {megabytes(of('arena_bytes'))}"
    yield f"memory     {size}, {of('entries_committed'):,.0f} entries"
    yield f"disk       {megabytes(of('disk_used_bytes'))}"
    yield "copies     " + ", ".join(f"{name} {since(key) / seconds / 1e9:.2f} GB/s" for name, key in _RATES.items())
    yield f"leases     {of('leases'):,.0f}; lapsed {of('lapsed_leases'):,.0f}; evicted {of('evicted_entries'):,.0f}"
    calls = sorted(name.removesuffix("_calls") for name in values if name.endswith("_calls"))
    calls.sort(key=lambda call: -of(f"{call}_longest_seconds"))
    yield f"\n{'answers':<14}{'a second':>10}{'mean ms':>10}{'longest ms':>12}"
    for call in calls[:_MOST_ROWS]:
        count, longest = since(f"{call}_calls"), of(f"{call}_longest_seconds") * 1e3
        mean = since(f"{call}_seconds") / count * 1e3 if count else 0.0
        yield f"{call:<14}{count / seconds:>10,.0f}{mean:>10.3f}{longest:>12.2f}"
    clients = console.clients()
    yield f"\n{len(clients)} clients"
    for client in clients[:_MOST_ROWS]:
        yield f"  {client.pid:<10}{', '.join(client.ranks) or 'asks':<44}{client.name}"


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits so long, or until q is typed in a terminal, and says which."""
    typed = [sys.stdin] if sys.stdin.isatty() else []

    def has_key(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while select.select(typed, [], [], max(0.0, end - time.monotonic()))[0]:
            if sys.stdin.read(1) in {"q", "Q", ""}:
                return True
        return False

    if not typed:
        yield has_key
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield has_key
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
