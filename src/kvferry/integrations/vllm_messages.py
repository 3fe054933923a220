"""What the halves of vLLM's connector tell each other through vLLM, and what they count. Imports vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvferry.offload.metadata import LoadEnd, PassMetadata


@dataclass
class FerryMetadata(KVConnectorMetadata):
    """Scheduler to workers, each step.

    jobs: the planner's, whose request ids are numbers. saves_late: their saves are of what is computed before this
    step's pass, else of what it computes. names: vLLM's ids of requests that workers will report.
    lost: loads that were promised and cannot be made any more, with the blocks that they should have filled.
    is_empty: nothing is computed in this step. is_idle: besides, its one load is the only one under way.
    writes: blocks that are being loaded ahead may be written to before layers wait for them: vLLM zeroes or copies
    blocks before the step's pass, or has taken them back from a request that ended, or whose load failed elsewhere.
    finished: requests whose blocks wait for the end of their saves. preempted: requests whose blocks are gone: this
    step may write to them.
    """

    jobs: PassMetadata = field(default_factory=PassMetadata)
    saves_late: bool = False
    names: dict[int, str] = field(default_factory=dict)
    lost: dict[int, list[int]] = field(default_factory=dict)
    is_empty: bool = False
    is_idle: bool = False
    writes: bool = False
    finished: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)


@dataclass
class FerryWorkerMetadata(KVConnectorWorkerMetadata):
    """Workers to scheduler, when there is something to tell. failed: requests a load of which failed on some worker.
    load_ends: of all workers."""

    failed: set[str] = field(default_factory=set)
    load_ends: list[LoadEnd] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> FerryWorkerMetadata:
        assert isinstance(other, FerryWorkerMetadata)
        return FerryWorkerMetadata(self.failed | other.failed, self.load_ends + other.load_ends)
