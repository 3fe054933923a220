"""Prove that a cache server's books are right: slots, leases, index and headers. Exit code 1: they are not.

examples:
  kvferry check-store
  kvferry check-store --socket ipc:///run/kvferry/server.sock
"""

from __future__ import annotations

import argparse

from kvferry.cli.connection import add_connection_arguments, connect


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server."""
    add_connection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Say that they are right."""
    with connect(arguments) as console:
        console.check()
        num_entries = console.stats().get("entries_committed", 0)
    print(f"all is well: {num_entries:,.0f} entries")
    return 0
