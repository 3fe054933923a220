"""Copies blocks between an engine's pool and an arena's memory, region by region.

On a CUDA device the first regions can be used while later ones are under way. How bytes move is `host`'s and `cuda`'s
business. Knows no store and no request; the arena is any writable buffer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from kvferry.transfer.cuda import CudaCopier
from kvferry.transfer.host import HostCopier
from kvferry.transfer.layout import Layout
from kvferry.transfer.plan import BlockRows, Direction, Pages, PartBlocks, Strides, block_rows

_STEP_BYTES = 256 << 20
"""About so much is submitted at once: some milliseconds of the wire, during which the next is planned, and after which
other streams' copies have their turn."""
_FIRST_SHARE: Final = 8
"""The first step is so much smaller, for the wire to have something to do soon."""
_RUN_BYTES = 128 << 10
"""But steps are of so many regions that no shorter runs of whole parts are made, which keep no wire full."""


def mark(stream: Any) -> Any:
    """The work that `stream` was given so far, for copies that come after it. None for None and on a CPU, where what
    was called has happened."""
    if not isinstance(stream, torch.cuda.Stream):
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # Who waits sleeps: the engine needs cores.
    event.record(stream)
    return event


@dataclass(frozen=True, slots=True)
class Copy:
    """A submitted copy. shares: in copying threads. steps: (layers, event) in the order of the device's work."""

    shares: tuple[Future[None], ...] = ()
    steps: tuple[tuple[frozenset[int], Any], ...] = ()

    def wait(self) -> None:
        """Return when every byte is copied. Raises what the copying raised."""
        for share in self.shares:
            share.result()
        for _, event in self.steps[-1:]:
            event.synchronize()

    def precede(self, stream: Any) -> bool:
        """What `stream` is given from now on comes after every byte. False: they have all been copied already."""
        for _, event in self.steps[-1:]:
            if not event.query():
                stream.wait_event(event)
                return True
        return False

    def wait_for_layer(self, layer: int, stream: Any) -> None:
        """What `stream` is given from now on comes after this layer's bytes. Raises what the copying raised."""
        for share in self.shares:
            share.result()
        for layers, event in self.steps:
            if layer in layers:
                stream.wait_event(event)


class Copier:
    """What copies between one device's pools and one arena, shared by the pools' engines. Thread-safe, except `close`.

    CudaError: the device's runtime cannot be used.
    """

    def __init__(self, device: torch.device, arena: memoryview) -> None:
        assert not arena.readonly
        # By numpy, which keeps the buffer from being unmapped while the tensor lives; `torch.frombuffer` does not.
        self.arena = torch.from_numpy(np.frombuffer(memoryview(arena), dtype=np.uint8))
        self.cuda = CudaCopier(device, self.arena) if device.type == "cuda" else None
        self.host = HostCopier()

    def close(self) -> None:
        """Wait for what was submitted, end the threads and let go of the arena. Calling it again does nothing."""
        self.host.close()
        if self.cuda is not None:
            self.cuda.close()
        self.arena = torch.empty(0, dtype=torch.uint8)


