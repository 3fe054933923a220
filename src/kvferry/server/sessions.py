"""Who talks to a server: sessions by client id, begun by `Hello` and ended by `Bye`, silence or the process's end.

Knows processes; no socket, no store and no job.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kvferry.server.protocol import Hello

SILENCE_SECONDS: Final = 1.5
"""A client that says nothing for so long is taken for dead. It says something every half second."""

MOST_SESSIONS: Final = 1024
"""More are refused."""


@dataclass(slots=True, eq=False)
class Session:
    """One client. process: readable when it ended. silent_seconds: since it last said something. awaits_until: until
    when its loads may wait for lower tiers. registered: its ranks of engines, each with its geometry's root key."""

    client_id: bytes
    name: str
    pid: int
    process: int | None
    silent_seconds: float = 0.0
    awaits_until: float = 0.0
    registered: dict[tuple[str, int], bytes] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """What the store knows the session by."""
        return self.client_id.hex()

    def has_ended(self) -> bool:
        """Whether its process is known to be gone."""
        return self.process is not None and bool(select.select([self.process], [], [], 0)[0])


class Sessions:
    """Live sessions. Callers serialise."""

    def __init__(self) -> None:
        self._by_client: dict[bytes, Session] = {}

    def __len__(self) -> int:
        return len(self._by_client)

    def __iter__(self) -> Iterator[Session]:
        return iter([*self._by_client.values()])

    def find(self, client_id: bytes) -> Session | None:
        """The client's session, which it shows to be alive by asking."""
        session = self._by_client.get(client_id)
        if session is not None:
            session.silent_seconds = 0.0
        return session

    def begin(self, client_id: bytes, hello: Hello) -> None:
        """A new session, in place of the client's last one, which the caller has ended."""
        assert client_id not in self._by_client
        self._by_client[client_id] = Session(client_id, hello.name, hello.pid, _open_process(hello))

    def end(self, session: Session) -> None:
        """Forget a session."""
        del self._by_client[session.client_id]
        if session.process is not None:
            os.close(session.process)

    def pass_time(self, elapsed_seconds: float) -> list[Session]:
        """Let time pass; returns the sessions whose client is dead by now."""
        for session in self:
            session.silent_seconds += elapsed_seconds
        return [session for session in self if session.silent_seconds > SILENCE_SECONDS or session.has_ended()]


def greeting(version: int, now: float, name: str) -> Hello:
    """This process's `Hello`."""
    return Hello(version, os.getpid(), _start_of(os.getpid()) or 0, _pid_namespace(), now, name)


def _open_process(hello: Hello) -> int | None:
    """A descriptor of the client's process; None if it cannot be seen from here, so that only silence tells its end."""
    if hello.pid_namespace != _pid_namespace():
        return None
    with contextlib.suppress(OSError):
        process = os.pidfd_open(hello.pid)
        if _start_of(hello.pid) == hello.pid_start:
            return process
        os.close(process)  # The client has ended, and another process has its number.
    return None


def _start_of(pid: int) -> int | None:
    """When a process began, in ticks since the machine did: with its id it names it for good."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[19])


def _pid_namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0
