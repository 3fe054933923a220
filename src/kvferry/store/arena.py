"""One file of named shared memory, in units of one size. A run of units is a slab, of slots of one size and one rank.

    superblock | unit table | unit 0 | unit 1 | ...       slab:  slab header | slot headers | padding | payloads

The table says of each unit which slab it belongs to, so that an offset alone leads to its slot's header, in every
process that maps the file. Payloads begin on a multiple of `ALIGNMENT` and lie one slot stride apart. The file is
sparse: a unit has memory once it was claimed, by `posix_fallocate`, so that a full file system is an error code and
never a SIGBUS. Knows bytes and headers; which slots are free, and why one is taken, is known above.

What a reader after a crash may find: every header of a slot is free or whole, since its state is written last when it
is filled and first when it is freed; a slab whose header or whose units' table entries are not whole has no slot.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import secrets
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple, Self

from kvferry.blocks import Slot
from kvferry.errors import ArenaError
from kvferry.memory import populate
from kvferry.store.arena_file import default_folder, engine_file, server_file
from kvferry.store.base import ArenaInfo
from kvferry.store.locks import Range, joined, lock_ranges, locked_range

logger = logging.getLogger(__name__)

ALIGNMENT: Final = 4096
SMALL_ALIGNMENT: Final = 64
FREE, RESERVED, COMMITTED = range(3)
"""States of a slot's header."""

_MAGIC = b"kvferry\0"
_FORMAT = 2
_SUPERBLOCK = struct.Struct("<8sQQQQ32s")
"""Magic, format, file bytes, unit bytes, boots (how many owners the file has had), boot id (of the present one)."""
_BOOTS_OFFSET: Final = 32
_BOOT_ID_OFFSET, _BOOT_ID_BYTES = 40, 32
_MOST_BOOTS: Final = 1 << 22
_GENERATIONS_PER_BOOT: Final = 1 << 40
_MOST_RANKS: Final = (1 << 16) - 1
_SLAB_HEADER = struct.Struct("<QQQQQ")  # slot stride, slots, rank, units, offset of the first payload in the slab
_TABLE_ENTRY_BYTES: Final = 4
"""Of each unit: 0, or one more than the first unit of its slab."""
_SLOT_HEADER = struct.Struct("<QQQHHHxx16s32s32s8s8s")
"""Generation, state, payload bytes, group, rank, ranks, checksum (zeros: unknown), key, parent key, tags of the
geometry and of the salt (zeros: none)."""
NO_CHECKSUM: Final = bytes(16)
_HEADER_BYTES: Final = 128
_STATE_OFFSET: Final = 8
_STATE = struct.Struct("<Q")
_GENERATION_AND_STATE = struct.Struct("<QQ")
assert _SLOT_HEADER.size == _HEADER_BYTES
_UNITS: Final = 64
_LEAST_UNIT_BYTES, _MOST_UNIT_BYTES = 4 << 10, 32 << 20


class SlotHeader(NamedTuple):
    """What shared memory says of a slot."""

    generation: int
    state: int
    num_bytes: int
    group: int
    rank: int
    num_parts: int
    checksum: bytes
    key: bytes
    parent: bytes
    geometry_tag: bytes
    salt_tag: bytes


class FoundSlab(NamedTuple):
    """A slab and its slots, as shared memory says. offsets, headers: of each slot."""

    first: int
    num_units: int
    stride: int
    rank: int
    offsets: list[int]
    headers: list[SlotHeader]


@lru_cache(maxsize=1024)
def slot_stride(num_bytes: int) -> int:
    """Distance between slots whose payloads have `num_bytes`."""
    return _round_up(num_bytes, ALIGNMENT if num_bytes >= ALIGNMENT else SMALL_ALIGNMENT)


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


