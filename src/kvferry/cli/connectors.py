"""List the connector presets and whether each can be imported.

examples:
  kvferry connectors
  kvferry generate MODEL -p PROMPT --connector kvferry
"""

from __future__ import annotations

import argparse

from kvferry.observability.columns import aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> int:
    """Print a table of presets; a preset that cannot be imported is listed with the reason."""
    from kvferry.connector.presets import load, presets
    from kvferry.errors import ConnectorImportError

    rows = []
    for name, preset in presets().items():
        try:
            load(preset)
            state = "importable"
        except ConnectorImportError as error:
            state = str(error)
        rows.append((name, preset.module, state))
    print(aligned(("preset", "module", "state"), rows))
    return 0
