"""KV as an engine without the connector computes it, block by block, named by all tokens up to the block's end.

A block is taken as one rank's: ranks share the heads, which lie one after another in a block, so a rank's part of a
block is a slice of every layer's keys and of its values. Knows no connector.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kvferry.blocks import GroupKind
from kvferry.connector.layout import KvCacheLayout

_RELATIVE_TOLERANCE = 1e-3
"""Passes cut in another way sum in another order; float32 then differs in the sixth digit or so."""

_FILE = "truth.safetensors"


def kv_pools(layout: KvCacheLayout) -> dict[int, torch.Tensor]:
    """The pools of the layer groups that hold KV, `[blocks, layers, kv_factor, elements]`: no others are watched."""
    groups = [group for group in layout.groups if group.kind is not GroupKind.STATE]
    pools = {group.layer_group_id: group.regions[0].memory for group in groups}
    return {group: pool for group, pool in pools.items() if pool.dtype is torch.float32}


def is_close(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Where KV is the same but for the order of sums; NaN never is."""
    slack = _RELATIVE_TOLERANCE * float(wanted.abs().max())
    return torch.isclose(found, wanted, rtol=_RELATIVE_TOLERANCE, atol=slack)


class Truth:
    """Blocks `[layers of the group, kv_factor, elements]` in float32 by name, one a layer group."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[bytes, int], torch.Tensor] = {}
        self._contents: dict[bytes, bytes] = {}

    def add(self, name: bytes, content: bytes, blocks: Sequence[torch.Tensor | None]) -> None:
        """A block was computed; `content` names its own tokens alone. None: a group does not have it any more."""
        self._contents[name] = content
        for group, block in enumerate(blocks):
            if block is not None:
                self._blocks.setdefault((name, group), block.to("cpu", torch.float32, copy=True))

    def get(self, name: bytes, group: int, rank: int, num_ranks: int) -> torch.Tensor | None:
        """A rank's part of a block, or None if it was never computed."""
        block = self._blocks.get((name, group))
        return None if block is None else block.chunk(num_ranks, dim=-1)[rank]

    def name_of(self, found: torch.Tensor, group: int, layers: int | slice, part: tuple[int, int]) -> bytes | None:
        """The block that holds these bytes, in `layers` of it; `part` is (rank, number of ranks)."""
        rank, num_ranks = part
        first, slack = float(found.flatten()[0]), _RELATIVE_TOLERANCE * float(found.abs().max())
        for (name, of_group), block in list(self._blocks.items()):  # the reference's thread may add to it
            if of_group != group:
                continue
            held = block.chunk(num_ranks, dim=-1)[rank][layers]
            if abs(float(held.flatten()[0]) - first) <= 2 * slack and bool(is_close(found, held).all()):
                return name
        return None

    def has_equal_tokens(self, name: bytes, other: bytes) -> bool:
        """Whether two blocks hold the same tokens, after whatever prefixes."""
        return self._contents.get(name) == self._contents.get(other)

    def save(self, folder: Path) -> None:
        """Write all of it to a folder, for other ranks."""
        tensors = {
            f"{name.hex()}.{self._contents[name].hex()}.{group}": block.contiguous()
            for (name, group), block in self._blocks.items()
        }
        save_file(tensors, folder / _FILE)

    @classmethod
    def load(cls, folder: Path) -> Truth:
        """What `save` wrote."""
        truth = cls()
        for label, block in load_file(folder / _FILE).items():
            name, content, group = label.split(".")
            truth._blocks[bytes.fromhex(name), int(group)] = block
            truth._contents[bytes.fromhex(name)] = bytes.fromhex(content)
        return truth
