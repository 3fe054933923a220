"""Shared memory: who may map it, what is left behind, and what a full file system does."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvferry.blocks import Slot
from kvferry.errors import ArenaError
from kvferry.store.arena import COMMITTED, FREE, RESERVED, Arena, SlotHeader

UNIT_BYTES = (16 << 10) + 4096
MakeArena = Callable[..., Arena]


@pytest.fixture
def make_arena(tmp_path: Path) -> Iterator[MakeArena]:
    made: list[Arena] = []

    def make(num_bytes: int = 1 << 20) -> Arena:
        made.append(Arena.create(num_bytes, str(tmp_path / "arenas")))
        return made[-1]

    yield make
    for arena in made:
        arena.close()
    assert not list((tmp_path / "arenas").glob("*"))


def header(slot: Slot, state: int) -> SlotHeader:
    return SlotHeader(
        slot.generation, state, slot.num_bytes, 1, 2, 3, bytes(16), b"k" * 32, b"p" * 32, b"g" * 8, b"s" * 8
    )


def test_the_file_and_its_folder_are_the_users_alone(make_arena: MakeArena) -> None:
    path = Path(make_arena().info.path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_an_open_or_foreign_folder_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(ArenaError, match="open to other users: its mode is 777"):
        Arena.create(1 << 20, str(shared))
    link = tmp_path / "link"
    link.symlink_to(shared)
    with pytest.raises(ArenaError, match="is not a folder of user"):
        Arena.create(1 << 20, str(link))
    with pytest.raises(ArenaError, match="no arena can be made"):
        Arena.create(1 << 20, str(Path(__file__) / "below a file"))


def test_only_what_is_claimed_has_memory(make_arena: MakeArena) -> None:
    arena = make_arena()

    def occupied() -> int:
        return Path(arena.info.path).stat().st_blocks * 512

    before = occupied()
    arena.claim(3)
    assert occupied() - before == UNIT_BYTES
    assert before == 2 * 4096, "superblock and table"


def test_a_worker_sees_what_the_owner_wrote(make_arena: MakeArena) -> None:
    owner = make_arena()
    owner.claim(2)
    offset = owner.format_slab(2, 1, 4096, rank=2)[3]
    slot = Slot(offset, 4000, 17)
    owner.write_header(slot, header(slot, RESERVED))
    worker = Arena.attach(owner.info)
    assert worker.holds(slot)
    np.frombuffer(worker.view(slot), dtype=np.uint8)[:] = 7
    assert bytes(owner.view(slot)) == b"\7" * 4000
    owner.set_state(slot, COMMITTED)
    assert worker.read_header(slot) == header(slot, COMMITTED)
    owner.set_state(slot, FREE)
    assert not worker.holds(slot)
    worker.close()


def test_slots_are_aligned_apart_and_contiguous(make_arena: MakeArena) -> None:
    arena = make_arena()
    first = 0
    for num_units, stride in ((1, 64), (1, 640), (2, 4096), (3, 12288), (2, 32768)):
        for unit in range(first, first + num_units):
            arena.claim(unit)
        offsets = arena.format_slab(first, num_units, stride, rank=0)
        assert np.diff(offsets).tolist() == [stride] * (len(offsets) - 1)
        assert offsets[0] % 4096 == 0
        end = offsets[-1] + stride
        assert arena.slab_of(offsets[0]) == arena.slab_of(end - 1) == first
        assert end + stride + 4096 > 2 * 4096 + (first + num_units) * UNIT_BYTES
        first += num_units


def test_a_slab_made_anew_forgets_its_slots(make_arena: MakeArena) -> None:
    arena = make_arena()
    arena.claim(0)
    arena.claim(1)
    old = [Slot(offset, 64, 1 + index) for index, offset in enumerate(arena.format_slab(1, 1, 64, rank=0))]
    for slot in old:
        arena.write_header(slot, header(slot, COMMITTED))
    assert all(map(arena.holds, old))
    arena.free_slab(1, 1)
    assert not any(map(arena.holds, old))
    arena.format_slab(0, 2, 640, rank=0)
    assert not any(map(arena.holds, old))
    assert arena.read_header(Slot(old[1].offset, 64, 1)) is None


def test_a_slab_has_no_slot_that_its_memory_resembles(make_arena: MakeArena) -> None:
    arena = make_arena()
    arena.claim(0)
    start = arena.unit_offset(0)
    arena.buffer[start : start + UNIT_BYTES] = b"\2" * UNIT_BYTES
    slots = [Slot(offset, 640, 0) for offset in arena.format_slab(0, 1, 640, rank=0)]
    assert {arena.read_header(slot) for slot in slots} == {
        SlotHeader(0, FREE, 0, 0, 0, 0, *map(bytes, (16, 32, 32, 8, 8)))
    }


def test_an_offset_in_no_slab_has_no_header(make_arena: MakeArena) -> None:
    arena = make_arena()
    for offset in (0, 4096, 2 * 4096, 1 << 20, 1 << 40):
        assert arena.read_header(Slot(offset, 64, 1)) is None
        assert arena.state_of(Slot(offset, 64, 1)) is None


def test_a_header_cut_short_says_free(make_arena: MakeArena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before its last write, whoever fills a slot leaves it absent."""
    arena = make_arena()
    arena.claim(0)
    slot = Slot(arena.format_slab(0, 1, 64, rank=0)[0], 64, 5)

    def killed(self: Arena, header_offset: int, state: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Arena, "_write_state", killed)
    with pytest.raises(KeyboardInterrupt):
        arena.write_header(slot, header(slot, COMMITTED))
    assert arena.read_header(slot) == header(slot, FREE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_bytes": 1 << 21}, "has 1048576 bytes, expected 2097152"),
        ({"boot_id": "0" * 32}, "belongs to another store"),
        ({"path": "/dev/shm/no-such.arena"}, "cannot be opened"),
    ],
)
def test_a_worker_trusts_only_the_arena_it_was_told_of(
    make_arena: MakeArena, change: dict[str, object], reason: str
) -> None:
    with pytest.raises(ArenaError, match=reason):
        Arena.attach(dataclasses.replace(make_arena().info, **change))


