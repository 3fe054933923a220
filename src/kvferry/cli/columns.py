"""Prints rows as aligned columns. Knows nothing of what they say, and needs no package."""

from __future__ import annotations

from collections.abc import Sequence


def print_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a header and rows of as many cells; the last column is as wide as it likes."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header) - 1)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)]
        print("  ".join([*cells, row[-1]]).rstrip())


def megabytes(num_bytes: float) -> str:
    """In millions of bytes, which is what sizes of stores are given in a thousand of."""
    return f"{num_bytes / 1e6:,.1f} MB"
