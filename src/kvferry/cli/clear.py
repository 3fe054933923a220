"""Drop chunks from a cache server's memory, and those same chunks from its disk.

Without a condition, all; with several, those for which all hold. Chunks that engines are using stay, and so do those
that are pinned, and those that lie on disk alone.

examples:
  kvferry clear
  kvferry clear --salt tenant-7
  kvferry clear --model SmolLM2-135M-Instruct --older-than 2h
"""

from __future__ import annotations

import argparse

from kvferry.cli.connection import add_selection_arguments, connect, duration, megabytes, selection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server, and which chunks."""
    add_selection_arguments(parser)
    parser.add_argument("--older-than", type=duration, metavar="TIME", help="not used for so long: 90, 15m, 2h, 7d")


def run(arguments: argparse.Namespace) -> int:
    """Say how much went."""
    with connect(arguments) as console:
        tally = console.clear(selection(console, arguments))
    print(f"{tally.num_entries:,} entries dropped, {megabytes(tally.num_bytes)}")
    return 0