def test_a_file_that_is_no_arena_is_refused(make_arena: MakeArena) -> None:
    arena = make_arena()
    Path(arena.info.path).write_bytes(bytes(1 << 20))
    with pytest.raises(ArenaError, match="is no arena of format 2"):
        Arena.attach(arena.info)


def test_arenas_of_dead_owners_are_removed_and_of_living_ones_kept(make_arena: MakeArena) -> None:
    living = make_arena()
    folder = str(Path(living.info.path).parent)
    program = (
        "import sys, time; from kvferry.store.arena import Arena;"
        "arena = Arena.create(1 << 20, sys.argv[1]); print(arena.info.path, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    dead = Path(process.stdout.readline().strip())
    process.stdout.close()
    make_arena()
    assert dead.exists(), "its owner lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    make_arena()
    assert not dead.exists()
    assert Path(living.info.path).exists()


def test_views_outlive_the_mapping(make_arena: MakeArena) -> None:
    arena = make_arena()
    arena.claim(0)
    array = np.frombuffer(arena.view(Slot(arena.format_slab(0, 1, 64, rank=0)[0], 64, 1)), dtype=np.uint8)
    arena.close()
    array[:] = 3
    assert array.sum() == 3 * 64
    del arena, array


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs, while it is needed."""
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting is not allowed here; on a machine where it is, run the tests as root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs; run the tests as root")
def test_a_full_file_system_is_an_error_code(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=512k"):
        arena = Arena.create(1 << 20, str(tmp_path / "small"))
        with pytest.raises(OSError, match="No space left") as caught:
            [arena.claim(unit) for unit in range(arena.num_units)]
        assert caught.value.errno == errno.ENOSPC
        arena.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a tmpfs of huge pages; run the tests as root")
def test_memory_has_huge_pages_where_its_file_system_has(tmp_path: Path) -> None:
    with mounted(tmp_path / "huge", "size=64m,huge=within_size"):
        arena = Arena.create(32 << 20, str(tmp_path / "huge"))
        for unit in range(arena.num_units):
            arena.claim(unit)
            arena.populate(unit)
        maps = Path("/proc/self/smaps").read_text(encoding="utf-8")
        of_arena = maps[maps.index(arena.info.path) :].partition("VmFlags")[0]
        (huge_kib,) = (int(line.split()[1]) for line in of_arena.splitlines() if line.startswith("ShmemPmdMapped"))
        assert huge_kib > 0, "how much of it is the kernel's choice"
        arena.close()
