"""Locks of the kernel's on byte ranges of a file, for those who copy to or from it. Knows ranges; not what lies there.

A process may be stopped in the middle of a copy and go on at any later time, so no time-out proves that it copies no
more. Its lock does: the kernel drops it when the holder lets go, or with the holder's process, whatever ended that,
also across containers that share nothing but the file. The locks belong to open file descriptions (F_OFD_SETLK): each
holder opens the file anew, so writers exclude each other and readers within a process as well, and an asker sees those
of its own.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable

_FLOCK = struct.Struct("@hhqqi4x")
"""The kernel's struct flock: type, whence, start, bytes (0: all that follow), process."""


Range = tuple[int, int]
"""Bytes of a file: the first, and the first that is no more of it."""


def lock_ranges(fd: int, ranges: Iterable[Range], *, shared: bool = False) -> int | None:
    """Lock ranges of the file that `fd` is open on, for oneself or shared with others who share them. Returns a
    descriptor: closing it unlocks them. None: someone's lock is in the way, or the kernel gives none."""
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    holder = -1
    try:
        holder = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        for start, end in joined(ranges):
            fcntl.fcntl(holder, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, end - start, 0))
    except OSError:
        if holder >= 0:
            os.close(holder)
        return None
    return holder


def locked_range(fd: int, within: Range) -> Range | None:
    """A range that someone has locked and that overlaps `within`; None: there is none. Not necessarily the first."""
    begin, end = within
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, begin, end - begin, 0)
    kind, _, start, num_bytes, _ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))
    if kind == fcntl.F_UNLCK:
        return None
    return start, start + num_bytes if num_bytes else end


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in as few ranges as can be, ascending."""
    found: list[Range] = []
    reached = -1
    for start, end in sorted(ranges):
        if start > reached:
            found.append((start, end))
            reached = end
        elif end > reached:
            found[-1] = (found[-1][0], end)
            reached = end
    return found
