"""What the planner tells the movers for a forward pass, and hears of loads. Values that msgspec encodes, no tensors."""

from __future__ import annotations

import msgspec

from kvferry.blocks import Slot


class PartCopy(msgspec.Struct, frozen=True):
    """Blocks `first_block` and on of one part: `slots[rank]` is where the part lies, or the only one for all
    ranks; `block_ids` where they are."""

    group: int
    slots: tuple[Slot, ...]
    first_block: int
    block_ids: list[int]


class CopyJob(msgspec.Struct, frozen=True):
    """The copies of one of the store's jobs. Each rank copies its parts and tells the store that it is done.

    ready: false where lower tiers still fill the slots; their headers say when they have.
    """

    job_id: int
    parts: list[PartCopy]
    ready: bool = True


class RequestJob(msgspec.Struct, frozen=True):
    """A job and the request that it is for."""

    request_id: int
    job: CopyJob


class PassMetadata(msgspec.Struct, frozen=True):
    """The jobs of one pass.

    loads: to be done before the pass computes. async_loads: their requests are not in the batch until they are done.
    lost_loads: requests whose load was promised but cannot be made any more: failed loads. cancelled_loads: requests
    whose asynchronous load nobody waits for any longer.
    """

    loads: list[RequestJob] = msgspec.field(default_factory=list)
    async_loads: list[RequestJob] = msgspec.field(default_factory=list)
    stores: list[RequestJob] = msgspec.field(default_factory=list)
    lost_loads: list[int] = msgspec.field(default_factory=list)
    cancelled_loads: list[int] = msgspec.field(default_factory=list)


class LoadEnd(msgspec.Struct, frozen=True):
    """How a load beside the passes ended on one rank, and how long it took from when the mover was told of it."""

    job_id: int
    seconds: float
    ok: bool
