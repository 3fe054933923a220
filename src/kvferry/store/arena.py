"""One file of named shared memory, cut into slabs, each of slots of one size and one rank.

    superblock | slab 0 | slab 1 | ...            slab:  slab header | slot headers | padding | payloads

Payloads begin on a multiple of `ALIGNMENT` and lie one slot stride apart. The file is sparse: a slab has memory once
it was claimed, by `posix_fallocate`, so that a full file system is an error code and never a SIGBUS. Knows bytes and
headers; which slots are free, and why one is taken, is known above.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvferry.blocks import Slot
from kvferry.errors import ArenaError
from kvferry.store.base import ArenaInfo

_SHARED_MEMORY: Final = "/dev/shm"  # noqa: S108 the folder below is checked to be the user's own
ALIGNMENT: Final = 4096
SMALL_ALIGNMENT: Final = 64
FREE, RESERVED, COMMITTED = range(3)
"""States of a slot's header. Written last when a slot is filled and first when it is freed, so that whoever reads
the headers after a crash sees each slot either absent or complete."""

_MAGIC = b"kvferry\0"
_FORMAT = 1
_SUPERBLOCK = struct.Struct("<8sQQQ32s")  # magic, format, file bytes, slab bytes, boot id
_SLAB_HEADER = struct.Struct("<QQQQ")  # slot stride, slots, rank, offset of the first payload in the slab
_SLOT_HEADER = struct.Struct("<QQQHHHxx16s32s32s16x")
"""Generation, state, payload bytes, group, rank, ranks, checksum (zeros: unknown), key, parent key."""
_HEADER_BYTES: Final = 128
_STATE_OFFSET: Final = 8
_STATE = struct.Struct("<Q")
_GENERATION_AND_STATE = struct.Struct("<QQ")
assert _SLOT_HEADER.size == _HEADER_BYTES
_MADV_POPULATE_WRITE: Final = 23
_CREATE_ATTEMPTS: Final = 16


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


def slot_stride(num_bytes: int) -> int:
    """Distance between slots whose payloads have `num_bytes`."""
    alignment = ALIGNMENT if num_bytes >= ALIGNMENT else SMALL_ALIGNMENT
    return _round_up(num_bytes, alignment)


def slots_per_slab(slab_bytes: int, stride: int) -> int:
    """How many slots of this stride a slab holds beside their headers."""
    num_slots = (slab_bytes - _HEADER_BYTES) // (stride + _HEADER_BYTES)
    while num_slots > 0 and _payload_offset(num_slots) + num_slots * stride > slab_bytes:
        num_slots -= 1
    return max(num_slots, 0)


def slab_bytes_for(stride: int, num_slots: int) -> int:
    """The smallest slab that holds `num_slots` slots of this stride."""
    return _round_up(_payload_offset(num_slots) + num_slots * stride, ALIGNMENT)


class Arena:
    """The mapping of one arena, made by `create` (its owner) or `attach` (everyone else). Thread-safe."""

    def __init__(self, path: Path, fd: int, num_bytes: int, boot_id: str, *, owner: bool) -> None:
        self.info = ArenaInfo(str(path), num_bytes, boot_id)
        self._path = path
        self._fd = fd
        self._owner = owner
        self._map = mmap.mmap(fd, num_bytes)
        self.buffer = memoryview(self._map)

    @classmethod
    def create(cls, num_bytes: int, folder: str | None = None) -> Arena:
        """A new arena of `num_bytes`, without memory so far, in `folder` (default: the user's own in /dev/shm).

        ArenaError: the folder is not the user's own, or the file cannot be made.
        """
        num_bytes = _round_up(num_bytes, ALIGNMENT)
        path = Path(folder) if folder else _default_folder()
        try:
            _make_private(path)
            _remove_stale(path)
            file, fd, boot_id = _create_locked(path)
        except OSError as error:
            raise ArenaError(f"no arena can be made in {path}: {error}") from error
        try:
            os.ftruncate(fd, num_bytes)
            os.posix_fallocate(fd, 0, ALIGNMENT)
            arena = cls(file, fd, num_bytes, boot_id, owner=True)
        except (OSError, ValueError) as error:
            file.unlink()
            os.close(fd)
            raise ArenaError(f"an arena of {num_bytes} bytes cannot be made in {path}: {error}") from error
        _SUPERBLOCK.pack_into(arena.buffer, 0, _MAGIC, _FORMAT, num_bytes, 0, boot_id.encode())
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

    @property
    def slab_bytes(self) -> int:
        """Bytes per slab; 0 until the owner has cut the arena."""
        return int(_SUPERBLOCK.unpack_from(self.buffer)[3])

    @property
    def num_slabs(self) -> int:
        slab_bytes = self.slab_bytes
        return (self.info.num_bytes - ALIGNMENT) // slab_bytes if slab_bytes else 0

    def cut(self, slab_bytes: int) -> None:
        """Choose the slab size, once."""
        assert self._owner and not self.slab_bytes and slab_bytes % ALIGNMENT == 0
        boot_id = self.info.boot_id.encode()
        _SUPERBLOCK.pack_into(self.buffer, 0, _MAGIC, _FORMAT, self.info.num_bytes, slab_bytes, boot_id)

    def claim(self, slab: int) -> None:
        """Give a slab its memory. OSError: there is none (ENOSPC)."""
        offset = self._slab_offset(slab)
        os.posix_fallocate(self._fd, offset, self.slab_bytes)
        _populate(self.buffer[offset : offset + self.slab_bytes])

    def format_slab(self, slab: int, stride: int, rank: int) -> list[int]:
        """Cut an empty, claimed slab into slots of this stride; all are free. Returns their offsets, ascending."""
        offset = self._slab_offset(slab)
        num_slots = slots_per_slab(self.slab_bytes, stride)
        payload = _payload_offset(num_slots)
        _SLAB_HEADER.pack_into(self.buffer, offset, 0, 0, 0, 0)
        self.buffer[offset + _HEADER_BYTES : offset + payload] = bytes(payload - _HEADER_BYTES)
        _SLAB_HEADER.pack_into(self.buffer, offset, stride, num_slots, rank, payload)
        return [offset + payload + index * stride for index in range(num_slots)]

    def slab_of(self, offset: int) -> int:
        """The slab that an offset lies in."""
        return (offset - ALIGNMENT) // self.slab_bytes

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

        A writer asks before it writes, a reader after it has read: the generation changes before bytes do.
        """
        at = self._header_offset(slot.offset)
        return at is not None and _STATE.unpack_from(self.buffer, at)[0] == slot.generation

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

    def _slab_offset(self, slab: int) -> int:
        return ALIGNMENT + slab * self.slab_bytes

    def _header_offset(self, payload: int) -> int | None:
        slab_bytes = self.slab_bytes
        if not slab_bytes:
            return None
        slab_at = ALIGNMENT + (payload - ALIGNMENT) // slab_bytes * slab_bytes
        stride, num_slots, _, first = _SLAB_HEADER.unpack_from(self.buffer, slab_at)
        index, rest = divmod(payload - slab_at - first, stride) if stride else (0, 1)
        return slab_at + _HEADER_BYTES * (1 + index) if rest == 0 and 0 <= index < num_slots else None

    def _write_state(self, header_offset: int, state: int) -> None:
        _STATE.pack_into(self.buffer, header_offset + _STATE_OFFSET, state)


def _default_folder() -> Path:
    return Path(_SHARED_MEMORY, f"kvferry-{os.getuid()}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _payload_offset(num_slots: int) -> int:
    return _round_up(_HEADER_BYTES * (1 + num_slots), ALIGNMENT)


def _verify(fd: int, info: ArenaInfo) -> None:
    num_bytes = os.fstat(fd).st_size
    if num_bytes != info.num_bytes or num_bytes < ALIGNMENT:
        raise ArenaError(f"arena {info.path} has {num_bytes} bytes, expected {info.num_bytes}")
    magic, version, said_bytes, _, boot_id = _SUPERBLOCK.unpack(os.pread(fd, _SUPERBLOCK.size, 0))
    if (magic, version, said_bytes) != (_MAGIC, _FORMAT, num_bytes):
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
