"""Bring prompts from a cache server's disk into its memory, before engines ask for them.

Each line of FILE.jsonl is a prompt: {"model": NAME, "tokens": [1, 2, 3], "salt": "tenant-7"}. The salt may be left out.
An engine of that model must be connected. What the server does not have stays out; a full memory evicts what was used
longest ago.

examples:
  kvferry warm prompts.jsonl
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, Final

from kvferry.cli.connection import add_connection_arguments, connect, keys_of, need_models
from kvferry.errors import ConfigError

_LOOK_SECONDS: Final = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which server, and which prompts."""
    add_connection_arguments(parser)
    parser.add_argument("file", metavar="FILE.jsonl", type=Path)


def run(arguments: argparse.Namespace) -> int:
    """Say how much is in memory now."""
    import msgspec

    prompt = msgspec.defstruct("prompt", [("model", str), ("tokens", list[int]), ("salt", str | None, None)])
    decode = msgspec.json.Decoder(prompt, strict=True).decode
    try:
        lines = arguments.file.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{arguments.file}: {error.strerror}") from error
    num_entries = num_in_memory = 0
    with connect(arguments) as console:
        for number, line in enumerate(lines, 1):
            try:
                wanted: Any = decode(line)
            except msgspec.MsgspecError as error:
                raise ConfigError(f"{arguments.file}, line {number}: {error}") from error
            for model in need_models(console, wanted.model):
                keys = keys_of(model, wanted.tokens, wanted.salt)
                while (found := console.prefetch(model, keys, wanted.salt)).num_under_way:
                    time.sleep(_LOOK_SECONDS)
                num_entries += found.num_entries
                num_in_memory += found.num_in_memory
    print(f"{len(lines):,} prompts: {num_in_memory:,} of the {num_entries:,} entries that the server has are in memory")
    return 0
