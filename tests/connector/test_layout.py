"""What connectors see of pools."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvferry.connector.layout import KvCacheLayout, describe_kv, valid_page_slots


def make_layout(num_groups: int) -> tuple[KvCacheLayout, list[torch.Tensor]]:
    """Groups of two layers each, pools of 64 pages."""
    pools = [torch.rand(64, 2, 2, 16) for _ in range(num_groups)]
    described = [((2 * index, 2 * index + 1), None, pool) for index, pool in enumerate(pools)]
    return KvCacheLayout(4, tuple(describe_kv(index, *pool) for index, pool in enumerate(described))), pools


def test_places_without_a_page_are_left_out_and_the_others_keep_theirs() -> None:
    assert list(valid_page_slots([-1, 7, -1, 0])) == [(1, 7), (3, 0)]
    assert list(valid_page_slots([])) == []


def test_a_page_is_a_view_of_the_pool_and_minus_one_is_none() -> None:
    layout, (pool, _) = make_layout(2)
    (region,) = layout.groups[0].regions
    assert layout.dtype is torch.float32
    region.slot_tensor(3, torch.float32)[:] = 5
    assert (pool[3] == 5).all()
    assert torch.equal(region.slot_tensor(2), pool[2].flatten().view(torch.uint8))
    for slot in (-1, 64):
        with pytest.raises(IndexError, match=f"page {slot} is not in 0 .. 63"):
            region.slot_tensor(slot)


def test_a_part_of_the_pool_that_goes_to_the_cpu_is_a_copy_as_from_a_gpu(tmp_path: Path) -> None:
    layout, (pool,) = make_layout(1)
    seen = layout.as_single_pool_tensor()
    assert seen is not None
    assert seen.data_ptr() == pool.data_ptr()
    by_page = layout.groups[0].regions[0].slot_tensor(3)
    for part in (seen[3].cpu(), seen[3].to("cpu"), seen[3].to("cpu", non_blocking=True), by_page.cpu()):
        assert type(part) is torch.Tensor
        assert part.untyped_storage().nbytes() == pool[3].nbytes
    assert torch.equal(seen[3].cpu(), pool[3])
    assert torch.equal(seen[3].to(torch.float64), pool[3].double())
    torch.save(seen[3].cpu(), tmp_path / "block.pt")
    assert (tmp_path / "block.pt").stat().st_size < pool.nbytes
    seen[5].copy_(torch.load(tmp_path / "block.pt"))
    assert torch.equal(pool[5], pool[3])


def test_several_pools_are_not_one_tensor() -> None:
    layout, _ = make_layout(2)
    assert layout.as_single_pool_tensor() is None
