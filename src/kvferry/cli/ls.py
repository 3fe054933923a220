"""List what a cache server has in memory, by model and cache salt.

A tag stands for a model with its type, shape and partition; the names are those of engines that are connected. Salts
are shown as tags alone. Other commands take these tags for names.

examples:
  kvferry ls
  kvferry ls --model SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse

from kvferry.cli.connection import add_connection_arguments, connect, find_models, megabytes
from kvferry.observability.columns import aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server, and which model."""
    add_connection_arguments(parser)
    parser.add_argument("--model", metavar="NAME", help="this model alone")


def run(arguments: argparse.Namespace) -> int:
    """Print a table."""
    from kvferry.store.keys import geometry_tag

    with connect(arguments) as console:
        names = {geometry_tag(model.root): model.name for model in console.models()}
        usage = console.usage()
        if arguments.model is not None:
            tags = {geometry_tag(model.root) for model in find_models(console, arguments.model)}
            usage = [use for use in usage if use.geometry_tag in tags or use.geometry_tag.hex() == arguments.model]
    rows = [
        (
            use.geometry_tag.hex(),
            use.salt_tag.hex() if any(use.salt_tag) else "-",
            f"{use.num_entries:,}",
            megabytes(use.num_bytes),
            names.get(use.geometry_tag, "-"),
        )
        for use in sorted(usage, key=lambda use: -use.num_bytes)
    ]
    print(aligned(("tag", "salt", "entries", "size", "model"), rows))
    return 0
