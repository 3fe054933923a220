"""The disk backend: the shared suite, its files, its budget, and a random life with damage and restarts."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvferry.store.base import PartName
from kvferry.store.disk import DiskStore
from kvferry.testing.byte_store import ByteStoreSuite, name_of, value_of

PART_BYTES = 4096
FILE_BYTES = 2 * 4096
"""What a part of PART_BYTES counts: a block of header, a block of payload."""


def flip_bit(file: Path, position: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 0x10]))


class TestDiskStore(ByteStoreSuite):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "parts"

    def make(self) -> DiskStore:
        self.store = DiskStore(self.folder, 100_000_000)
        return self.store

    def corrupt(self, name: PartName) -> None:
        flip_bit(self.store.file_of(name), 4096 + 33_333)

    def truncate(self, name: PartName) -> None:
        file = self.store.file_of(name)
        os.truncate(file, file.stat().st_size - 1)


@pytest.fixture
def disk(tmp_path: Path) -> DiskStore:
    return DiskStore(tmp_path / "parts", 10 * FILE_BYTES)


def put(disk: DiskStore, *numbers: int) -> None:
    for number in numbers:
        disk.put(name_of(number), value_of(name_of(number), PART_BYTES))


def get(disk: DiskStore, number: int) -> bool:
    buffer = bytearray(PART_BYTES)
    found = disk.get_into(name_of(number), memoryview(buffer))
    assert not found or buffer == value_of(name_of(number), PART_BYTES)
    return found


@pytest.mark.parametrize("position", [0, 9, 16, 24, 32, 60, 96, 110, 4096, 8191])
def test_no_flipped_bit_goes_unnoticed(disk: DiskStore, position: int) -> None:
    """In the magic, format, lengths, name, checksum and payload alike."""
    put(disk, 1, 2)
    flip_bit(disk.file_of(name_of(1)), position)
    assert not get(disk, 1)
    assert not disk.file_of(name_of(1)).exists()
    assert get(disk, 2)
    assert disk.check() == []
    disk.close()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8191, 8193])
def test_no_torn_file_goes_unnoticed(disk: DiskStore, size: int, caplog: pytest.LogCaptureFixture) -> None:
    put(disk, 1, 2)
    for number in (1, 2):
        os.truncate(disk.file_of(name_of(number)), size)
    with caplog.at_level(logging.WARNING, "kvferry"):
        assert not get(disk, 1)
        assert not get(disk, 2)
    assert len(caplog.records) == 1, "said once"
    assert disk.used_bytes == 0
    disk.close()


def test_a_file_under_another_files_name_is_a_miss(disk: DiskStore) -> None:
    put(disk, 1, 2)
    shutil.copyfile(disk.file_of(name_of(2)), disk.file_of(name_of(1)))
    assert not get(disk, 1)
    disk.close()


def test_the_longest_unused_leaves_first_also_after_a_restart(disk: DiskStore, tmp_path: Path) -> None:
    put(disk, *range(10))
    for number in range(10):
        os.utime(disk.file_of(name_of(number)), (number, number))
    assert get(disk, 0)
    disk.close()
    disk = DiskStore(tmp_path / "parts", 10 * FILE_BYTES)
    put(disk, 10, 11)
    assert disk.contains([name_of(number) for number in range(12)]) == [True, False, False, *[True] * 9]
    assert disk.check() == []
    disk.close()


def test_a_smaller_budget_is_kept_from_the_start(disk: DiskStore, tmp_path: Path) -> None:
    put(disk, *range(10))
    disk.close()
    disk = DiskStore(tmp_path / "parts", 4 * FILE_BYTES)
    assert disk.used_bytes == 4 * FILE_BYTES
    assert disk.check() == []
    disk.close()


def test_a_value_beyond_the_budget_is_an_error(disk: DiskStore) -> None:
    put(disk, 1)
    with pytest.raises(OSError, match="exceed the budget") as caught:
        disk.put(name_of(2), value_of(name_of(2), 10 * FILE_BYTES))
    assert caught.value.errno == errno.ENOSPC
    assert get(disk, 1), "nothing was evicted for it"
    disk.close()


def test_temporary_files_count_and_orphans_go(disk: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment of the rename a file is temporary: everything in the folder is within the budget even then."""
    sizes: list[int] = []
    replace = Path.replace

    def watch(self: Path, target: Path) -> Path:
        sizes.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    put(disk, *range(25))
    assert len(sizes) == 25
    assert max(sizes) <= 10 * FILE_BYTES
    disk.close()
    orphan = disk.file_of(name_of(24)).with_name(".0123456789abcdef.tmp")
    orphan.write_bytes(b"torn")
    strangers = [tmp_path / "parts" / "notes.txt", orphan.with_name("notes.kv"), orphan.with_name("a.tmp")]
    for stranger in strangers:
        stranger.write_bytes(b"mine")
    disk = DiskStore(tmp_path / "parts", FILE_BYTES)
    assert not orphan.exists()
    assert all(stranger.exists() for stranger in strangers), "what is not named like ours is left alone"
    disk.close()


def test_a_write_that_fails_leaves_nothing(disk: DiskStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put(disk, 1)
    pwrite = os.pwrite

    def full_after_a_page(fd: int, data: memoryview, offset: int) -> int:
        if offset > 4096:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data[:4096], offset)

    monkeypatch.setattr(os, "pwrite", full_after_a_page)
    with pytest.raises(OSError, match="No space left"):
        disk.put(name_of(2), value_of(name_of(2), 3 * 4096))
    monkeypatch.undo()
    assert disk.check() == []
    assert not list(tmp_path.rglob("*.tmp"))
    put(disk, 2)
    assert get(disk, 1)
    assert get(disk, 2)
    disk.close()


