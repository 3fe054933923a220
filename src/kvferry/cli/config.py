"""Show the effective options and where each came from.

Options are read from the environment (KVFERRY_<NAME>), then from the YAML file that KVFERRY_CONFIG_FILE names, then
from the defaults: the first that sets an option wins.

examples:
  kvferry config
  KVFERRY_L1_SIZE_GB=8 KVFERRY_DISK_PATH=/data/kv kvferry config
  KVFERRY_CONFIG_FILE=kvferry.yaml kvferry config
"""

from __future__ import annotations

import argparse

from kvferry.config import explain_options
from kvferry.observability.columns import aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> int:
    """Print a table of the store's options."""
    rows = [
        (setting.name, "-" if setting.value is None else str(setting.value), setting.source, setting.description)
        for setting in explain_options()
    ]
    print(aligned(("option", "value", "source", "meaning"), rows))
    return 0
