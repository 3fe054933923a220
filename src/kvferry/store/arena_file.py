"""The files that arenas lie in: in a folder of the user's own, under a lock for as long as their owner lives.

An engine's arena is a file of its own, and files that dead engines left are removed. A server's has a fixed name and
stays, for the next server to take over. Knows names and locks; not what is in a file.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from pathlib import Path
from typing import Final

from kvferry.errors import ArenaError

_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 the folder below is checked to be the user's own
_SERVER_FILE: Final = "server.arena"
_ATTEMPTS: Final = 16


def default_folder() -> Path:
    """Where arenas lie unless an option says otherwise."""
    return Path(_SHARED_MEMORY, f"kvferry-{os.getuid()}")


def engine_file(folder: Path) -> tuple[Path, int]:
    """A new file, locked; those of dead engines are removed. OSError: it cannot be made. ArenaError: the folder is not
    the user's own."""
    make_private(folder)
    _remove_stale(folder)
    for _ in range(_ATTEMPTS):
        file = folder / f"{secrets.token_hex(16)}.arena"
        try:
            fd = _open(file, os.O_CREAT | os.O_EXCL)
        except FileNotFoundError:  # The last owner removed the empty folder just now.
            make_private(folder)
            continue
        # Its name may be taken for a dead owner's before the lock is held: then once more.
        if _locks(fd) and os.fstat(fd).st_nlink:
            return file, fd
        os.close(fd)
    raise OSError(errno.EAGAIN, "other stores keep removing the new file", str(folder))


def server_file(folder: Path) -> tuple[Path, int]:
    """The server's file, locked; empty if there was none. OSError: it cannot be made. ArenaError: another server has
    it, or the folder is not the user's own."""
    file = folder / _SERVER_FILE
    for _ in range(_ATTEMPTS):
        make_private(folder)
        fd = _open(file, os.O_CREAT)
        if not _locks(fd):
            os.close(fd)
            raise ArenaError(f"another server owns {file}")
        status = os.fstat(fd)
        if status.st_nlink and stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid():
            return file, fd
        os.close(fd)
        if status.st_nlink:
            file.unlink()
    raise OSError(errno.EAGAIN, "other servers keep removing the file", str(folder))


def make_private(folder: Path) -> None:
    """Make a folder that only its user can enter, if it is not there. ArenaError: it is, and is not such a folder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ArenaError(f"{folder} is not a folder of user {os.getuid()}")
    if status.st_mode & 0o077:
        raise ArenaError(f"{folder} is open to other users: its mode is {stat.S_IMODE(status.st_mode):o}, not 700")


def _remove_stale(folder: Path) -> None:
    for file in folder.glob("*.arena"):
        if file.name == _SERVER_FILE:
            continue
        try:
            fd = _open(file)
        except OSError:
            continue
        if _locks(fd):
            file.unlink(missing_ok=True)
        os.close(fd)


def _open(file: Path, flags: int = 0) -> int:
    return os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)


def _locks(fd: int) -> bool:
    """Whether the lock could be had; another has it for as long as it lives."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
