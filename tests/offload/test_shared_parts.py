"""Parts that ranks share: the first rank saves them, and each has them from there."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from kvferry.blocks import Geometry, GroupKind, GroupSpec, Job
from kvferry.config import StoreOptions
from kvferry.offload.metadata import CopyJob, PartCopy
from kvferry.offload.mover import Mover
from kvferry.store.store import Store
from kvferry.testing.block_store import CHUNK_TOKENS, keys_of, register
from kvferry.transfer.layout import Layout, PoolSpec, read_pool_tensor

NUM_RANKS, NUM_CHUNKS, NUM_BLOCKS = 3, 4, 8
SPEC = PoolSpec(num_heads=1, head_dim=512, tokens_per_block=CHUNK_TOKENS, dtype="float32")
PART_BYTES = 2 * CHUNK_TOKENS * 512 * 4


class Rank:
    """Pools of a latent group and an ordinary one, filled with a number that is the rank's own, and a mover."""

    def __init__(self, store: Store, rank: int) -> None:
        self.pools = [torch.full((NUM_BLOCKS, 1, 2, CHUNK_TOKENS * 512), 10.0 * group + rank) for group in range(2)]
        layouts = []
        for pool in self.pools:
            layout = read_pool_tensor(pool, SPEC, (0,))
            assert isinstance(layout, Layout)
            layouts.append(layout)
        self.mover = Mover(store, store.mapping, layouts, StoreOptions(chunk_tokens=CHUNK_TOKENS), rank)

    def await_end(self, job_id: int) -> bool:
        while not (ended := self.mover.take_ended()):
            time.sleep(0.001)
        return ended[job_id]


def order(job: Job, first_block: int) -> CopyJob:
    return CopyJob(job.job_id, [PartCopy(of.group, of.slots, 0, [first_block + of.chunk]) for of in job.parts])


def test_the_first_rank_saves_for_all(tmp_path: Path) -> None:
    group = GroupSpec(GroupKind.FULL, (0,), PART_BYTES)
    geometry = Geometry("latent", "layout", CHUNK_TOKENS, NUM_RANKS, (replace(group, is_shared=True), group))
    store = Store(StoreOptions(chunk_tokens=CHUNK_TOKENS, l1_size_gb=0.002, arena_dir=str(tmp_path)))
    register(store, geometry)
    ranks = [Rank(store, rank) for rank in range(NUM_RANKS)]
    keys = keys_of(geometry, NUM_CHUNKS)
    saving = store.begin_store(geometry, keys, 0)
    assert saving is not None
    for rank in reversed(ranks):
        assert store.match(geometry, keys).num_chunks == 0
        rank.mover.save([order(saving, 0)], None)
        assert rank.await_end(saving.job_id)
    assert store.stats()["entries_bytes"] == NUM_CHUNKS * PART_BYTES * (1 + NUM_RANKS)
    loading = store.begin_load(geometry, keys, 0)
    assert loading is not None
    for rank in ranks:
        rank.mover.load_beside(order(loading, NUM_CHUNKS), None)
        assert rank.await_end(loading.job_id)
    for number, rank in enumerate(ranks):
        latent, ordinary = (pool[NUM_CHUNKS : 2 * NUM_CHUNKS] for pool in rank.pools)
        assert torch.all(latent == 0.0), "what rank 0 saved"
        assert torch.all(ordinary == 10.0 + number)
        rank.mover.close()
    assert store.stats()["leases"] == 0
    store.check()
    store.close()
