"""Prints rows as aligned columns. Knows nothing of what they say, and needs no package."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.observability.columns import aligned


def print_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a header and rows of as many cells; the last column is as wide as it likes."""
    print(aligned(header, rows))
