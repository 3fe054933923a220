"""The flags with which commands open an engine, and what an engine says while it loads. No command of its own."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, its file of options, and the options that also have a flag."""
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--config", metavar="FILE", help="engine.yaml: keyword arguments of kvferry.LLM")
    parser.add_argument("--connector", metavar="PRESET", help="KV cache connector, instead of the file's")
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", help="auto, cpu or cuda")


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The file's, then the arguments' in their place. ConfigError: the file is wrong."""
    from kvferry.config import KvCacheConnectorConfig, read_engine_yaml

    options = read_engine_yaml(arguments.config) if arguments.config else {}
    if arguments.connector:
        options["kv_connector_config"] = KvCacheConnectorConfig(connector=arguments.connector)
    return options | {name: getattr(arguments, name) for name in ("dtype", "device") if getattr(arguments, name)}


def set_up_output() -> None:
    """The log level as configured, and progress bars for people only."""
    from kvferry.config import load_options
    from kvferry.observability.log import set_level

    set_level(load_options().log_level)
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
