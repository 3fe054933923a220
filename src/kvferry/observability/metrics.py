"""Counters and gauges by name. Measured code holds a `Meter`; this module knows none of it."""

from __future__ import annotations

import threading


class Meter:
    """Thread-safe counters and gauges. Units belong in the names (`loaded_bytes`, `hit_chunks`)."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a counter; a counter begins at 0."""
        with self._lock:
            self._values[name] = self._values.get(name, 0) + amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name] = value

    def snapshot(self) -> dict[str, float]:
        """All values as they are now."""
        with self._lock:
            return dict(self._values)
