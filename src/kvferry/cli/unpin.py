"""Let chunks leave a cache server's memory again that were pinned. Without a condition, all.

examples:
  kvferry unpin
  kvferry unpin --salt tenant-7
"""

from __future__ import annotations

import argparse

from kvferry.cli.connection import add_selection_arguments, connect, megabytes, selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server, and which chunks."""
    add_selection_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Say how much is not kept any more."""
    with connect(arguments) as console:
        tally = console.unkeep(selection(console, arguments))
    print(f"{tally.num_entries:,} entries are not kept any more, {megabytes(tally.num_bytes)}")
    return 0