class SlotLock:
    """The right to copy from or to slots, from `Arena.begin_reading` or `begin_writing` until `end`, or until this
    process ends."""

    def __init__(self, lock: int) -> None:
        self._lock = lock

    def end(self) -> None:
        """Nothing is copied any more. To be called once."""
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
        # This duplicates the descriptor: as long as a view of the mapping is in use, the next owner is locked out.
        self._map = mmap.mmap(fd, num_bytes)
        self.buffer = memoryview(self._map)
        self.unit_bytes = unit_bytes_of(num_bytes)
        self.num_units, self._units_at = _layout(num_bytes)
        self._table = self.buffer[ALIGNMENT : self._units_at].cast("I")

    @classmethod
    def create(cls, num_bytes: int, folder: str | None = None, *, adopt: bool = False) -> Arena:
        """An arena of `num_bytes`, without memory so far, in `folder` (default: the user's own in /dev/shm).

        adopt: the server's arena of this folder, which may be one that a dead server left: `find_slabs` shows what is
        in it. One of another size or format is removed. ArenaError: the folder is not the user's own, the file cannot
        be made, or another server has it.
        """
        num_bytes = max(_round_up(num_bytes, ALIGNMENT), 2 * ALIGNMENT)
        path = Path(folder) if folder else default_folder()
        try:
            file, fd = (server_file if adopt else engine_file)(path)
            boots = _boots_of(fd, num_bytes)
            if boots is None and os.fstat(fd).st_size:
                logger.warning("%s is not an arena of %d bytes and format %d: begun anew", file, num_bytes, _FORMAT)
                file.unlink()
                os.close(fd)
                file, fd = server_file(path)
        except OSError as error:
            raise ArenaError(f"no arena can be made in {path}: {error}") from error
        boot_id = secrets.token_hex(16)
        try:
            if boots is None:
                os.ftruncate(fd, num_bytes)
                os.posix_fallocate(fd, 0, _layout(num_bytes)[1])
            arena = cls(file, fd, num_bytes, boot_id, owner=True)
        except (OSError, ValueError, ArenaError) as error:
            if boots is None:
                file.unlink()
            os.close(fd)
            raise ArenaError(f"an arena of {num_bytes} bytes cannot be made in {path}: {error}") from error
        # A new file begins anywhere, so that what was said of an earlier one of the same name means nothing here.
        unit_bytes, boots = arena.unit_bytes, (secrets.randbelow(_MOST_BOOTS // 2) if boots is None else boots) + 1
        _SUPERBLOCK.pack_into(arena.buffer, 0, _MAGIC, _FORMAT, num_bytes, unit_bytes, boots, boot_id.encode())
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
    def first_generation(self) -> int:
        """Generations of this boot begin here, beyond those of all earlier ones."""
        return int(_STATE.unpack_from(self.buffer, _BOOTS_OFFSET)[0]) * _GENERATIONS_PER_BOOT + 1

    def is_current(self) -> bool:
        """Whether the arena still has the owner that this mapping was made for. Jobs of an earlier owner are void."""
        return self.buffer[_BOOT_ID_OFFSET : _BOOT_ID_OFFSET + _BOOT_ID_BYTES] == self.info.boot_id.encode()

    def claim(self, unit: int) -> None:
        """Give a unit its memory, in about 8 ms for 32 MiB. OSError: there is none (ENOSPC)."""
        os.posix_fallocate(self._fd, self.unit_offset(unit), self.unit_bytes)

    def populate(self, unit: int) -> None:
        """Have a claimed unit's pages zeroed and mapped here, so that the first copy does not wait for it. Takes longer
        than the claim."""
        first = ctypes.c_char.from_buffer(self.buffer, self.unit_offset(unit))
        populate(ctypes.addressof(first), self.unit_bytes)

    def format_slab(self, first: int, num_units: int, stride: int, rank: int) -> list[int]:
        """Make claimed units that no slab has into a slab of slots of this stride; all are free. Returns their offsets,
        ascending. Killed on the way, it leaves a slab without a slot."""
        offset = self.unit_offset(first)
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

    def find_slabs(self) -> list[FoundSlab]:
        """Slabs that an earlier owner left whole. Units of all others belong to no slab any more."""
        found: list[FoundSlab] = []
        unit = 0
        while unit < self.num_units:
            slab = self._find_slab(unit)
            if slab is not None:
                found.append(slab)
                unit += slab.num_units
            else:
                self._table[unit] = 0
                unit += 1
        return found

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
        _SLOT_HEADER.pack_into(self.buffer, at, *header._replace(state=FREE))
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
        return SlotHeader(*_SLOT_HEADER.unpack_from(self.buffer, at))

    def holds(self, slot: Slot) -> bool:
        """Whether the slot still keeps the part it was leased for.

        A reader asks after it has read: the generation changes before bytes do.
        """
        return self.state_of(slot) is not None

    def begin_writing(self, slots: Sequence[Slot]) -> SlotLock | None:
        """Ask before the first byte is written. None: a slot keeps another part by now, or someone still copies there.

        The lock comes before the question whether the slots are still the writer's own, and whoever takes a slot away
        clears its header before it asks for locks (`is_locked`): so one of the two always sees the other.
        """
        return self._lock(slots, shared=False)

    def begin_reading(self, slots: Sequence[Slot]) -> SlotLock | None:
        """Ask before the first byte is read: the bytes stay as they are until the lock is ended, whoever owns the arena
        by then. None: a slot keeps another part by now."""
        return self._lock(slots, shared=True)

    def _lock(self, slots: Sequence[Slot], *, shared: bool) -> SlotLock | None:
        lock = lock_ranges(self._fd, map(_range_of, slots), shared=shared)
        if lock is None:
            return None
        if all(map(self.holds, slots)):
            return SlotLock(lock)
        os.close(lock)
        return None

    def locked_ranges(self) -> list[Range]:
        """All bytes that someone copies to or from."""
        found: list[Range] = []
        unknown = [(0, self.info.num_bytes)]
        while unknown:
            start, end = unknown.pop()
            locked = locked_range(self._fd, (start, end)) if start < end else None
            if locked is not None:
                found.append(locked)
                unknown += [(start, locked[0]), (locked[1], end)]
        return joined(found)

    def is_locked(self, slot: Slot) -> bool:
        """Whether someone, in this process or another, copies to or from the slot."""
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

    def hide(self) -> None:
        """Nobody else is going to map it: from now on its memory goes with this process, however that ends."""
        self._path.unlink(missing_ok=True)

    def close(self, *, keep: bool = False) -> None:
        """Unmap, and as the owner remove the file unless it is to be kept. Memory that tensors or views still use lives
        as long as they. Calling it again does nothing.
        """
        if self._fd < 0:
            return
        self._table.release()
        with contextlib.suppress(BufferError):  # A view of a caller is alive; the mapping goes with it.
            self.buffer.release()
            self._map.close()
        if self._owner and not keep:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1
        if self._owner and not keep and self._path.parent == default_folder():
            with contextlib.suppress(OSError):  # Another arena lives there.
                self._path.parent.rmdir()

    def _find_slab(self, first: int) -> FoundSlab | None:
        """The slab that begins with this unit. Nothing that its header says is believed unless it all fits together."""
        at = self.unit_offset(first)
        if self._table[first] != first + 1:
            return None
        stride, num_slots, rank, num_units, payload = _SLAB_HEADER.unpack(os.pread(self._fd, _SLAB_HEADER.size, at))
        if not (0 < num_units <= self.num_units - first and 0 < stride == slot_stride(stride) and rank <= _MOST_RANKS):
            return None
        if any(self._table[unit] != first + 1 for unit in range(first, first + num_units)):
            return None
        if not 0 < num_slots == slots_in(num_units * self.unit_bytes, stride) or payload != _payload_offset(num_slots):
            return None
        headers = os.pread(self._fd, num_slots * _HEADER_BYTES, at + _HEADER_BYTES)
        return FoundSlab(
            first,
            num_units,
            stride,
            rank,
            [at + payload + index * stride for index in range(num_slots)],
            [SlotHeader(*fields) for fields in _SLOT_HEADER.iter_unpack(headers)],
        )

    def unit_offset(self, unit: int) -> int:
        """Where a unit begins."""
        return self._units_at + unit * self.unit_bytes

    def _header_offset(self, payload: int) -> int | None:
        first = self.slab_of(payload)
        if first is None:
            return None
        slab_at = self.unit_offset(first)
        stride, num_slots, _, _, payloads_at = _SLAB_HEADER.unpack_from(self.buffer, slab_at)
        index, rest = divmod(payload - slab_at - payloads_at, stride) if stride else (0, 1)
        return slab_at + _HEADER_BYTES * (1 + index) if rest == 0 and 0 <= index < num_slots else None

    def _write_state(self, header_offset: int, state: int) -> None:
        _STATE.pack_into(self.buffer, header_offset + _STATE_OFFSET, state)


def _range_of(slot: Slot) -> Range:
    return slot.offset, slot.offset + slot_stride(slot.num_bytes)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _payload_offset(num_slots: int) -> int:
    return _round_up(_HEADER_BYTES * (1 + num_slots), ALIGNMENT)


def _verify(fd: int, info: ArenaInfo) -> None:
    num_bytes = os.fstat(fd).st_size
    if num_bytes != info.num_bytes:
        raise ArenaError(f"arena {info.path} has {num_bytes} bytes, expected {info.num_bytes}")
    if _boots_of(fd, num_bytes) is None:
        raise ArenaError(f"{info.path} is no arena of format {_FORMAT}")
    if os.pread(fd, _BOOT_ID_BYTES, _BOOT_ID_OFFSET) != info.boot_id.encode():
        raise ArenaError(f"arena {info.path} belongs to another store than {info.boot_id}")


def _boots_of(fd: int, num_bytes: int) -> int | None:
    """How many owners the arena has had; None: it is not one of this size and format."""
    if os.fstat(fd).st_size != num_bytes or num_bytes < 2 * ALIGNMENT:
        return None
    *said, boots, _ = _SUPERBLOCK.unpack(os.pread(fd, _SUPERBLOCK.size, 0))
    known = said == [_MAGIC, _FORMAT, num_bytes, unit_bytes_of(num_bytes)] and boots < _MOST_BOOTS
    return boots if known else None


def _layout(num_bytes: int) -> tuple[int, int]:
    """How many units an arena has, and where they begin."""
    unit_bytes = unit_bytes_of(num_bytes)
    units_at = ALIGNMENT + _round_up(max(num_bytes // unit_bytes, 1) * _TABLE_ENTRY_BYTES, ALIGNMENT)
    return (num_bytes - units_at) // unit_bytes, units_at
