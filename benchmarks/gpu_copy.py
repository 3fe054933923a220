"""Copies between GPU memory and a shared-memory arena by size of page, beside one plain copy of pinned memory.

In random or sequential order, to the GPU, from it, and both at once; rounds are interleaved, medians are shown.
The bars: from 64 KiB pages on 95 % of the plain copy each way; below, 88 % to the GPU and 80 % from it; both ways
together at least 1.5 times one. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import mmap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from kvferry.transfer.copy import Copier, CopyEngine
from kvferry.transfer.layout import Layout, read_regions
from kvferry.transfer.plan import Direction, PartBlocks

PAGE_KIB = [4, 8, 16, 32, 64, 128, 512, 2048]
NUM_REGIONS = 64
BLOCKS_PER_PART = 16
WAYS = {Direction.TO_POOL: "to the GPU", Direction.FROM_POOL: "from the GPU"}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Scene:
    """Pools of one page size, and parts of the arena that hold half of them."""

    def __init__(self, page_bytes: int, num_bytes: int, copier: Copier, *, in_order: bool) -> None:
        num_copied = num_bytes // (page_bytes * NUM_REGIONS)  # a multiple of BLOCKS_PER_PART
        pools = [torch.empty(2 * num_copied, page_bytes, dtype=torch.uint8, device="cuda") for _ in range(NUM_REGIONS)]
        layout = read_regions([(pool, (layer,)) for layer, pool in enumerate(pools)], 1, "benchmark")
        assert isinstance(layout, Layout)
        self.engine, self.threads = CopyEngine(layout, copier, BLOCKS_PER_PART), ThreadPoolExecutor(2)
        blocks, slots = np.arange(2 * num_copied), np.arange(num_copied // BLOCKS_PER_PART)
        if not in_order:
            rng = np.random.default_rng(page_bytes)
            rng.shuffle(blocks)
            rng.shuffle(slots)
        part_bytes = BLOCKS_PER_PART * layout.block_bytes
        halves = np.array_split(blocks, 2)
        self.parts = {
            way: [
                PartBlocks(int(slot) * part_bytes + at * num_bytes, 0, ids.tolist())
                for slot, ids in zip(slots, half.reshape(-1, BLOCKS_PER_PART), strict=True)
            ]
            for at, (way, half) in enumerate(zip(WAYS, halves, strict=True))
        }

    def run(self, *ways: Direction) -> None:
        """Each way from a thread of its own, as loads and saves are."""
        list(self.threads.map(lambda way: self.engine.submit(way, self.parts[way]).wait(), ways))


def measure(num_bytes: int, num_rounds: int) -> list[dict[str, Any]]:
    memory = mmap.mmap(-1, 2 * num_bytes)
    memory.madvise(23)  # MADV_POPULATE_WRITE
    copier = Copier(torch.device("cuda", 0), memoryview(memory))
    assert copier.cuda is not None
    assert copier.cuda.pin(60)
    pinned = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    plain = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    rows = []
    for page_bytes in (kib << 10 for kib in PAGE_KIB):
        for in_order in (False, True):
            scene = Scene(page_bytes, num_bytes, copier, in_order=in_order)
            works: dict[str, Callable[[], Any]] = {
                "plain to the GPU": lambda: plain.copy_(pinned, non_blocking=True),
                "plain from the GPU": lambda: pinned.copy_(plain, non_blocking=True),
                "to the GPU": lambda scene=scene: scene.run(Direction.TO_POOL),
                "from the GPU": lambda scene=scene: scene.run(Direction.FROM_POOL),
                "both": lambda scene=scene: scene.run(*WAYS),
            }
            times: dict[str, list[float]] = {name: [] for name in works}
            for turn in range(num_rounds + 1):
                for name, work in works.items():
                    taken = seconds(work)
                    if turn:  # the first round warms up
                        times[name].append(taken)
            moved = {name: num_bytes / 1e9 * (1 + (name == "both")) for name in works}
            rate = {name: moved[name] / median(taken) for name, taken in times.items()}
            shares = {way: rate[way] / rate[f"plain {way}"] for way in WAYS.values()}
            shares["both"] = rate["both"] / min(rate[way] for way in WAYS.values())
            rows.append({"page_bytes": page_bytes, "in_order": in_order, "gb_per_second": rate, "shares": shares})
    copier.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.0, help="copied at once in each direction (default: 2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return
    rows = measure(int(arguments.gb * 2**30), arguments.rounds)
    print(f"{torch.cuda.get_device_name()}; GB/s, and of a plain pinned copy (both: of the slower way alone)")
    for row in rows:
        cells = [f"{row['gb_per_second'][name]:5.1f} {share:4.0%}" for name, share in row["shares"].items()]
        order = "sequential" if row["in_order"] else "random"
        print(f"{row['page_bytes'] >> 10:5d} KiB {order:10s}  to {cells[0]}   from {cells[1]}   both {cells[2]}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
