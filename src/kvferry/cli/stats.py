"""Show the counters and gauges of a cache server.

examples:
  kvferry stats
  kvferry stats --json | jq .leases
"""

from __future__ import annotations

import argparse

from kvferry.cli.connection import add_connection_arguments, connect
from kvferry.observability.columns import aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server, and in which form."""
    add_connection_arguments(parser)
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print a table, or JSON."""
    import json

    with connect(arguments) as console:
        values = console.stats()
    if arguments.json:
        print(json.dumps(values, sort_keys=True))
    else:
        print(aligned(("name", "value"), [(name, f"{value:g}") for name, value in sorted(values.items())]))
    return 0
