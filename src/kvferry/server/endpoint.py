"""Where a server listens and clients connect: `ipc://PATH` or `tcp://HOST:PORT`. Knows no message.

An ipc socket can be opened by its owner's user alone. A lock beside it tells a server that listens from the file that a
dead one left. TCP without keys is for this machine alone; with CURVE keys nobody is answered who lacks the server's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import zmq

from kvferry.errors import ConfigError, StoreError

_LONGEST_PATH: Final = 107
"""Of a Unix socket, in bytes."""
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_LOCK_ATTEMPTS: Final = 16


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A parsed URL. path: of the socket, for ipc."""

    url: str
    path: Path | None = None
    host: str | None = None

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """ConfigError: it is neither of the two forms, or the path is too long for a socket."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"server URL {url!r}: {error}") from error
        if parts.scheme == "tcp" and host and port and not parts.path:
            return cls(url, host=host)
        path = Path(url.removeprefix("ipc://"))
        if parts.scheme != "ipc" or not path.is_absolute():
            raise ConfigError(f"server URL {url!r} is neither ipc:///PATH nor tcp://HOST:PORT")
        if len(os.fsencode(path)) > _LONGEST_PATH:
            raise ConfigError(f"server URL {url!r}: a socket's path has at most {_LONGEST_PATH} bytes")
        return cls(url, path=path)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return self.path is not None or self.host in _LOOPBACK

    def check_owner(self) -> None:
        """StoreError: another user made the socket, so whoever listens there is not to be trusted."""
        with contextlib.suppress(FileNotFoundError):
            if self.path is not None and (owner := self.path.stat().st_uid) not in {os.getuid(), 0}:
                raise StoreError(f"{self.url} belongs to user {owner}")


class Listener:
    """A bound endpoint. StoreError: another server listens there, or the socket cannot be made."""

    def __init__(self, socket: zmq.Socket[Any], endpoint: Endpoint) -> None:
        self._path = endpoint.path
        self._lock: int | None = None
        try:
            if self._path is None:
                socket.bind(endpoint.url)
            else:
                self._bind_path(socket, self._path)
        except (OSError, zmq.ZMQError) as error:
            self.close()
            raise StoreError(f"no socket can be made at {endpoint.url}: {error}") from error
        except StoreError:
            self.close()
            raise

    def close(self) -> None:
        """Remove the socket's file and its lock."""
        if self._lock is not None:
            assert self._path is not None
            _remove(self._path, self._lock)
            self._lock = None

    def _bind_path(self, socket: zmq.Socket[Any], path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = path.parent.stat()
        is_shared = bool(folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX)
        if is_shared or folder.st_uid not in {os.getuid(), 0}:
            raise StoreError(f"no socket is made in {path.parent}, where other users may put one in its place")
        self._lock = _take_lock(path)
        path.unlink(missing_ok=True)  # A dead server's: the lock was free.
        socket.bind(f"ipc://{path}")
        path.chmod(0o600)


def remove_stale(endpoint: Endpoint, prefix: str) -> None:
    """Remove what dead servers left in the folder of `endpoint`, an ipc one, if its name begins with `prefix`."""
    assert endpoint.path is not None
    for path in endpoint.path.parent.glob(f"{prefix}*.sock"):
        with contextlib.suppress(OSError, StoreError):  # It lives, or another removes it.
            _remove(path, _take_lock(path))


def _remove(path: Path, lock: int) -> None:
    path.unlink(missing_ok=True)
    _lock_path(path).unlink(missing_ok=True)
    os.close(lock)


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _take_lock(path: Path) -> int:
    """The lock beside a socket. Who removes it holds it, so one that was removed meanwhile is taken once more."""
    for _ in range(_LOCK_ATTEMPTS):
        lock = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise StoreError(f"another server listens at ipc://{path}") from error
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)
    raise StoreError(f"other servers keep coming and going at ipc://{path}")
