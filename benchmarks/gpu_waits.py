"""What copies of blocks and others on a GPU wait for each other.

A copy engine that has more to do does not begin with what another stream was given, such as the inputs of a pass that
waits for the blocks: how long do 128 KiB wait? And kernels that place pages wait for those of a pass: how fast are
copies while the device multiplies matrices? Blocks have the shape of Llama 3 8B (32 layers, pages of 64 KiB for 16
tokens) and lie anywhere in the pool. Printed are medians of the copy's own times, and the longest of the other's. Needs
a CUDA device.
"""

from __future__ import annotations

import argparse
import mmap
import threading
import time
from statistics import median

import numpy as np
import torch

from kvferry.transfer.copy import Copier, CopyEngine
from kvferry.transfer.layout import Layout, read_regions
from kvferry.transfer.plan import Direction, PartBlocks

NUM_LAYERS, PAGE_BYTES, BLOCKS_PER_PART, TOKENS_PER_BLOCK = 32, 64 << 10, 16, 16
OTHER_BYTES = 128 << 10


class Other:
    """Somebody's copies."""

    def __init__(self) -> None:
        self._host = torch.empty(OTHER_BYTES, dtype=torch.uint8, pin_memory=True)
        self._device = torch.empty(OTHER_BYTES, dtype=torch.uint8, device="cuda")
        self._stream = torch.cuda.Stream()

    def seconds(self) -> float:
        start = time.perf_counter()
        with torch.cuda.stream(self._stream):
            self._device.copy_(self._host, non_blocking=True)
        self._stream.synchronize()
        return time.perf_counter() - start


class Pass:
    """What a pass over 8,192 tokens keeps the device with: the larger products of two layers of that model, over and
    over."""

    def __init__(self) -> None:
        self._hidden = torch.randn(8192, 4096, dtype=torch.bfloat16, device="cuda")
        self._up = torch.randn(4096, 28672, dtype=torch.bfloat16, device="cuda")
        self._down = torch.randn(28672, 4096, dtype=torch.bfloat16, device="cuda")
        self._end = torch.cuda.Event()

    def begin(self) -> None:
        """For some 0.8 s of an H200."""
        for _ in range(160):
            torch.mm(torch.mm(self._hidden, self._up), self._down)
        self._end.record()

    @property
    def goes_on(self) -> bool:
        return not self._end.query()


def seconds_beside(computing: Pass, engine: CopyEngine, way: Direction, parts: list[PartBlocks]) -> float:
    computing.begin()
    time.sleep(0.01)
    start = time.perf_counter()
    engine.submit(way, parts).wait()
    seconds = time.perf_counter() - start
    assert computing.goes_on, "the device computed no longer than the copy took"
    torch.cuda.synchronize()
    return seconds


def measure(
    engine: CopyEngine, way: Direction, parts: list[PartBlocks], other: Other, computing: Pass, num_rounds: int
) -> str:
    submitting, copying, waiting = [], [], []
    for turn in range(num_rounds + 1):
        start = time.perf_counter()
        copy = engine.submit(way, parts)
        submitted = time.perf_counter() - start
        copy.wait()
        if turn:  # the first round warms up
            submitting.append(submitted)
            copying.append(time.perf_counter() - start)
    for _ in range(num_rounds):
        thread = threading.Thread(target=lambda: engine.submit(way, parts).wait())
        thread.start()
        while thread.is_alive():
            time.sleep(0.003)  # as the launch of a pass takes a while
            waiting.append(other.seconds())
        thread.join()
    num_bytes = sum(len(part.block_ids) for part in parts) * NUM_LAYERS * PAGE_BYTES
    rate = num_bytes / median(copying) / 1e9
    beside = num_bytes / median(seconds_beside(computing, engine, way, parts) for _ in range(num_rounds)) / 1e9
    return (
        f"submitted in {1e3 * median(submitting):5.1f} ms, "
        f"copied in {1e3 * median(copying):5.1f} ms ({rate:.1f} GB/s; {beside:.1f} beside a pass), "
        f"others wait {1e3 * max(waiting):5.2f} ms at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[8192, 32768], help="of the copied blocks: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device")
        return
    most = max(arguments.tokens) // TOKENS_PER_BLOCK
    memory = mmap.mmap(-1, most * NUM_LAYERS * PAGE_BYTES)
    memory.madvise(23)  # MADV_POPULATE_WRITE
    copier = Copier(torch.device("cuda", 0), memoryview(memory))
    assert copier.cuda is not None
    assert copier.cuda.pin(120)
    pool = torch.empty(NUM_LAYERS, most + most // 4, PAGE_BYTES, dtype=torch.uint8, device="cuda")
    layout = read_regions([(pages, (layer,)) for layer, pages in enumerate(pool)], TOKENS_PER_BLOCK, "benchmark")
    assert isinstance(layout, Layout)
    engine, other, computing = CopyEngine(layout, copier, BLOCKS_PER_PART), Other(), Pass()
    print(torch.cuda.get_device_name())
    for num_tokens in arguments.tokens:
        num_parts = num_tokens // (TOKENS_PER_BLOCK * BLOCKS_PER_PART)
        ids = np.random.default_rng(0).permutation(layout.num_blocks)[: num_parts * BLOCKS_PER_PART]
        part_bytes = BLOCKS_PER_PART * layout.block_bytes
        parts = [
            PartBlocks(at * part_bytes, 0, of_part.tolist())
            for at, of_part in enumerate(ids.reshape(-1, BLOCKS_PER_PART))
        ]
        for way, name in ((Direction.TO_POOL, "to the GPU  "), (Direction.FROM_POOL, "from the GPU")):
            measured = measure(engine, way, parts, other, computing, arguments.rounds)
            print(f"{num_tokens:6,} tokens {name} {measured}", flush=True)
    copier.close()


if __name__ == "__main__":
    main()
