"""Check a KV cache connector: its whole life on the embedded engine.

CONNECTOR is a preset's name, or MODULE:SCHEDULER,WORKER: a module and its two classes, found as `python -m MODULE`
would find it. It runs with a tiny random model through prompts that are cold, in the pool, loaded, cut into parts,
asynchronous, given up, salted, on two ranks, and more. Tokens, loaded bytes and the order of calls are compared with
those of an engine without it, and what is wrong is named, with what the contract says. No GPU is needed.

examples:
  kvferry check kvferry
  kvferry check my_connector:MyScheduler,MyWorker --option folder=/tmp/blocks --persistent
  kvferry check my_connector:MyScheduler,MyWorker --scenario salt --scenario prefix
  kvferry check persistent --json > report.json
  kvferry check --list

In an option's value {tmp} stands for a folder that is removed afterwards.
exit status: 0 all scenarios passed, 1 a fault was found, 2 wrong usage
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvferry.config import KvCacheConnectorConfig
from kvferry.errors import ConfigError
from kvferry.observability.columns import aligned

_OWN_FOLDER = {"persistent": "folder"}
"""Presets that keep files in the user's home unless this option says where: checked in a folder that is removed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Connector, scenarios and engine."""
    parser.add_argument("connector", metavar="CONNECTOR", nargs="?", help="preset, or MODULE:SCHEDULER,WORKER")
    parser.add_argument("--scenario", action="append", default=[], metavar="NAME", help="run this one (repeatable)")
    parser.add_argument("--list", action="store_true", help="list scenarios and the names of faults, and do nothing")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    connector = parser.add_argument_group("connector")
    connector.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="its option (repeatable)")
    connector.add_argument("--server-url", metavar="URL", help="for connectors that talk to a server")
    connector.add_argument("--persistent", action="store_true", help="it must find what it saved in the next engine")
    connector.add_argument(
        "--chunk-tokens", type=int, metavar="N", help="the fewest tokens that it keeps (default 256)"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--model", metavar="MODEL", help="a folder or hub name, instead of a tiny random model")
    engine.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    engine.add_argument("--block-tokens", type=int, metavar="N", help="tokens per block (default 32)")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; progress goes to standard error."""
    from transformers.utils.logging import disable_progress_bar

    from kvferry import LLM  # noqa: F401 - says what to install where the engine's packages are missing
    from kvferry.testing.connector import CheckOptions, check_connector

    if arguments.list:
        _print_lists()
        return 0
    if arguments.connector is None:
        raise ConfigError("no CONNECTOR is given: a preset (see kvferry connectors) or MODULE:SCHEDULER,WORKER")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    sizes = {"chunk_tokens": arguments.chunk_tokens, "tokens_per_block": arguments.block_tokens}
    options = CheckOptions(
        model=arguments.model,
        device=arguments.device,
        expect_restart_hit=arguments.persistent,
        **{name: size for name, size in sizes.items() if size is not None},
    )
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="kvferry-check-") as folder:
        config = _config(arguments, folder)
        report = check_connector(config, arguments.scenario, options, lambda name: print(name, "...", file=sys.stderr))
    print(report.to_json() if arguments.json else report)
    return 0 if report.passed else 1


def _print_lists() -> None:
    from kvferry.testing.connector import SCENARIOS, Fault

    print(aligned(("scenario", "what it is"), [(name, scenario.__doc__ or "") for name, scenario in SCENARIOS.items()]))
    print()
    print(aligned(("fault", "what the contract says"), [(fault.label, fault.contract) for fault in Fault]))


def _config(arguments: argparse.Namespace, folder: str) -> KvCacheConnectorConfig:
    options = dict(_parse_option(text, folder) for text in arguments.option)
    module, colon, classes = arguments.connector.partition(":")
    names = {"connector": module}
    if colon:
        scheduler, _, worker = classes.partition(",")
        if not (scheduler and worker):
            raise ConfigError(f"{arguments.connector!r} is not MODULE:SCHEDULER,WORKER")
        names = {"connector_module": module, "connector_scheduler_class": scheduler, "connector_worker_class": worker}
    elif (own := _OWN_FOLDER.get(module)) is not None:
        options.setdefault(own, folder)
    return KvCacheConnectorConfig(**names, server_url=arguments.server_url, options=options)


def _parse_option(text: str, folder: str) -> tuple[str, Any]:
    """KEY=VALUE, VALUE being JSON if it can be read so, such as a number, and text if not."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError(f"--option {text!r} is not KEY=VALUE")
    value = value.replace("{tmp}", folder)
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
