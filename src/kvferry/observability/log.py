"""Warnings that are said once. Knows nothing of what is said; the logger `kvferry` has no handlers of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable


class OnceLog:
    """Says each message once, for the object that holds it: two stores in one process each have their say.

    Thread-safe. `key` names the occasion, not the text, so that varying details do not repeat it.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: set[Hashable] = set()
        self._lock = threading.Lock()

    def warn(self, key: Hashable, message: str, *args: object) -> bool:
        """Log a warning unless this occasion had one. True: it was logged now."""
        with self._lock:
            if key in self._said:
                return False
            self._said.add(key)
        self._logger.warning(message, *args)
        return True

    def forget(self, key: Hashable) -> bool:
        """The occasion has passed; should it come again, it is said again. True: it had been said."""
        with self._lock:
            was_said = key in self._said
            self._said.discard(key)
        return was_said


def set_level(level: str) -> None:
    """Set the level of the logger `kvferry`: "debug", "info", "warning" or "error"."""
    logging.getLogger("kvferry").setLevel(level.upper())