def test_short_reads_and_writes_are_gone_on_with(disk: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000] if offset else data, offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:777]], offset))
    put(disk, 1)
    assert get(disk, 1)
    disk.close()


def test_a_vanished_folder_is_a_miss_and_an_error(disk: DiskStore, tmp_path: Path) -> None:
    put(disk, 1, 2)
    shutil.rmtree(tmp_path / "parts")
    assert not get(disk, 1)
    with pytest.raises(FileNotFoundError):
        put(disk, 3)
    assert not (tmp_path / "parts").exists(), "it does not come back by itself"
    disk.close()


def test_the_first_process_writes_and_the_next_reads(
    disk: DiskStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(disk, 1)
    with caplog.at_level(logging.WARNING, "kvferry"):
        reader = DiskStore(tmp_path / "parts", FILE_BYTES)
        for number in (2, 3):
            put(reader, number)
    assert ["another process writes" in record.message for record in caplog.records] == [True]
    assert get(reader, 1), "a reader's budget evicts nothing"
    assert not get(reader, 2)
    flip_bit(disk.file_of(name_of(1)), 5000)
    assert not get(reader, 1)
    assert disk.file_of(name_of(1)).exists(), "a reader removes nothing"
    put(disk, 4)
    disk.close()
    put(reader, 6)
    assert reader.contains([name_of(number) for number in (1, 4, 6)]) == [False, False, True]
    assert reader.check() == [], "once the writer is gone its own budget holds"
    reader.close()


def test_another_process_reads_what_one_wrote(disk: DiskStore, tmp_path: Path) -> None:
    put(disk, 1)
    disk.close()
    program = (
        "import sys, hashlib; from kvferry.store.disk import DiskStore; from kvferry.testing.byte_store import *;"
        "disk = DiskStore(sys.argv[1], 10**6); buffer = bytearray(4096);"
        "assert disk.get_into(name_of(1), memoryview(buffer)); assert buffer == value_of(name_of(1), 4096)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "parts")], check=True)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        DiskStore(tmp_path / "file" / "parts", 1)


class DiskMachine(RuleBasedStateMachine):
    """Puts, gets, deletes, damage, restarts and budgets beside a dict of what may be there.

    A value may always be missing from the store that the model has (it was evicted), never the reverse, and never
    with other bytes.
    """

    names = st.integers(0, 12).map(name_of)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.budget_bytes = 6 * FILE_BYTES
        self.held: dict[PartName, int] = {}
        self.damaged: set[PartName] = set()
        self.disk = DiskStore(self.folder, self.budget_bytes)

    def value(self, name: PartName, num_blocks: int) -> bytes:
        return hashlib.shake_128(name).digest(num_blocks * 4096)

    @rule(name=names, num_blocks=st.integers(1, 3))
    def put(self, name: PartName, num_blocks: int) -> None:
        if self.disk.contains([name]) == [True]:
            num_blocks = self.held[name]
        self.disk.put(name, memoryview(self.value(name, num_blocks)))
        if self.disk.contains([name]) == [True] and name not in self.damaged:
            self.held[name] = num_blocks

    @rule(name=names)
    def get(self, name: PartName) -> None:
        num_blocks = self.held.get(name, 1)
        buffer = bytearray(num_blocks * 4096)
        contained = self.disk.contains([name])[0]
        found = self.disk.get_into(name, memoryview(buffer))
        assert found == (contained and name not in self.damaged)
        if found:
            assert bytes(buffer) == self.value(name, num_blocks)
        self.damaged.discard(name)

    @rule(name=names)
    def delete(self, name: PartName) -> None:
        self.disk.delete([name])
        self.damaged.discard(name)
        assert self.disk.contains([name]) == [False]

    @rule(name=names, position=st.integers(0, 8191), cut=st.booleans())
    def damage(self, name: PartName, position: int, cut: bool) -> None:
        file = self.disk.file_of(name)
        if self.disk.contains([name]) == [True] and name not in self.damaged and not 113 < position < 4096:
            if cut:
                # As long as before, so that the count of bytes stays true until somebody reads.
                size = file.stat().st_size
                os.truncate(file, position)
                os.truncate(file, size)
                if position >= 8191 or self.value(name, 1)[position - 4096 :].strip(b"\0") == b"":
                    return
            else:
                flip_bit(file, position)
            self.damaged.add(name)

    @rule(budget_blocks=st.integers(4, 16))
    def restart(self, budget_blocks: int) -> None:
        self.disk.close()
        self.budget_bytes = budget_blocks * 4096
        self.disk = DiskStore(self.folder, self.budget_bytes)

    @invariant()
    def within_budget_and_consistent(self) -> None:
        files = [file for file in self.folder.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) <= self.budget_bytes
        assert self.disk.check() == []
        names = [name_of(number) for number in range(13)]
        contained = {name for name, held in zip(names, self.disk.contains(names), strict=True) if held}
        assert contained <= self.held.keys() | self.damaged
        self.damaged &= contained

    def teardown(self) -> None:
        self.disk.close()
        shutil.rmtree(self.folder)


TestDiskMachine = DiskMachine.TestCase
TestDiskMachine.settings = settings(max_examples=40, stateful_step_count=30)
