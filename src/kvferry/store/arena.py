"""One file of named shared memory, in units of one size. A run of units is a slab, of slots of one size and one rank.

    superblock | unit table | unit 0 | unit 1 | ...       slab:  slab header | slot headers | padding | payloads

The table says of each unit which slab it belongs to, so that an offset alone leads to its slot's header, in every
process that maps the file. Payloads begin on a multiple of `ALIGNMENT` and lie one slot stride apart. The file is
sparse: a unit has memory once it was claimed, by `posix_fallocate`, so that a full file system is an error code and
never a SIGBUS. Knows bytes and headers; which slots are free, and why one is taken, is known above.

The owner holds a lock on its file for life; files whose lock is free are left over from dead owners and are removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Self

from kvferry.blocks import Slot
from kvferry.errors import ArenaError
from kvferry.store.base import ArenaInfo
from kvferry.store.locks import Range, lock_ranges, locked_range

_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 the folder below is checked to be the user's own
ALIGNMENT: Final = 4096
SMALL_ALIGNMENT: Final = 64
FREE, RESERVED, COMMITTED = range(3)
"""States of a slot's header. Written last when a slot is filled and first when it is freed, so that whoever reads
the headers after a crash sees each slot either absent or complete."""

_MAGIC = b"kvferry\0"
_FORMAT = 2
_SUPERBLOCK = struct.Struct("<8sQQQ32s")  # magic, format, file bytes, unit bytes, boot id
_SLAB_HEADER = struct.Struct("<QQQQQ")  # slot stride, slots, rank, units, offset of the first payload in the slab
_TABLE_ENTRY_BYTES: Final = 4
"""Of each unit: 0, or one more than the first unit of its slab."""
_SLOT_HEADER = struct.Struct("<QQQHHHxx16s32s32s16x")
"""Generation, state, payload bytes, group, rank, ranks, checksum (zeros: unknown), key, parent key."""
_HEADER_BYTES: Final = 128
_STATE_OFFSET: Final = 8
_STATE = struct.Struct("<Q")
_GENERATION_AND_STATE = struct.Struct("<QQ")
assert _SLOT_HEADER.size == _HEADER_BYTES
_MADV_POPULATE_WRITE: Final = 23
_CREATE_ATTEMPTS: Final = 16
_UNITS: Final = 64
_LEAST_UNIT_BYTES, _MOST_UNIT_BYTES = 4 << 10, 32 << 20


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """What shared memory says of a slot."""

    generation: int
    state: int
    num_bytes: int
    group: int
    rank: int
    num_ranks: int
    checksum: bytes
    key: bytes
    parent: bytes


@lru_cache(maxsize=1024)
def slot_stride(num_bytes: int) -> int:
    """Distance between slots whose payloads have `num_bytes`."""
    alignment = ALIGNMENT if num_bytes >= ALIGNMENT else SMALL_ALIGNMENT
    return _round_up(num_bytes, alignment)


def slots_in(slab_bytes: int, stride: int) -> int:
    """How many slots of this stride a slab holds beside their headers."""
    num_slots = (slab_bytes - _HEADER_BYTES) // (stride + _HEADER_BYTES)
    while num_slots > 0 and _payload_offset(num_slots) + num_slots * stride > slab_bytes:
        num_slots -= 1
    return max(num_slots, 0)


def unit_bytes_of(arena_bytes: int) -> int:
    """The size of an arena's units: a power of two, about a 64th of the arena, and a page for the headers of a slab,
    since parts are often powers of two themselves."""
    share = 1 << max(arena_bytes // _UNITS, 1).bit_length() - 1
    return min(max(share, _LEAST_UNIT_BYTES), _MOST_UNIT_BYTES) + ALIGNMENT


class Writing:
    """The right to write to slots, from `Arena.begin_writing` until `end`, or until this process ends."""

    def __init__(self, lock: int) -> None:
        self._lock = lock

    def end(self) -> None:
        """Nothing is written any more. To be called once."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Arena:
    """The mapping of one arena, made by `create` (its owner) or `attach` (everyone else). Thread-safe."""

    def __init__(self, path: Path, fd: int, num_bytes: int, boot_id: str, *, owner: bool) -> None:
        self.info = ArenaInfo(str(path), num_bytes, boot_id)
        self._path = path
        self._fd = fd
        self._owner = owner
        if (lock := lock_ranges(fd, [])) is None:
            raise ArenaError(f"the kernel gives no locks on {path}: /proc must be mounted")
        os.close(lock)
        self._map = mmap.mmap(fd, num_bytes)
        self.buffer = memoryview(self._map)
        self.unit_bytes = unit_bytes_of(num_bytes)
        self.num_units, self._units_at = _layout(num_bytes)
        self._table = self.buffer[ALIGNMENT : self._units_at].cast("I")

    @classmethod
    def create(cls, num_bytes: int, folder: str | None = None) -> Arena:
        """A new arena of `num_bytes`, without memory so far, in `folder` (default: the user's own in /dev/shm).

        ArenaError: the folder is not the user's own, or the file cannot be made.
        """
        num_bytes = max(_round_up(num_bytes, ALIGNMENT), 2 * ALIGNMENT)
        path = Path(folder) if folder else _default_folder()
        try:
            _make_private(path)
            _remove_stale(path)
            file, fd, boot_id = _create_locked(path)
        except OSError as error:
            raise ArenaError(f"no arena can be made in {path}: {error}") from error
        try:
            os.ftruncate(fd, num_bytes)
            os.posix_fallocate(fd, 0, _layout(num_bytes)[1])
            arena = cls(file, fd, num_bytes, boot_id, owner=True)
        except (OSError, ValueError, ArenaError) as error:
            file.unlink()
            os.close(fd)
            raise ArenaError(f"an arena of {num_bytes} bytes cannot be made in {path}: {error}") from error
        _SUPERBLOCK.pack_into(arena.buffer, 0, _MAGIC, _FORMAT, num_bytes, arena.unit_bytes, boot_id.encode())
        return arena

    @classmethod
    def attach(cls, info: ArenaInfo) -> Arena:
        """Map an arena that another process owns. ArenaError: it is gone, or is not the one that `info` names."""
        try:
            fd = os.open(info.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise ArenaError(f"arena {info.path} cannot be opened: {error}") from error
        try:
            _verify(fd, info)
            return cls(Path(info.path), fd, info.num_bytes, info.boot_id, owner=False)
        except BaseException:
            os.close(fd)
            raise

    def claim(self, unit: int) -> None:
        """Give a unit its memory. OSError: there is none (ENOSPC)."""
        offset = self._unit_offset(unit)
        os.posix_fallocate(self._fd, offset, self.unit_bytes)
        _populate(self.buffer[offset : offset + self.unit_bytes])

    def format_slab(self, first: int, num_units: int, stride: int, rank: int) -> list[int]:
        """Make claimed units that no slab has into a slab of slots of this stride; all are free. Returns their offsets,
        ascending. Killed on the way, it leaves a slab without a slot."""
        offset = self._unit_offset(first)
        num_slots = slots_in(num_units * self.unit_bytes, stride)
        payload = _payload_offset(num_slots)
        self.buffer[offset : offset + payload] = bytes(payload)
        for unit in range(first, first + num_units):
            self._table[unit] = first + 1
        _SLAB_HEADER.pack_into(self.buffer, offset, stride, num_slots, rank, num_units, payload)
        return [offset + payload + index * stride for index in range(num_slots)]

    def free_slab(self, first: int, num_units: int) -> None:
        """The units of a slab whose slots are all free belong to no slab any more."""
        for unit in range(first, first + num_units):
            self._table[unit] = 0

    def slab_of(self, offset: int) -> int | None:
        """The first unit of the slab that an offset lies in; None: it lies in none."""
        return self.slab_of_unit((offset - self._units_at) // self.unit_bytes)

    def slab_of_unit(self, unit: int) -> int | None:
        """The first unit of the slab that this unit belongs to; None: it belongs to none."""
        first = self._table[unit] if 0 <= unit < self.num_units else 0
        return first - 1 if 0 < first <= unit + 1 else None

    def view(self, slot: Slot) -> memoryview:
        """The payload of a slot: `slot.num_bytes` writable bytes of shared memory."""
        return self.buffer[slot.offset : slot.offset + slot.num_bytes]

    def write_header(self, slot: Slot, header: SlotHeader) -> None:
        """Describe a slot; its state is written last."""
        at = self._header_offset(slot.offset)
        assert at is not None, "a slot lies in a formatted slab"
        _SLOT_HEADER.pack_into(
            self.buffer,
            at,
            header.generation,
            FREE,
            header.num_bytes,
            header.group,
            header.rank,
            header.num_ranks,
            header.checksum,
            header.key,
            header.parent,
        )
        self._write_state(at, header.state)

    def set_state(self, slot: Slot, state: int) -> None:
        """Move a slot to another state. A freed slot has no generation any more."""
        at = self._header_offset(slot.offset)
        assert at is not None, "a slot lies in a formatted slab"
        self._write_state(at, state)
        if state == FREE:
            _STATE.pack_into(self.buffer, at, 0)

    def read_header(self, slot: Slot) -> SlotHeader | None:
        """What shared memory says of the slot now; None: no slot begins at this offset."""
        at = self._header_offset(slot.offset)
        if at is None:
            return None
        generation, state, num_bytes, group, rank, num_ranks, checksum, key, parent = _SLOT_HEADER.unpack_from(
            self.buffer, at
        )
        return SlotHeader(generation, state, num_bytes, group, rank, num_ranks, checksum, key, parent)

    def holds(self, slot: Slot) -> bool:
        """Whether the slot still keeps the part it was leased for.

        A reader asks after it has read: the generation changes before bytes do.
        """
        at = self._header_offset(slot.offset)
        return at is not None and _STATE.unpack_from(self.buffer, at)[0] == slot.generation

    def begin_writing(self, slots: Sequence[Slot]) -> Writing | None:
        """Ask before the first byte is written. None: a slot keeps another part by now, or someone still writes to it.

        The lock comes before the question whether the slots are still the writer's own, and whoever takes a slot away
        clears its header before it asks for locks (`is_written`): so one of the two always sees the other.
        """
        lock = lock_ranges(self._fd, map(_range_of, slots))
        if lock is None:
            return None
        if all(map(self.holds, slots)):
            return Writing(lock)
        os.close(lock)
        return None

    def is_written(self, slot: Slot) -> bool:
        """Whether someone, in this process or another, has begun to write to the slot and not ended."""
        return locked_range(self._fd, _range_of(slot)) is not None

    def state_of(self, slot: Slot) -> int | None:
        """FREE, RESERVED or COMMITTED, as shared memory says now; None: the slot keeps another part, or none.

        A process that only maps the arena sees by it that a promotion from a lower tier has ended.
        """
        at = self._header_offset(slot.offset)
        if at is None:
            return None
        generation, state = _GENERATION_AND_STATE.unpack_from(self.buffer, at)
        return int(state) if generation == slot.generation else None

    def close(self) -> None:
        """Unmap, and as the owner remove the file. Memory that tensors or views still use lives as long as they.

        Calling it again does nothing.
        """
        if self._fd < 0:
            return
        self._table.release()
        with contextlib.suppress(BufferError):  # A view of a caller is alive; the mapping goes with it.
            self.buffer.release()
            self._map.close()
        if self._owner:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1
        if self._owner and self._path.parent == _default_folder():
            with contextlib.suppress(OSError):  # Another arena lives there.
                self._path.parent.rmdir()

    def _unit_offset(self, unit: int) -> int:
        return self._units_at + unit * self.unit_bytes

    def _header_offset(self, payload: int) -> int | None:
        unit = (payload - self._units_at) // self.unit_bytes
        first = self._table[unit] if 0 <= unit < self.num_units else 0
        if not 0 < first <= unit + 1:
            return None
        slab_at = self._units_at + (first - 1) * self.unit_bytes
        stride, num_slots, _, _, payloads_at = _SLAB_HEADER.unpack_from(self.buffer, slab_at)
        index, rest = divmod(payload - slab_at - payloads_at, stride) if stride else (0, 1)
        return slab_at + _HEADER_BYTES * (1 + index) if rest == 0 and 0 <= index < num_slots else None

    def _write_state(self, header_offset: int, state: int) -> None:
        _STATE.pack_into(self.buffer, header_offset + _STATE_OFFSET, state)


def _range_of(slot: Slot) -> Range:
    return slot.offset, slot.offset + slot_stride(slot.num_bytes)


def _default_folder() -> Path:
    return Path(_SHARED_MEMORY, f"kvferry-{os.getuid()}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _payload_offset(num_slots: int) -> int:
    return _round_up(_HEADER_BYTES * (1 + num_slots), ALIGNMENT)


def _layout(num_bytes: int) -> tuple[int, int]:
    """How many units an arena has, and where they begin."""
    unit_bytes = unit_bytes_of(num_bytes)
    units_at = ALIGNMENT + _round_up(max(num_bytes // unit_bytes, 1) * _TABLE_ENTRY_BYTES, ALIGNMENT)
    return (num_bytes - units_at) // unit_bytes, units_at


def _verify(fd: int, info: ArenaInfo) -> None:
    num_bytes = os.fstat(fd).st_size
    if num_bytes != info.num_bytes or num_bytes < ALIGNMENT:
        raise ArenaError(f"arena {info.path} has {num_bytes} bytes, expected {info.num_bytes}")
    magic, version, said_bytes, unit_bytes, boot_id = _SUPERBLOCK.unpack(os.pread(fd, _SUPERBLOCK.size, 0))
    if (magic, version, said_bytes, unit_bytes) != (_MAGIC, _FORMAT, num_bytes, unit_bytes_of(num_bytes)):
        raise ArenaError(f"{info.path} is no arena of format {_FORMAT}")
    if boot_id != info.boot_id.encode():
        raise ArenaError(f"arena {info.path} belongs to another store than {info.boot_id}")


def _make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ArenaError(f"{folder} is not a folder of user {os.getuid()}")
    if status.st_mode & 0o077:
        raise ArenaError(f"{folder} is open to other users: its mode is {stat.S_IMODE(status.st_mode):o}, not 700")


def _create_locked(folder: Path) -> tuple[Path, int, str]:
    """A new file under a lock. Its name may be taken for a dead owner's before the lock is held: then once more."""
    for _ in range(_CREATE_ATTEMPTS):
        boot_id = secrets.token_hex(16)
        file = folder / f"{boot_id}.arena"
        try:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # The last owner removed the empty folder just now.
            _make_private(folder)
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return file, fd, boot_id
        os.close(fd)
    raise OSError(errno.EAGAIN, "other stores keep removing the new file", str(folder))


def _remove_stale(folder: Path) -> None:
    for file in folder.glob("*.arena"):
        try:
            fd = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink(missing_ok=True)
        except OSError:
            pass  # Its owner lives.
        finally:
            os.close(fd)


def _populate(view: memoryview) -> None:
    """Map the pages now, so that the first copy does not fault them in. By ctypes: `mmap.madvise` keeps the GIL."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(view))
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(view)), _MADV_POPULATE_WRITE)
