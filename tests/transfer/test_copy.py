"""Copies through real tensors, in host memory and, where there is one, on a CUDA device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from kvferry.transfer.copy import Copier, CopyEngine, mark, self_test
from kvferry.transfer.layout import Layout, PoolSpec, Region, read_pool_tensor, read_regions
from kvferry.transfer.plan import Direction, PartBlocks

SPEC = PoolSpec(num_heads=2, head_dim=16, tokens_per_block=8, dtype="float32")
LAYERS = (0, 1, 2)
PAGE = 2 * 16 * 8
BLOCKS_PER_PART = 4
NUM_BLOCKS = 24

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a CUDA build of torch"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def layout(device: str) -> Layout:
    pool = torch.randn(NUM_BLOCKS, len(LAYERS) + 1, 2, PAGE, device=device)[:, : len(LAYERS)]
    layout = read_pool_tensor(pool, SPEC, LAYERS)
    assert isinstance(layout, Layout)
    return layout


@pytest.fixture
def arena(layout: Layout) -> bytearray:
    return bytearray(5 * BLOCKS_PER_PART * layout.block_bytes)


@pytest.fixture
def engine(layout: Layout, arena: bytearray) -> Iterator[CopyEngine]:
    copier = Copier(layout.device, memoryview(arena))
    yield CopyEngine(layout, copier, BLOCKS_PER_PART)
    copier.close()


def parts_at(layout: Layout, slots: list[int], ids: list[int]) -> list[PartBlocks]:
    part_bytes = BLOCKS_PER_PART * layout.block_bytes
    return [
        PartBlocks(slot * part_bytes, 0, ids[i * BLOCKS_PER_PART : (i + 1) * BLOCKS_PER_PART])
        for i, slot in enumerate(slots)
    ]


def test_bytes_leave_and_come_back_into_other_blocks(layout: Layout, arena: bytearray, engine: CopyEngine) -> None:
    pool, before = layout.regions[0].pages, layout.regions[0].pages.clone()
    saved, loaded = [3, 9, 4, 5, 0, 1, 2, 23], [8, 7, 22, 6, 10, 11, 12, 13]
    engine.submit(Direction.FROM_POOL, parts_at(layout, [4, 1], saved), None).wait()
    part_bytes = BLOCKS_PER_PART * layout.block_bytes
    assert bytes(arena[4 * part_bytes : 5 * part_bytes]) == before[saved[:4]].cpu().numpy().tobytes()
    assert bytes(arena[part_bytes : 2 * part_bytes]) == before[saved[4:]].cpu().numpy().tobytes()
    assert not any(arena[2 * part_bytes : 4 * part_bytes])

    engine.submit(Direction.TO_POOL, parts_at(layout, [4, 1], loaded), None).wait()
    assert torch.equal(pool[loaded], before[saved])
    untouched = [block for block in range(NUM_BLOCKS) if block not in loaded]
    assert torch.equal(pool[untouched], before[untouched])


def test_a_load_may_begin_inside_a_part(layout: Layout, arena: bytearray, engine: CopyEngine) -> None:
    pool = layout.regions[0].pages
    engine.submit(Direction.FROM_POOL, parts_at(layout, [2], [0, 1, 2, 3]), None).wait()
    offset = 2 * BLOCKS_PER_PART * layout.block_bytes
    engine.submit(Direction.TO_POOL, [PartBlocks(offset, 2, [20])], None).wait()
    assert torch.equal(pool[20], pool[2])


def test_copies_of_many_bytes_are_shared_between_threads() -> None:
    spec = PoolSpec(num_heads=4, head_dim=64, tokens_per_block=32, dtype="bfloat16")
    pool = torch.randn(200, 2, 2, 4 * 64 * 32).bfloat16()
    layout = read_pool_tensor(pool, spec, (0, 1))
    assert isinstance(layout, Layout)
    arena = bytearray(200 * layout.block_bytes)
    copier = Copier(layout.device, memoryview(arena))
    engine = CopyEngine(layout, copier, 200)
    ids = torch.randperm(200).tolist()
    before = pool.clone()
    engine.submit(Direction.FROM_POOL, [PartBlocks(0, 0, ids)], None).wait()
    pool.zero_()
    engine.submit(Direction.TO_POOL, [PartBlocks(0, 0, ids)], None).wait()
    copier.close()
    assert torch.equal(pool, before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvferry-copy")]


@pytest.mark.parametrize(
    "part", [PartBlocks(-1, 0, [1]), PartBlocks(0, 19, [1, 2]), PartBlocks(0, 0, [NUM_BLOCKS]), PartBlocks(0, 0, [-1])]
)
def test_nothing_outside_arena_or_pool_is_touched(layout: Layout, engine: CopyEngine, part: PartBlocks) -> None:
    with pytest.raises(IndexError):
        engine.submit(Direction.TO_POOL, [part], None)


def test_the_self_test_passes_and_leaves_the_pool_as_it_was(layout: Layout) -> None:
    before = layout.regions[0].pages.clone()
    assert self_test(layout)
    assert torch.equal(layout.regions[0].pages, before)


def test_the_self_test_notices_wrong_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the layout had been guessed: the stride of blocks without their gap."""
    pool = torch.randn(NUM_BLOCKS, len(LAYERS) + 1, 2, PAGE)
    layout = read_pool_tensor(pool[:, : len(LAYERS)], SPEC, LAYERS)
    assert isinstance(layout, Layout)
    monkeypatch.setattr(Region, "stride_bytes", property(lambda region: region.page_bytes))
    before = pool.clone()
    assert not self_test(layout)
    assert torch.equal(pool, before)


