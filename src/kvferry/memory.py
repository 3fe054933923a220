"""The process's own memory, by address. Knows nothing of what lies there."""

from __future__ import annotations

import ctypes
from typing import Final

_LIBC: Final = ctypes.CDLL(None)
_MADV_POPULATE_WRITE: Final = 23


def populate(address: int, num_bytes: int) -> None:
    """Have whole pages made, zeroed and mapped now instead of at their first use. Where the kernel cannot, that stays
    as it was. By ctypes: `mmap.madvise` keeps the interpreter's lock, and this takes about 0.7 s a GB."""
    _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_int(_MADV_POPULATE_WRITE))
