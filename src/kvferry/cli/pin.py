"""Keep chunks in a cache server's memory for a time, however full it gets.

At most half of the memory is kept so; what would exceed it is not, and the answer says what is. Give a model, a salt or
a prompt's tokens. Nothing is pinned over a restart.

examples:
  kvferry pin --model SmolLM2-135M-Instruct --tokens-file system-prompt.json --ttl 12h
  kvferry pin --salt tenant-7 --ttl 30m
"""

from __future__ import annotations

import argparse

from kvferry.cli.connection import add_selection_arguments, connect, duration, megabytes, selection
from kvferry.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server, which chunks, and for how long."""
    add_selection_arguments(parser)
    parser.add_argument("--ttl", type=duration, default=3600.0, metavar="TIME", help="90, 15m, 2h, 7d (default 1h)")


def run(arguments: argparse.Namespace) -> int:
    """Say how much is kept."""
    if (arguments.model, arguments.salt) == (None, None):
        raise ConfigError("give --model, --salt, or --model and --tokens-file")
    with connect(arguments) as console:
        tally = console.keep(selection(console, arguments), arguments.ttl)
    print(f"{tally.num_entries:,} entries kept for {arguments.ttl:g} s, {megabytes(tally.num_bytes)}")
    return 0