def split_keys_and_values(device: str) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    """Keys and values of a layer in one tensor each, `[2, num_blocks, ...]`, two layers."""
    tensors = [torch.randn(2, NUM_BLOCKS, 8, 2, 16, device=device) for _ in range(2)]
    return [(tensor[kind], (layer,)) for layer, tensor in enumerate(tensors) for kind in range(2)]


def heads_before_tokens(device: str) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    """The same seen as tokens before heads, as an engine's view may be."""
    tensors = [torch.randn(NUM_BLOCKS, 2, 2, 8, 16, device=device).bfloat16() for _ in range(2)]
    return [(tensor.transpose(2, 3), (layer,)) for layer, tensor in enumerate(tensors)]


def layers_side_by_side(device: str) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    """One tensor for all layers, with pages of several sizes."""
    keys, state = torch.randn(NUM_BLOCKS, 3, 2, PAGE, device=device), torch.randn(NUM_BLOCKS, 77, device=device)
    return [(keys[:, 0], (0,)), (keys[:, 1:], (1, 2)), (state, (3,))]


@pytest.mark.parametrize("make", [split_keys_and_values, heads_before_tokens, layers_side_by_side])
def test_pools_of_several_regions(
    make: Callable[[str], list[tuple[torch.Tensor, tuple[int, ...]]]], device: str
) -> None:
    views = make(device)
    layout = read_regions(views, 8, "test")
    assert isinstance(layout, Layout)
    assert self_test(layout)
    before = [pages.clone() for pages, _ in views]
    arena = bytearray(3 * BLOCKS_PER_PART * layout.block_bytes)
    copier = Copier(layout.device, memoryview(arena))
    engine = CopyEngine(layout, copier, BLOCKS_PER_PART)
    saved, loaded = [3, 9, 4, 5, 0, 1, 2, 23], [8, 7, 22, 6, 10, 11, 12, 13]
    now = mark(torch.cuda.current_stream()) if device == "cuda" else None
    engine.submit(Direction.FROM_POOL, parts_at(layout, [2, 0], saved), now).wait()
    copy = engine.submit(Direction.TO_POOL, parts_at(layout, [2, 0], loaded), now)
    for layer in range(4):
        copy.wait_for_layer(layer, torch.cuda.current_stream() if device == "cuda" else None)
    copy.wait()
    copier.close()
    untouched = [block for block in range(NUM_BLOCKS) if block not in loaded]
    for (pages, _), old in zip(views, before, strict=True):
        assert torch.equal(pages[loaded], old[saved])
        assert torch.equal(pages[untouched], old[untouched])


def test_a_copy_is_made_also_while_the_interpreter_ends(
    engine: CopyEngine, layout: Layout, arena: bytearray, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.submit(Direction.FROM_POOL, parts_at(layout, [1], [3, 5, 7, 9]), None).wait()
    of_part = slice(BLOCKS_PER_PART * layout.block_bytes, 2 * BLOCKS_PER_PART * layout.block_bytes)
    stored = bytes(arena[of_part])
    arena[of_part] = bytes(len(stored))
    monkeypatch.setattr("concurrent.futures.thread._shutdown", True)  # executors refuse from then on
    engine.submit(Direction.FROM_POOL, parts_at(layout, [1], [3, 5, 7, 9]), None).wait()
    assert any(stored)
    assert bytes(arena[of_part]) == stored
