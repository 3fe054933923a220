"""A folder of files as a `ByteStore`: one file a part, within a hard byte budget.

    FOLDER/ab/abcd...ef.kv      header (4,096 bytes): magic, format, payload bytes, name, checksum; then the payload
    FOLDER/ab/.RANDOM.tmp       a file being written; renamed when whole, removed at the next start otherwise

The checksum (XXH3, 128 bits) covers the header's fields and the payload and is verified in place before a read is
answered, so nothing is ever synced: what a crash tears is a miss. The budget counts each file's size rounded up to
4 KiB, temporary ones included, before it is written; folders are not counted. The file used longest ago leaves first,
its time of change being the time of its last use. Files not named like ours are left alone and not counted.

The first process on a folder holds a lock on it and writes. Others read what they found when they started; a put
there stores nothing, until the writer is gone. Knows names and bytes, no geometry.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from xxhash import xxh3_128

from kvferry.observability.log import OnceLog
from kvferry.store.base import PartName

_MAGIC: Final = b"kvferry\0"
_FORMAT: Final = 1
_FIELDS: Final = struct.Struct("<8sQQQ64s")  # magic, format, payload bytes, name bytes, name
_CHECKSUM_BYTES: Final = 16
_HEADER_BYTES: Final = 4096
_BLOCK_BYTES: Final = 4096
_PIECE_BYTES: Final = 1 << 18  # Read or write, then hash, while it is in the core's cache.
_LONGEST_NAME_BYTES: Final = 64
_OURS: Final = re.compile(r"([0-9a-f]{2})+\.kv")
_TEMPORARY: Final = re.compile(r"\.[0-9a-f]{16}\.tmp")


class DiskStore:
    """Parts as files below `path`, which is made if absent. Thread-safe; `contains` never touches the disk.

    budget_bytes: most that all files may occupy; what exceeds it at the start is evicted. OSError: the folder cannot
    be made or read.
    """

    def __init__(self, path: str | Path, budget_bytes: int) -> None:
        self._path = Path(path)
        self._budget_bytes = budget_bytes
        self._log = OnceLog(logging.getLogger(__name__))
        self._lock = threading.Lock()
        self._charges: OrderedDict[PartName, int] = OrderedDict()
        """Bytes that each file counts, the longest unused first."""
        self._used_bytes = 0
        self._path.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._writes = False
        try:
            if not self._take_lock():
                self._log.warn("locked", "another process writes to %s: this one only reads there", self._path)
            self._scan()
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def used_bytes(self) -> int:
        """What all files count against the budget, those being written included."""
        return self._used_bytes

    def file_of(self, name: PartName) -> Path:
        """Where this name's value is kept."""
        text = name.hex()
        return self._path / text[:2] / f"{text}.kv"

    def put(self, name: PartName, view: memoryview) -> None:
        """See `ByteStore.put`. OSError: the disk cannot be written, or the value exceeds the budget."""
        if not 1 <= len(name) <= _LONGEST_NAME_BYTES:
            raise ValueError(f"a name has 1 to {_LONGEST_NAME_BYTES} bytes, not {len(name)}")
        charge = _charge(_HEADER_BYTES + len(view))
        with self._lock:
            if not self._writes and not self._take_over():
                return
            if name in self._charges:
                self._charges.move_to_end(name)
                return
            self._make_room(charge)
            self._used_bytes += charge
        try:
            self._write(name, view)
        except BaseException:
            with self._lock:
                self._used_bytes -= charge
            raise
        with self._lock:
            # Another thread may have written the same name meanwhile; its bytes are ours.
            self._used_bytes -= self._charges.pop(name, 0)
            self._charges[name] = charge

    def get_into(self, name: PartName, view: memoryview) -> bool:
        """See `ByteStore.get_into`. A damaged file is removed."""
        if name not in self._charges:
            return False
        file = self.file_of(name)
        try:
            fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            self._log.warn("vanished", "files of %s vanished under it, such as %s", self._path, file)
            self._forget(name)
            return False
        try:
            fault = _read(fd, name, view)
            if fault is None:
                with contextlib.suppress(OSError):
                    os.utime(fd)
        finally:
            os.close(fd)
        if fault is None:
            with self._lock, contextlib.suppress(KeyError):
                self._charges.move_to_end(name)
            return True
        if fault != _OTHER_LENGTH:
            self._log.warn("damaged", "%s is damaged and will not be used: %s", file, fault)
            self.delete([name])
        return False

    def contains(self, names: Sequence[PartName]) -> list[bool]:
        """See `ByteStore.contains`. From memory; whether the bytes are sound shows when they are read."""
        return [name in self._charges for name in names]

    def delete(self, names: Sequence[PartName]) -> None:
        """See `ByteStore.delete`. Where another process writes, the names are forgotten here alone."""
        for name in names:
            if self._writes and name in self._charges:
                self.file_of(name).unlink(missing_ok=True)
            self._forget(name)

    def touch(self, names: Sequence[PartName]) -> None:
        """See `ByteStore.touch`. Known until the next start, as no file is touched."""
        with self._lock:
            for name in names:
                if name in self._charges:
                    self._charges.move_to_end(name)

    def close(self) -> None:
        """See `ByteStore.close`. Another process may write from now on."""
        with self._lock:
            self._writes = False
            os.close(self._fd)

    def check(self) -> list[str]:
        """Compare the index with the folder, both ways; what disagrees, in words. For tests and after accidents."""
        with self._lock:
            found = {name: _charge(status.st_size) for name, status in self._files()}
            faults = [f"{name.hex()} is no file" for name in self._charges.keys() - found.keys()]
            faults += [f"{name.hex()} is not in the index" for name in found.keys() - self._charges.keys()]
            faults += [
                f"{name.hex()} counts {charge} bytes, has {found[name]}"
                for name, charge in self._charges.items()
                if found.get(name, charge) != charge
            ]
            if self._used_bytes != sum(self._charges.values()):
                faults.append(f"{self._used_bytes} bytes are counted, the files have {sum(found.values())}")
            if self._writes and self._used_bytes > self._budget_bytes:
                faults.append(f"{self._used_bytes} bytes exceed the budget of {self._budget_bytes}")
            return faults

    def _take_lock(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._writes = True
        return self._writes

    def _take_over(self) -> bool:
        """Become the writer if the last one is gone, and see what it left."""
        if not self._take_lock():
            return False
        self._charges.clear()
        self._scan()
        return True

    def _scan(self) -> None:
        """Rebuild the index; as the writer, also remove temporary files and what exceeds the budget."""
        if self._writes:
            for folder in self._folders():
                for file in folder.iterdir():
                    if _TEMPORARY.fullmatch(file.name):
                        file.unlink(missing_ok=True)
        for name, status in sorted(self._files(), key=lambda item: item[1].st_mtime_ns):
            self._charges[name] = _charge(status.st_size)
        self._used_bytes = sum(self._charges.values())
        if self._writes:
            self._make_room(0)

    def _folders(self) -> Iterator[Path]:
        for byte in range(256):
            folder = self._path / f"{byte:02x}"
            if folder.is_dir():
                yield folder

    def _files(self) -> Iterator[tuple[PartName, os.stat_result]]:
        for folder in self._folders():
            with os.scandir(folder) as entries:
                for entry in entries:
                    if _OURS.fullmatch(entry.name) and entry.name.startswith(folder.name):
                        with contextlib.suppress(FileNotFoundError):
                            yield bytes.fromhex(entry.name[:-3]), entry.stat(follow_symlinks=False)

    def _make_room(self, charge: int) -> None:
        if charge > self._budget_bytes:
            raise OSError(errno.ENOSPC, f"{charge} bytes exceed the budget of {self._budget_bytes}", str(self._path))
        while self._used_bytes + charge > self._budget_bytes:
            name = next(iter(self._charges), None)
            if name is None:
                raise OSError(errno.ENOSPC, "files being written take up the budget", str(self._path))
            self.file_of(name).unlink(missing_ok=True)
            self._used_bytes -= self._charges.pop(name)

    def _write(self, name: PartName, view: memoryview) -> None:
        file = self.file_of(name)
        temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")
        fd = _create(temporary)
        try:
            try:
                fields = _FIELDS.pack(_MAGIC, _FORMAT, len(view), len(name), name)
                checksum = _move(view, xxh3_128(fields), lambda piece, at: os.pwrite(fd, piece, at))
                header = fields + checksum
                os.pwrite(fd, header.ljust(_HEADER_BYTES, b"\0"), 0)
            finally:
                os.close(fd)
            temporary.replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def _forget(self, name: PartName) -> None:
        with self._lock:
            self._used_bytes -= self._charges.pop(name, 0)


_OTHER_LENGTH: Final = "the value has another length"


def _read(fd: int, name: PartName, view: memoryview) -> str | None:
    """Fill `view` from a file and verify it. What is wrong with the file, in words, or None."""
    header = os.pread(fd, _HEADER_BYTES, 0)
    if len(header) < _HEADER_BYTES:
        return "its header is cut off"
    magic, version, num_bytes, name_bytes, padded = _FIELDS.unpack_from(header)
    if (magic, version) != (_MAGIC, _FORMAT):
        return f"it is no file of format {_FORMAT}"
    if padded[:name_bytes] != name:
        return "it holds another name"
    if os.fstat(fd).st_size != _HEADER_BYTES + num_bytes:
        return "its length is not what its header says"
    if num_bytes != len(view):
        return _OTHER_LENGTH
    fields, said = header[: _FIELDS.size], header[_FIELDS.size : _FIELDS.size + _CHECKSUM_BYTES]
    checksum = _move(view, xxh3_128(fields), lambda piece, at: os.preadv(fd, [piece], at))
    return None if checksum == said else "its checksum is wrong"


def _move(view: memoryview, checksum: xxh3_128, move: Callable[[memoryview, int], int]) -> bytes:
    """Write or read all of `view`; `move` says how much of a piece it did. Returns the checksum."""
    at = 0
    while at < len(view):
        num_bytes = move(view[at : at + _PIECE_BYTES], _HEADER_BYTES + at)
        if not num_bytes:  # Cut off since its size was looked up: the checksum will differ.
            break
        checksum.update(view[at : at + num_bytes])
        at += num_bytes
    return checksum.digest()


def _create(file: Path) -> int:
    """Open a new file, making its folder but no folder above: a store whose folder vanished does not come back."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(file, flags, 0o600)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):
            file.parent.mkdir()
        return os.open(file, flags, 0o600)


def _charge(file_bytes: int) -> int:
    return -(-file_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
