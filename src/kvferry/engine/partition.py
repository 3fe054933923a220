"""Gives one rank its part of a model, and sums what the ranks compute. Knows no pool, no request and no process.

transformers publishes for each architecture which linear layers a tensor-parallel rank cuts by rows of their output
("colwise") and which by their input ("rowwise"); the outputs of the latter are partial sums. Everything else is whole
on every rank.
"""

from __future__ import annotations

import fnmatch
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from kvferry.errors import RequestError

distributed: Any = torch.distributed  # its type stubs lack what is used here

_JOIN_TIMEOUT = timedelta(seconds=10)
"""Longest that a rank waits for the others to come, once all of them have loaded the model."""
_SUM_TIMEOUT = timedelta(hours=1)
"""Backstop: a rank that died or stopped is noticed long before, by those who watch the processes."""
_COLUMNS, _ROWS = "colwise", "rowwise"
_WHOLE = {"replicated_with_grad_allreduce"}


class RankGroup:
    """The ranks of one engine, for sums of tensors: over gloo on CPUs, over NCCL on GPUs.

    folder: where the ranks find each other, the same path for all. It is a group of its own: the process's default
    group, if it has one, is left alone.
    """

    def __init__(self, rank: int, size: int, folder: Path, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self._store_path = folder / "ranks"
        self._device = device
        self._group: Any = None

    def join(self) -> None:
        """Wait for the other ranks. ConnectionError: they did not come."""
        try:
            store = distributed.FileStore(str(self._store_path), self.size)
            store.set_timeout(_JOIN_TIMEOUT)
            if self._device.type == "cuda":
                self._group = distributed.ProcessGroupNCCL(store, self.rank, self.size, timeout=_SUM_TIMEOUT)
            else:
                # gloo connects all ranks while it is made, under this deadline.
                self._group = distributed.ProcessGroupGloo(store, self.rank, self.size, timeout=_JOIN_TIMEOUT)
                self._group.set_timeout(_SUM_TIMEOUT)
        except RuntimeError as error:
            raise ConnectionError(f"the ranks did not find each other: {error}") from error

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by the sum of all ranks'. ConnectionError: a rank has ended; on a GPU that may
        show later, as whatever waits for the stream."""
        try:
            self._group.allreduce([tensor]).wait()
        except RuntimeError as error:
            raise ConnectionError(f"a rank was lost in a sum: {error}") from error

    def abort(self) -> None:
        """Give up on sums under way, from any thread: on a GPU they would wait for a lost rank forever."""
        if self._group is not None and self._device.type == "cuda":
            self._group.abort()

    def leave(self) -> None:
        """Close the connections to the other ranks."""
        self._group = None


def partition(model: Any, group: RankGroup) -> None:
    """Keep this rank's part of a transformers model that has all its weights.

    RequestError: transformers has no plan for its architecture that fits here, or a size does not divide by the number
    of ranks.
    """
    config, name, size = model.config.get_text_config(), type(model).__name__, group.size
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or kv_heads % size:
        raise RequestError(
            f"{name} has {heads} attention heads and {kv_heads} KV heads, which do not both divide by "
            f"tensor_parallel_size={size}"
        )
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise RequestError(
            f"transformers has no partition plan for {name}: it cannot run with tensor_parallel_size={size}"
        )
    for path, module in model.base_model.named_modules():
        style = next((plan[pattern] for pattern in plan if fnmatch.fnmatchcase(path, pattern)), None)
        if style is None or style in _WHOLE:
            continue
        if style not in {_COLUMNS, _ROWS} or not isinstance(module, torch.nn.Linear):
            raise RequestError(
                f"{name} cannot run with tensor_parallel_size={size}: its {path} is a {type(module).__name__} that "
                f"transformers partitions as {style!r}, and the embedded engine lacks that"
            )
        _cut(module, path, style, group)


def _cut(module: torch.nn.Linear, path: str, style: str, group: RankGroup) -> None:
    dim = 0 if style == _COLUMNS else 1
    width = module.weight.shape[dim]
    if width % group.size:
        raise RequestError(f"{path} is {width} wide, which does not divide by tensor_parallel_size={group.size}")
    module.weight = _part(module.weight, dim, group)
    if style == _COLUMNS:
        module.out_features = width // group.size
        if module.bias is not None:
            module.bias = _part(module.bias, 0, group)
        return
    module.in_features = width // group.size
    if group.rank > 0:  # the sum has it once
        module.register_parameter("bias", None)

    def add_up(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.contiguous()
        group.sum_(output)
        return output

    module.register_forward_hook(add_up)


def _part(parameter: torch.Tensor, dim: int, group: RankGroup) -> torch.nn.Parameter:
    part = parameter.detach().chunk(group.size, dim)[group.rank]
    return torch.nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=False)
