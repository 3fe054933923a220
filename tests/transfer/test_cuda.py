"""Copies on a CUDA device: every byte arrives, whatever else runs there, and by every way that copies can take."""

from __future__ import annotations

import mmap
import os
import random
import time

import numpy as np
import pytest
import torch

from kvferry.transfer import kernels, runs
from kvferry.transfer.copy import Copier, CopyEngine, mark
from kvferry.transfer.cuda import PIECE_BYTES, CudaError, Runtime
from kvferry.transfer.kernels import WORD_BYTES, PageKernel
from kvferry.transfer.layout import Layout, read_regions
from kvferry.transfer.plan import Direction, Pages, PartBlocks, Strides, block_rows
from kvferry.transfer.runs import RunCopies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a CUDA build of torch"),
]

NUM_BLOCKS, NUM_SLOTS, BLOCKS_PER_PART, NUM_LAYERS = 512, 64, 4, 4
NUM_COPIES = int(os.environ.get("KVFERRY_TEST_BLOCK_COPIES", "40000"))
"""A million take half a minute."""


class Never:
    """Stands for a way to copy."""

    def copy(self, *_: object) -> None:
        return None


@pytest.fixture
def arena() -> memoryview:
    memory = mmap.mmap(-1, 96 << 20)  # a piece and a half
    return memoryview(memory)


def pinned(pool: torch.Tensor, arena: memoryview) -> tuple[Copier, CopyEngine]:
    """Of a pool of one layer, and parts of 16 blocks. All of the arena is registered, or cannot be."""
    layout = read_regions([(pool, (0,))], 1, "test")
    assert isinstance(layout, Layout)
    copier = Copier(torch.device("cuda", 0), arena)
    assert copier.cuda is not None
    assert copier.cuda.pin(30)
    return copier, CopyEngine(layout, copier, 16)


