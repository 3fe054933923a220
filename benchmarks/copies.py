"""Copies of 64 KiB slots between an arena and an engine's pool in random order, beside one plain memcpy of as much.

Both go over memory that was touched before and is larger than the processor's caches; rounds are interleaved.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kvferry.blocks import Geometry, GroupKind, GroupSpec
from kvferry.config import StoreOptions
from kvferry.store.keys import chunk_keys, root_key
from kvferry.store.store import Store
from kvferry.transfer.copy import Copier, CopyEngine
from kvferry.transfer.layout import PoolSpec, UnknownLayout, read_pool_tensor
from kvferry.transfer.plan import Direction, PartBlocks

SLOT_BYTES = 65_536
BAR = 0.70
PLAIN = "plain memcpy"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(num_slots: int, num_rounds: int) -> dict[str, list[float]]:
    """Seconds by what was copied, one a round."""
    # A block of 64 KiB: 2 layers, keys and values, 4 heads x 32 tokens x 32 elements of 4 bytes.
    pool = torch.zeros(num_slots, 2, 2, 4096)
    layout = read_pool_tensor(pool, PoolSpec(4, head_dim=32, tokens_per_block=32, dtype="float32"), (0, 1))
    assert not isinstance(layout, UnknownLayout)
    assert layout.part_bytes(32) == SLOT_BYTES
    shape = Geometry("benchmark", "", 32, 1, (GroupSpec(GroupKind.FULL, (0, 1), SLOT_BYTES),))
    store = Store(StoreOptions(chunk_tokens=32, l1_size_gb=num_slots * SLOT_BYTES * 1.1 / 1e9))
    store.register("benchmark", 0, shape)
    keys = chunk_keys(root_key(shape), range(32 * num_slots), 32)
    job = store.begin_store(shape, keys, 0)
    assert job is not None
    assert len(job.parts) == num_slots
    slots = [part.slots[0] for part in job.parts]
    order = random.Random(1)
    order.shuffle(slots)
    blocks = order.sample(range(num_slots), num_slots)
    parts = [PartBlocks(slot.offset, 0, [block]) for slot, block in zip(slots, blocks, strict=True)]
    copier = Copier(layout.device, store.mapping.buffer)
    engine = CopyEngine(layout, copier, 1)
    source = np.ones(num_slots * SLOT_BYTES, dtype=np.uint8)
    destination = np.zeros_like(source)
    works: dict[str, Callable[[], object]] = {
        PLAIN: lambda: np.copyto(destination, source),
        "pool to arena": lambda: engine.submit(Direction.FROM_POOL, parts, None).wait(),
        "arena to pool": lambda: engine.submit(Direction.TO_POOL, parts, None).wait(),
    }
    for work in works.values():
        work()
    times = {name: [] for name in works}
    for _ in range(num_rounds):
        for name, work in works.items():
            times[name].append(seconds(work))
    copier.close()
    store.done(job.job_id, 0, True)
    store.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=4096, help="slots of 64 KiB (default: 4096, 268 MB)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    times = measure(arguments.slots, arguments.rounds)
    medians = {name: float(np.median(of)) for name, of in times.items()}
    num_bytes = arguments.slots * SLOT_BYTES
    figures = {
        name: {"gb_per_second": num_bytes / median / 1e9, "of_memcpy": medians[PLAIN] / median}
        for name, median in medians.items()
    }
    table = Table(f"{num_bytes / 1e6:.0f} MB in 64 KiB slots", "GB/s", "of memcpy", title="copy")
    for name, figure in figures.items():
        table.add_row(name, f"{figure['gb_per_second']:.2f}", f"{figure['of_memcpy']:.0%}")
    Console(stderr=True).print(table)
    met = all(figure["of_memcpy"] >= BAR for figure in figures.values())
    text = json.dumps({"figures": figures, "bar": BAR, "bar_met": met})
    print(text)
    if arguments.json:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
