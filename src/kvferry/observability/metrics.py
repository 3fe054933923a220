"""Counters and gauges by name. Measured code holds a `Meter`; this module knows none of it."""

from __future__ import annotations

import threading
from collections import defaultdict


class Meter:
    """Thread-safe counters and gauges. Units belong in the names (`loaded_bytes`, `hit_chunks`)."""

    def __init__(self) -> None:
        self._values: defaultdict[str, float] = defaultdict(int)
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a counter; a counter begins at 0."""
        with self._lock:
            self._values[name] += amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name] = value

    def took(self, name: str, seconds: float) -> None:
        """Count something that took time: `NAME_calls`, `NAME_seconds` in all and `NAME_longest_seconds`."""
        longest = f"{name}_longest_seconds"
        with self._lock:
            self._values[f"{name}_calls"] += 1
            self._values[f"{name}_seconds"] += seconds
            self._values[longest] = max(self._values[longest], seconds)

    def snapshot(self) -> dict[str, float]:
        """All values as they are now."""
        with self._lock:
            return dict(self._values)
