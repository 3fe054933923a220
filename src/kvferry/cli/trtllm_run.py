"""Run a script written for TensorRT-LLM on the embedded engine, unchanged.

SCRIPT runs as `python SCRIPT ARGS` would run it, except that `tensorrt_llm` is kvferry: its LLM, its connector API and
what else connectors import from it. Everything after SCRIPT is for the script. A connector that the script names by its
own module is found, as the script's folder comes first in sys.path.

examples:
  kvferry trtllm-run llm_kv_cache_connector.py ./model
  kvferry trtllm-run my_connector_test.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import CodeType, ModuleType

from kvferry.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The script, and the rest for it."""
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("args", metavar="ARGS", nargs=argparse.REMAINDER, help="what the script sees in sys.argv")


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 if the script raised; its own SystemExit goes through."""
    from kvferry.integrations.trtllm_namespace import install

    code = _compile(arguments.script)
    if not install():
        raise ConfigError(f"TensorRT-LLM itself is installed here: python {arguments.script} runs the script on it")
    main = ModuleType("__main__")
    main.__file__ = arguments.script
    sys.modules["__main__"] = main
    sys.argv = [arguments.script, *arguments.args]
    sys.path[0] = str(Path(arguments.script).resolve().parent)
    try:
        exec(code, main.__dict__)  # noqa: S102 - it is what the command is for
    except Exception as error:  # noqa: BLE001 - the script's own, shown as Python shows it
        trace = error.__traceback__.tb_next if error.__traceback__ is not None else None
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 1
    return 0


def _compile(script: str) -> CodeType:
    """ConfigError: there is no such file, or it is no Python."""
    try:
        return compile(Path(script).read_bytes(), script, "exec", dont_inherit=True)
    except OSError as error:
        raise ConfigError(f"cannot read the script {script}: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"the script {script} is not Python: {error}") from error