class CopyEngine:
    """Copies between one pool and the copier's arena, whose parts hold `blocks_per_part` blocks. Thread-safe."""

    def __init__(self, layout: Layout, copier: Copier, blocks_per_part: int) -> None:
        self._layout = layout
        self._copier = copier
        regions = layout.regions
        self._strides = Strides(
            arena_base=copier.arena.data_ptr(),
            blocks_per_part=blocks_per_part,
            bases=np.array([region.base for region in regions]),
            stride_bytes=np.array([region.stride_bytes for region in regions]),
            page_bytes=np.array([region.page_bytes for region in regions]),
        )
        self._block_bytes = layout.block_bytes

    def submit(self, direction: Direction, parts: Sequence[PartBlocks], after: Any = None) -> Copy:
        """Begin to copy, after the work that `after` marks (see `mark`). Blocks and slots are the copy's until it has
        been waited for, unless this raises. IndexError: see `_check`. CudaError: the device cannot do it."""
        rows = block_rows(parts)
        self._check(rows)
        if self._copier.cuda is not None:
            return self._submit_cuda(self._copier.cuda, direction, rows, after)
        return Copy(shares=tuple(self._copier.host.copy(Pages(rows, self._strides, direction, slice(None)).plan())))

    def _submit_cuda(self, copier: CudaCopier, direction: Direction, rows: BlockRows, after: Any) -> Copy:
        stream = copier.streams[direction]
        if after is not None:
            stream.wait_event(after)
        steps = []
        regions = self._layout.regions
        region_bytes = max(1, rows.ids.size) * self._block_bytes / len(regions)
        fewest = -(-_RUN_BYTES * len(regions) // (self._block_bytes * self._strides.blocks_per_part))
        first = max(fewest, int(_STEP_BYTES // _FIRST_SHARE / region_bytes))
        edges = range(first, len(regions) - fewest + 1, max(fewest, int(_STEP_BYTES / region_bytes)))
        try:
            for which in itertools.starmap(slice, itertools.pairwise([0, *edges, len(regions)])):
                last = copier.copy(Pages(rows, self._strides, direction, which))
                layers = frozenset(layer for region in regions[which] for layer in region.layers)
                steps.append((layers, mark(last)))
        except Exception:
            copier.synchronize()  # Whoever hears of it takes blocks and slots back, which the first steps still use.
            raise
        return Copy(steps=tuple(steps))

    def _check(self, rows: BlockRows) -> None:
        """Addresses are about to be followed blindly. IndexError: one would lie outside the arena, its part or the
        pool."""
        if rows.ids.size == 0:
            return
        part_bytes = self._block_bytes * self._strides.blocks_per_part
        bounds = {
            "bytes": (rows.offsets, self._copier.arena.numel() - part_bytes, "an arena"),
            "places": (rows.places, self._strides.blocks_per_part - 1, "a part"),
            "blocks": (rows.ids, self._layout.num_blocks - 1, "a pool"),
        }
        for what, (values, most, where) in bounds.items():
            first, last = int(values.min()), int(values.max())
            if not 0 <= first <= last <= most:
                raise IndexError(f"{what} {first} to {last} are not in {where} that ends at {most}")


@torch.inference_mode()
def self_test(layout: Layout) -> bool:
    """Whether what is written through the engine's own tensors lies where the layout says, in both directions.

    Uses the first and the last block and puts their contents back. A wrong layout is found by reading alone, before
    anything is written by its addresses. To be called while no forward pass runs.
    """
    ids = [0, layout.num_blocks - 1][: layout.num_blocks]
    kept = [region.pages[ids].clone() for region in layout.regions]
    patterns = [_pattern(region.pages, len(ids), salt) for salt, region in enumerate(layout.regions)]
    expected = b"".join(pattern.numpy().tobytes() for pattern in patterns)
    scratch = bytearray(len(expected))
    copier = Copier(layout.device, memoryview(scratch))
    engine = CopyEngine(layout, copier, len(ids))
    if copier.cuda is not None:
        copier.cuda.wait_until_warm()  # so that what is tested is what copies later
    try:
        _write(layout, ids, patterns)
        engine.submit(Direction.FROM_POOL, [PartBlocks(0, 0, ids)], _now(layout)).wait()
        if bytes(scratch) != expected:
            return False
        _write(layout, ids, [torch.zeros_like(pattern) for pattern in patterns])
        engine.submit(Direction.TO_POOL, [PartBlocks(0, 0, ids)], _now(layout)).wait()
        return all(
            torch.equal(_in_order_of_memory(region.pages[block]).cpu().reshape(-1).view(torch.uint8), pattern[index])
            for region, pattern in zip(layout.regions, patterns, strict=True)
            for index, block in enumerate(ids)
        )
    finally:
        for region, old in zip(layout.regions, kept, strict=True):
            region.pages[ids] = old
        copier.close()


def _now(layout: Layout) -> Any:
    return mark(torch.cuda.current_stream(layout.device)) if layout.device.type == "cuda" else None


def _pattern(pages: torch.Tensor, num_blocks: int, salt: int) -> torch.Tensor:
    """`[num_blocks, page_bytes]`, other bytes for each region."""
    page_bytes = pages[0].numel() * pages.element_size()
    numbers = np.arange(num_blocks * page_bytes, dtype=np.uint32) + np.uint32(salt * 40_503)
    mixed = numbers * np.uint32(2_654_435_761) >> np.uint32(24)
    return torch.from_numpy(mixed.astype(np.uint8)).view(num_blocks, page_bytes)


def _write(layout: Layout, ids: Sequence[int], patterns: Sequence[torch.Tensor]) -> None:
    for region, pattern in zip(layout.regions, patterns, strict=True):
        for index, block in enumerate(ids):
            page = _in_order_of_memory(region.pages[block])
            page.copy_(pattern[index].view(page.dtype).view(page.shape))


def _in_order_of_memory(page: torch.Tensor) -> torch.Tensor:
    """The engine's own view of a page with its dimensions in the order in which they lie, hence contiguous."""
    return page.permute(sorted(range(page.ndim), key=page.stride, reverse=True))
