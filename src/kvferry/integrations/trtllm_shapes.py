"""What TensorRT-LLM has in another shape than kvferry: its KvCacheConfig, its logger, its table of presets.

`trtllm_namespace` says under which names they are found. Imports no torch; the LLM is in `trtllm_llm`.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from typing import Any

import kvferry
from kvferry import config
from kvferry.connector.api import Request
from kvferry.connector.presets import presets

VERSION = f"1.3.0+kvferry.{kvferry.__version__}"
"""The version whose connector API ours follows."""

CONNECTOR_REGISTRY = {
    name: {
        "connector_module": preset.module,
        "connector_scheduler_class": preset.scheduler_class,
        "connector_worker_class": preset.worker_class,
    }
    for name, preset in presets().items()
}


@dataclass(slots=True)
class ScheduledRequests:
    """A pass's requests by what they do in it. Connectors name it in annotations; the engine hands out none."""

    context_requests: list[Request] = field(default_factory=list)
    generation_requests: list[Request] = field(default_factory=list)


class KvCacheConfig(config.KvCacheConfig):
    """kvferry's, which takes TensorRT-LLM's other options too: `config.IgnoredKvCacheOptions` change nothing.

    ConfigError: any other option, or a wrong value.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**config.accept_options(config.KvCacheConfig, options, "of KvCacheConfig"))


class Logger(logging.Logger):
    """Logs to standard output. More than one argument is a format and its values or, where it is none, words."""

    _LEVELS = {  # noqa: RUF012 - as logging's own
        "internal_error": logging.CRITICAL,
        "error": logging.ERROR,
        "warning": logging.WARNING,
        "info": logging.INFO,
        "verbose": logging.DEBUG,
        "debug": logging.DEBUG,
        "trace": logging.DEBUG,
    }

    def __init__(self) -> None:
        super().__init__("TRT-LLM", logging.INFO)
        handler = logging.StreamHandler(sys.stdout)
        form = "[%(asctime)s] [%(name)s] [%(levelname).1s] %(message)s"
        handler.setFormatter(logging.Formatter(form, "%m/%d/%Y-%H:%M:%S"))
        self.addHandler(handler)
        self._said: set[Any] = set()

    def set_level(self, level: str) -> None:
        """Show this level ("error", "warning", "info", "verbose" or "debug") and above."""
        self.setLevel(self._LEVELS[level])

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's own remembers its answers, here for too long
        return level >= self.level

    def _log(self, level: int, msg: object, args: Any, **more: Any) -> None:  # type: ignore[override]
        try:
            text = str(msg) % args if args else str(msg)
        except TypeError:
            text = " ".join(map(str, (msg, *args)))
        super()._log(level, text, (), **more)

    def info_once(self, *words: Any, key: str | None = None) -> None:
        """Log what was not said before: `key`, or the words, name the occasion."""
        self._log_once(logging.INFO, words, key)

    def warning_once(self, *words: Any, key: str | None = None) -> None:
        """As `info_once`."""
        self._log_once(logging.WARNING, words, key)

    def _log_once(self, level: int, words: tuple[Any, ...], key: str | None) -> None:
        occasion = key if key is not None else words
        if occasion not in self._said:
            self._said.add(occasion)
            self.log(level, *words)


logger = Logger()
