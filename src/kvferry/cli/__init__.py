"""The command `kvferry`: thin commands that import what they need when they run, so that `--help` is quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import kvferry
from kvferry.errors import KVFerryError

COMMANDS = ("demo", "generate", "server", "keygen", "connectors", "config")
"""Each is a module of this package with `add_arguments(parser)`, `run(arguments) -> int` and a docstring that says
what the command does, with examples."""

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 well, 1 the command's own failure, 2 wrong usage or input."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except KVFerryError as error:
        print(f"kvferry {arguments.command}: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT if isinstance(error, ValueError | ImportError) else EXIT_FAILED
    except ImportError as error:  # an extra is not installed; kvferry's own errors say which
        hint = ": pip install 'kvferry[engine,demo]'" if isinstance(error, ModuleNotFoundError) else ""
        print(f"kvferry {arguments.command}: {error}{hint}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        # The reader has gone. Python would complain again when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvferry", description=(kvferry.__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"kvferry {kvferry.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"kvferry.cli.{name}")
        summary, _, details = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name,
            help=summary.rstrip("."),
            description=summary,
            epilog=details.strip("\n"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
