"""Counters and gauges by name. Measured code holds a `Meter`; this module knows none of it."""

from __future__ import annotations

import threading


class Meter:
    """Thread-safe counters and gauges. Units belong in the names (`loaded_bytes`, `hit_chunks`)."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._times: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1) -> None:
        """Add to a counter; a counter begins at 0."""
        with self._lock:
            self._values[name] = self._values.get(name, 0) + amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name] = value

    def took(self, name: str, seconds: float) -> None:
        """Count something that took time: `NAME_calls`, `NAME_seconds` in all and `NAME_longest_seconds`."""
        with self._lock:
            of = self._times.setdefault(name, [0, 0.0, 0.0])
            of[0] += 1
            of[1] += seconds
            of[2] = max(of[2], seconds)

    def snapshot(self) -> dict[str, float]:
        """All values as they are now."""
        with self._lock:
            times = {
                f"{name}_{unit}": value
                for name, of in self._times.items()
                for unit, value in zip(("calls", "seconds", "longest_seconds"), of, strict=True)
            }
            return {**self._values, **times}
