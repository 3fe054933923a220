"""What every rank makes for itself: its part of the model and of the pool, and the connector's worker half.

Knows no scheduler and no process: the leader (`llm`) and the followers (`follower`) use it alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kvferry.connector.api import KvCacheConnectorWorker
from kvferry.connector.config import LlmArgs
from kvferry.connector.presets import check_forms, resolve
from kvferry.engine.kv_pool import KvPool, KvShape
from kvferry.engine.model import LoadedModel
from kvferry.engine.partition import RankGroup
from kvferry.errors import RequestError


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What a rank loads and where. runtime_dir: private folder of this engine's processes; None where there is one.
    max_threads: of torch on a CPU, 0 for torch's choice."""

    model: str
    dtype: str
    device: str
    rank: int = 0
    num_ranks: int = 1
    runtime_dir: str | None = None
    max_threads: int = 0

    def make_group(self) -> RankGroup:
        """This rank among the others, which it must have."""
        assert self.runtime_dir is not None, "ranks in processes of their own have a folder"
        return RankGroup(self.rank, self.num_ranks, Path(self.runtime_dir), torch.device(self.device))


def device_of_rank(first: torch.device, rank: int, num_ranks: int) -> str:
    """Rank r's device: the r-th GPU from the first on, or the CPU. RequestError: there are not so many."""
    if first.type == "cpu":
        return "cpu"
    start, available = first.index or 0, torch.cuda.device_count()
    if start + num_ranks > available:
        raise RequestError(
            f"tensor_parallel_size={num_ranks} from {first} on needs more GPUs than the {available} here"
        )
    return f"cuda:{start + rank}"


def plan_first_rank(model: str, dtype: str, device: torch.device, num_ranks: int) -> RankPlan:
    """What rank 0 loads. RequestError: no such number of ranks, or no GPU for one of them."""
    if type(num_ranks) is not int or num_ranks < 1:
        raise RequestError(f"tensor_parallel_size must be an integer of at least 1, not {num_ranks!r}")
    where = str(device) if num_ranks == 1 else device_of_rank(device, 0, num_ranks)
    return RankPlan(model, dtype, where, num_ranks=num_ranks)


def part_of_kv(loaded: LoadedModel, num_ranks: int) -> KvShape:
    """One rank's KV: all layers, its share of the heads; and their states."""
    dtype = next(loaded.model.parameters()).dtype
    num_kv_layers = loaded.num_layers - len(loaded.state_layers)
    return KvShape(num_kv_layers, loaded.num_kv_heads // num_ranks, loaded.head_dim, dtype, loaded.states)


def make_worker(args: LlmArgs, pool: KvPool) -> KvCacheConnectorWorker:
    """The connector's half on this rank, which knows the pool."""
    classes = resolve(args.kv_connector_config)
    check_forms(classes, len(pool.groups))
    worker: KvCacheConnectorWorker = classes.worker(args)
    try:
        worker.register_kv_cache_layout(pool.layout)
    except BaseException:
        worker.shutdown()
        raise
    return worker