@pytest.mark.parametrize("is_in_runs", [True, False], ids=["runs", "single pages"])
@pytest.mark.parametrize("page_bytes", [4096, 65_536, 4096 + 8])
def test_bytes_stay_right_while_the_device_computes(
    page_bytes: int, is_in_runs: bool, arena: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round writes new blocks on the main stream behind a sleep of random length, saves them, overwrites them
    with the load of another slot, and at once computes on what was loaded; a model on the host knows what every block
    must be."""
    chooser = random.Random(page_bytes)
    pools = [torch.zeros(NUM_BLOCKS, page_bytes // 8, dtype=torch.int64, device="cuda") for _ in range(NUM_LAYERS)]
    layout = read_regions([(pool, (layer,)) for layer, pool in enumerate(pools)], 1, "test")
    assert isinstance(layout, Layout)
    part_bytes = BLOCKS_PER_PART * layout.block_bytes
    num_slots = min(NUM_SLOTS, len(arena) // part_bytes)
    copier = Copier(torch.device("cuda", 0), arena)
    assert copier.cuda is not None
    copier.cuda.wait_until_warm()
    monkeypatch.setattr(runs, "PIECE_BYTES", chooser.choice([1 << 18, runs.PIECE_BYTES]))
    if not is_in_runs:
        copier.cuda._runs = dict.fromkeys(Direction, Never())  # type: ignore[arg-type]
    engine = CopyEngine(layout, copier, BLOCKS_PER_PART)
    main = torch.cuda.current_stream()
    in_slot = [0] * num_slots
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    copied = number = 0
    while copied < NUM_COPIES:
        blocks = chooser.sample(range(NUM_BLOCKS), 2 * BLOCKS_PER_PART)
        to_save, to_load = blocks[:BLOCKS_PER_PART], blocks[BLOCKS_PER_PART:]
        slot, other = chooser.sample(range(num_slots), 2)
        number += 1
        if chooser.random() < 0.3:
            torch.cuda._sleep(chooser.randrange(1, 2_000_000))
        for layer, pool in enumerate(pools):
            pool[to_save] = number * 10 + layer
        save = engine.submit(Direction.FROM_POOL, [PartBlocks(slot * part_bytes, 0, to_save)], mark(main))
        load = engine.submit(Direction.TO_POOL, [PartBlocks(other * part_bytes, 0, to_load)], mark(main))
        for layer, pool in enumerate(pools):
            load.wait_for_layer(layer, main)
            expected = in_slot[other] * 10 + layer if in_slot[other] else 0
            wrong += (pool[to_load] != expected).sum()
        save.wait()
        in_slot[slot] = number
        load.wait()
        copied += 2 * BLOCKS_PER_PART * NUM_LAYERS
    if is_in_runs and page_bytes % WORD_BYTES == 0:
        assert all(copier.cuda._runs[way]._num_pieces for way in Direction), "this way was taken"
    copier.close()
    assert int(wrong) == 0


@pytest.mark.parametrize("broken", ["batch", "kernel", "register", "runs"])
def test_a_way_that_fails_is_replaced_by_the_next_and_named_once(
    broken: str, arena: memoryview, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise CudaError("out of order")

    way = {"batch": (Runtime, "_copy_batch"), "kernel": (PageKernel, "moving"), "register": (Runtime, "register")}
    way["runs"] = (RunCopies, "_copy")
    monkeypatch.setattr(*way[broken], fail)
    pool = torch.randint(0, 255, (64, 1 << 16), dtype=torch.uint8, device="cuda")
    copier, engine = pinned(pool, arena)
    now = mark(torch.cuda.current_stream())
    kept = pool.clone()
    for _ in range(2):
        engine.submit(Direction.FROM_POOL, [PartBlocks(0, 0, range(1, 33, 2))], now).wait()
        engine.submit(Direction.TO_POOL, [PartBlocks(0, 0, range(32, 64, 2))], now).wait()
    copier.close()
    assert torch.equal(pool[32:64:2], kept[1:33:2])
    assert torch.equal(pool[1:32:2], kept[1:32:2])
    said = [record.message for record in caplog.records if "slow" in record.message]
    assert len(said) == (2 if broken in ("kernel", "runs") else 1), "each way has its runs"


def test_runs_in_two_registered_pieces_from_within_a_pass_and_beside_it(
    arena: memoryview, caplog: pytest.LogCaptureFixture
) -> None:
    """Engines run passes in inference mode; threads beside them are not in it."""
    pool = torch.randint(0, 255, (64, 1 << 16), dtype=torch.uint8, device="cuda")
    copier, engine = pinned(pool, arena)
    assert copier.cuda is not None
    at = PIECE_BYTES - (5 << 16) - 4096  # not even at a page
    engine.submit(Direction.FROM_POOL, [PartBlocks(at, 0, range(0, 32, 2))], mark(torch.cuda.current_stream())).wait()
    for in_pass in (True, False, True):
        pool[32:] = 0
        with torch.inference_mode(in_pass):
            engine.submit(Direction.TO_POOL, [PartBlocks(at, 0, range(63, 31, -2))], mark(torch.cuda.current_stream()))
            torch.cuda.synchronize()
        assert torch.equal(pool[range(63, 31, -2)], pool[0:32:2])
    assert all(copier.cuda._runs[way]._num_pieces for way in Direction), "this way was taken"
    copier.close()
    assert not caplog.records


def test_the_kernel_s_first_numbers_wait_for_who_had_their_memory() -> None:
    """What torch allocates may have been freed by work that is enqueued and still to run."""
    aside, pool = (torch.full((1 << 16,), value, dtype=torch.uint8, device="cuda") for value in (1, 0))
    stream, of_one = torch.cuda.Stream(), (np.zeros(1, np.int64), np.ones(1, np.int64))
    strides = Strides(0, 1, *(np.array([number]) for number in (pool.data_ptr(), 1 << 16, 1 << 16)))
    pages = Pages(block_rows([PartBlocks(0, 0, [0])]), strides, Direction.TO_POOL, slice(0, 1))

    def move() -> None:
        with PageKernel(stream).moving(pages, *of_one) as move:
            move(0, 1, aside.data_ptr())

    move()  # compiles the kernel
    torch.cuda.synchronize()
    pool.zero_()
    main = mark(torch.cuda.current_stream())
    torch.cuda._sleep(2_000_000_000)
    busy = mark(torch.cuda.current_stream())
    move()
    moved = mark(stream)
    main.synchronize()
    time.sleep(0.2)
    assert not busy.query(), "a second's sleep, before the end of which this looks"
    assert not moved.query()
    torch.cuda.synchronize()
    assert bool(pool.all())


def test_copies_beside_a_pass_do_not_wait_for_its_end(arena: memoryview) -> None:
    """As they would if memory were made for them meanwhile. Of more steps than have been under way at once before."""
    pool = torch.zeros(NUM_LAYERS, 512, 1 << 16, dtype=torch.uint8, device="cuda")
    layout = read_regions([(pages, (layer,)) for layer, pages in enumerate(pool)], 1, "test")
    assert isinstance(layout, Layout)
    copier = Copier(torch.device("cuda", 0), arena)
    assert copier.cuda is not None
    assert copier.cuda.pin(30)
    engine = CopyEngine(layout, copier, 16)
    parts = [PartBlocks(0, 0, range(16))]
    for way in Direction:
        engine.submit(way, parts).wait()  # What is loaded at first use is there.
        torch.cuda._sleep(4_000_000_000)
        busy = mark(torch.cuda.current_stream())
        copies = [engine.submit(way, parts) for _ in range(40)]
        copies[-1].wait()
        assert not busy.query(), "two seconds' sleep"
        torch.cuda.synchronize()
    copier.close()


def test_numbers_that_are_still_to_be_read_are_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_RING_NUMBERS", 150)
    choose, stream = random.Random(0), torch.cuda.Stream()
    ring = kernels._NumberRing(stream)
    seen: list[tuple[torch.Tensor, int]] = []
    with torch.cuda.stream(stream):
        for number in range(1, 400):
            if choose.random() < 0.2:
                torch.cuda._sleep(choose.randrange(1, 1_000_000))
            sent = ring.send(np.full(choose.randrange(1, 60), number))
            if choose.random() < 0.3:
                torch.cuda._sleep(choose.randrange(1, 1_000_000))
            seen.append((sent.sum(), number * sent.numel()))
            ring.are_in_use_until_now()
    torch.cuda.synchronize()
    assert [int(found) for found, _ in seen] == [expected for _, expected in seen]


def test_the_kernel_is_compiled_before_somebody_waits(arena: memoryview) -> None:
    """Once for each direction, wherever its numbers lie."""
    pool = torch.zeros(512, 1 << 16, dtype=torch.uint8, device="cuda")
    compiled = kernels._move.device_caches[0][0]
    copier, engine = pinned(pool, arena)
    assert copier.cuda is not None
    num_compiled = len(compiled)
    for num_blocks in (16, 13, 11, 16, 9):  # An odd number of them moves what comes next to an odd place.
        for way in Direction:
            engine.submit(way, [PartBlocks(0, 0, range(num_blocks))]).wait()
    assert len(compiled) == num_compiled == 2
    copier.close()


@pytest.mark.parametrize("way", Direction)
def test_pages_of_all_lengths_are_moved(way: Direction) -> None:
    """Of several regions, from a word to more than a program moves before it looks for the next page."""
    rng = np.random.default_rng(0)
    page_bytes = np.array([16, 4096, 4112, 65_536, 65_552, 400_000])
    stride_bytes = page_bytes + 32
    num_blocks, ids = 40, rng.permutation(40)[:24]
    pool = torch.from_numpy(rng.integers(0, 256, int(stride_bytes.sum()) * num_blocks, dtype=np.uint8)).cuda()
    aside = torch.from_numpy(rng.integers(0, 256, int(page_bytes.sum()) * 24, dtype=np.uint8)).cuda()
    starts = num_blocks * (np.cumsum(stride_bytes) - stride_bytes)
    strides = Strides(0, 8, pool.data_ptr() + starts, stride_bytes, page_bytes)
    parts = [PartBlocks(at, 0, ids[8 * at : 8 * at + 8].tolist()) for at in range(3)]
    pages = Pages(block_rows(parts), strides, way, slice(0, 6))
    heads, lengths = pages.rows.stretches(100)
    expected = pool.cpu().numpy(), aside.cpu().numpy()
    place = 0
    for part in parts:
        for start, stride, size in zip(starts, stride_bytes, page_bytes, strict=True):
            for block in part.block_ids:
                in_pool, at = expected[0][start + block * stride :][:size], expected[1][place:][:size]
                (in_pool if way is Direction.TO_POOL else at)[:] = at if way is Direction.TO_POOL else in_pool
                place += size
    with PageKernel(torch.cuda.Stream()).moving(pages, heads, lengths) as move:
        for first, end in ((8, 24), (0, 8)):
            move(first, end, aside.data_ptr())
    torch.cuda.synchronize()
    assert np.array_equal(pool.cpu().numpy(), expected[0])
    assert np.array_equal(aside.cpu().numpy(), expected[1])
