"""Limits for tests that are about something else than time: the machine may stand still for seconds.

The real ones are short, as whoever misses one loses a hit and nothing more. A test that waits for that hit would fail.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

from kvferry.connector import manager
from kvferry.server import attendance, client, console, sessions
from kvferry.testing import servers

SLOW_HOOK_SECONDS: Final = 60.0
_ANSWER_SECONDS = 8.0
_SILENCE_SECONDS = 60.0

DEADLINES: Final = {
    "KVFERRY_LOAD_DEADLINE_SECONDS": "60",
    "KVFERRY_MATCH_DEADLINE_SECONDS": str(servers.PATIENT["match_deadline_seconds"]),
    "KVFERRY_JOB_DEADLINE_SECONDS": str(servers.PATIENT["job_deadline_seconds"]),
}
"""The environment of engines and servers, also of those in other processes, that are given no deadlines."""

_START = f"""
import sys
from kvferry.cli import main
from kvferry.server import console, sessions
console.CONNECT_SECONDS = {_ANSWER_SECONDS}
sessions.SILENCE_SECONDS = {_SILENCE_SECONDS}
sys.exit(main(sys.argv[1:]))
"""
COMMAND: Final = [sys.executable, "-c", _START]
"""In place of `kvferry`, where it runs no engine."""
_START_ENGINE = """
import sys
from kvferry.cli import main
from kvferry.engine import ranks
from kvferry.testing import patience
patience.be_patient(setattr)
ranks._START = patience.patient_start(ranks._START)
sys.exit(main(sys.argv[1:]))
"""
ENGINE_COMMAND: Final = [sys.executable, "-c", _START_ENGINE]
"""In place of `kvferry`, where it runs one."""

_LIMITS: Final[dict[tuple[Any, str], Any]] = {
    (manager, "SLOW_HOOK_SECONDS"): SLOW_HOOK_SECONDS,
    (attendance, "_BEAT_ANSWER_SECONDS"): _ANSWER_SECONDS,
    (attendance, "_CLOSE_ANSWER_SECONDS"): _ANSWER_SECONDS,
    (attendance, "_SETUP_ANSWER_SECONDS"): _ANSWER_SECONDS,
    (client, "_PROOF_SECONDS"): _ANSWER_SECONDS,
    (console, "CONNECT_SECONDS"): _ANSWER_SECONDS,
    (sessions, "SILENCE_SECONDS"): _SILENCE_SECONDS,
    (servers, "COMMAND"): [*COMMAND, "server"],
}
_REAL: Final = {(module, name): getattr(module, name) for module, name in _LIMITS if module is not manager}
"""Without that of hooks: as an engine of tests takes a slow one for an error, tests of slow hooks set their own."""


def be_patient(set_value: Callable[[Any, str, Any], None]) -> None:
    """Set limits that a machine which stands still for seconds does not reach. set_value: monkeypatch's `setattr`."""
    for (module, name), value in _LIMITS.items():
        set_value(module, name, value)


def be_real(set_value: Callable[[Any, str, Any], None]) -> None:
    """Set the limits back, for a test that is about them."""
    for (module, name), value in _REAL.items():
        set_value(module, name, value)


def patient_start(start: str) -> str:
    """The code that starts an engine's rank, with a patient one's limit for hooks."""
    import_main, call_main = start.rsplit("; ", 1)
    set_limit = f"from kvferry.connector import manager; manager.SLOW_HOOK_SECONDS = {SLOW_HOOK_SECONDS}"
    return f"{import_main}; {set_limit}; {call_main}"
