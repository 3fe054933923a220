"""The process's own memory, by address, and the machine's NUMA nodes. Knows nothing of what lies there."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_MADV_POPULATE_WRITE: Final = 23
_MBIND: Final = {"x86_64": 237, "aarch64": 235}.get(platform.machine())
"""The number of the system call, which glibc has no function for."""
_MPOL_PREFERRED, _MPOL_MF_MOVE = 1, 2
_MOST_NODES: Final = 1024
_WORD_BITS: Final = 8 * ctypes.sizeof(ctypes.c_ulong)


def populate(address: int, num_bytes: int) -> None:
    """Have whole pages made, zeroed and mapped now instead of at their first use. Where the kernel cannot, that stays
    as it was. By ctypes: `mmap.madvise` keeps the interpreter's lock, and this takes about 0.7 s a GB."""
    _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), ctypes.c_int(_MADV_POPULATE_WRITE))


def prefer_node(address: int, num_bytes: int, node: int) -> None:
    """Have whole pages lie in this NUMA node's memory: those to come, and those that are there and can be moved. Of
    shared memory that holds for all who map it. OSError: the kernel does not do it."""
    nodes = (ctypes.c_ulong * (_MOST_NODES // _WORD_BITS))()
    nodes[node // _WORD_BITS] = 1 << node % _WORD_BITS
    if _MBIND is None:
        raise OSError(f"mbind has no known number on {platform.machine()}")
    if _LIBC.syscall(
        ctypes.c_long(_MBIND),
        ctypes.c_void_p(address),
        ctypes.c_size_t(num_bytes),
        ctypes.c_int(_MPOL_PREFERRED),
        nodes,
        ctypes.c_ulong(_MOST_NODES),
        ctypes.c_uint(_MPOL_MF_MOVE),
    ):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def node_of_pci_device(bus_id: str, system: Path = Path("/sys")) -> int | None:
    """The NUMA node that a device (as "0000:1b:00.0") is next to; None: there is one node, or it is not known."""
    if len([*system.glob("devices/system/node/node[0-9]*")]) < 2:
        return None
    try:
        node = int((system / "bus/pci/devices" / bus_id.lower() / "numa_node").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return node if 0 <= node < _MOST_NODES else None
