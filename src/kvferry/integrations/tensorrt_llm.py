"""kvferry's connector on TensorRT-LLM's own base classes: `connector_module: kvferry.integrations.tensorrt_llm`.

A thin rebase of `offload.connector`, which begins when the pools are registered: all ranks register at the same time,
so rank 0 can tell the others where its store is. TensorRT-LLM tells less than kvferry's engine does. What is missing is
found out (the weights' name from the model's files, shapes from the pools themselves), or nothing is kept.

TensorRT-LLM cannot be told to compute what failed to load. So loads are offered once their bytes lie in memory, and a
load that fails all the same raises: TensorRT-LLM then ends the requests of that pass with an error.

Options come from KVFERRY_* alone, except a server's address, which TensorRT-LLM's configuration may have. Where
TensorRT-LLM is not installed its names are kvferry's (`trtllm_namespace`).
"""

from __future__ import annotations

import atexit
import logging
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvferry.config import KvCacheConfig, KvCacheConnectorConfig, load_options
from kvferry.connector.config import LlmArgs
from kvferry.connector.layout import KvCacheLayerGroupLayout, KvCacheLayout, KvCacheRegion, describe_kv
from kvferry.errors import ConfigError, ConnectorError, KVFerryError
from kvferry.integrations.trtllm_namespace import install
from kvferry.integrations.weights import name_weights
from kvferry.offload import connector as offload
from kvferry.offload.stores import SERVER_PRESET

install()

import tensorrt_llm  # noqa: E402
from tensorrt_llm._utils import mpi_allgather, mpi_broadcast, mpi_rank  # noqa: E402

try:
    from tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )
except ModuleNotFoundError:  # its older place
    from tensorrt_llm._torch.pyexecutor.kv_cache_connector import KvCacheConnectorScheduler, KvCacheConnectorWorker

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    """A worker half of rank 0 that has begun with `args`, and what it was made from."""

    host_args: Any
    args: LlmArgs


_begun: list[_Begun] = []
"""Those whose scheduler half, which lives in the same process, has not."""


@dataclass(slots=True)
class _Request:
    """TensorRT-LLM's request as kvferry's planner reads one. num_connector_matched_tokens: what was offered, which
    `_settle` compares with what the engine took."""

    host: Any
    num_connector_matched_tokens: int = 0

    @property
    def request_id(self) -> int:
        return int(self.host.request_id)

    @property
    def cache_salt(self) -> str | None:
        salt, salt_id = (getattr(self.host, name, None) for name in ("cache_salt", "cache_salt_id"))
        return salt if salt is not None or salt_id is None else f"id:{salt_id}"

    @property
    def lora_id(self) -> str | None:
        lora_id: str | None = getattr(self.host, "lora_id", None)
        return lora_id

    def get_tokens(self, beam: int) -> Sequence[int]:
        return list(self.host.get_tokens(beam))

    @property
    def can_be_named(self) -> bool:
        """Whether its KV depends on nothing but tokens, salt and an adapter that is named by content."""
        unnamed = ("lora_task_id", "multimodal_positions", "multimodal_hashes", "prompt_embedding_table")
        values = [getattr(self.host, name, None) for name in unnamed]
        return all(value is None or (hasattr(value, "__len__") and len(value) == 0) for value in values)


class KVFerryConnectorScheduler(KvCacheConnectorScheduler):  # type: ignore[misc, unused-ignore]
    """The scheduler half, on rank 0."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._half: offload.KVFerryConnectorScheduler | None = None
        self._requests: dict[int, _Request] = {}
        atexit.register(self.shutdown)

    def wait_for_initialization(self) -> None:
        """Begin as this engine's worker half has. TensorRT-LLM makes both from one object; if somebody between us has
        made another of it, the worker half is the one that waits, unless several do."""
        if not self._begin_with_own() and len(_begun) == 1:
            self._begin(_begun[0])

    def _begin_with_own(self) -> bool:
        own = [begun for begun in _begun if begun.host_args is self._llm_args]
        for begun in own:
            self._begin(begun)
        return bool(own)

    def _begin(self, begun: _Begun) -> None:
        _begun.remove(begun)
        self._half = offload.KVFerryConnectorScheduler(begun.args)
        self._half.wait_for_initialization()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        if self._half is None:
            self._begin_with_own()  # older versions of TensorRT-LLM do not call `wait_for_initialization`
        named = _Request(request)
        if self._half is None or not named.can_be_named:
            return 0, False
        self._requests[named.request_id] = named
        num_tokens, is_async = self._half.get_num_new_matched_tokens(named, num_computed_tokens)
        named.num_connector_matched_tokens = num_tokens
        return num_tokens, is_async

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        self.update_state_after_alloc_by_layer_group(request, [block_ids])

    def update_state_after_alloc_by_layer_group(self, request: Any, block_ids_by_layer_group: list[list[int]]) -> None:
        named = self._requests.get(request.request_id)
        if self._half is not None and named is not None:
            named.host = request  # the match may have been given another object for it
            self._half.update_state_after_alloc_by_layer_group(named, block_ids_by_layer_group)

    def build_connector_meta(self, scheduler_output: Any) -> object:
        if self._half is None:
            return None
        not_taken = [data.request_id for data in scheduler_output.new_requests if self._settle(data) == 0]
        metadata = self._half.build_connector_meta(scheduler_output)
        for request_id in set(not_taken).intersection(metadata.lost_loads):
            metadata.lost_loads.remove(request_id)  # nothing is missing: the engine computes those tokens
        return metadata

    def _settle(self, data: Any) -> int | None:
        """How many tokens of its offer the engine counts as loaded for a request in its first pass; if not all, the
        load is cancelled. None: there was no offer."""
        named = self._requests.get(data.request_id)
        if self._half is None or named is None or not named.num_connector_matched_tokens:
            return None
        start = int(data.computed_position)
        num_taken: int = int(named.host.context_current_position) - start
        if num_taken != named.num_connector_matched_tokens:
            self._half.cancel_load(named, start, start + named.num_connector_matched_tokens)
        return num_taken

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        return self.request_finished_by_layer_group(request, [cache_block_ids])

    def request_finished_by_layer_group(self, request: Any, cache_block_ids_by_layer_group: list[list[int]]) -> bool:
        named = self._requests.pop(request.request_id, None)
        if self._half is None or named is None:
            return False
        return self._half.request_finished_by_layer_group(named, cache_block_ids_by_layer_group)

    def shutdown(self) -> None:
        """kvferry's engine calls this; under TensorRT-LLM the process's end does."""
        atexit.unregister(self.shutdown)
        half, self._half = self._half, None
        if half is not None:
            half.shutdown()


class KVFerryConnectorWorker(KvCacheConnectorWorker):  # type: ignore[misc, unused-ignore]
    """The worker half, one per rank."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._half: offload.KVFerryConnectorWorker | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        atexit.register(self.shutdown)

    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        """On all ranks at the same time. ConfigError: an option is wrong, on any of them."""
        group = describe_kv(0, tuple(range(kv_cache_tensor.shape[1])), None, kv_cache_tensor)
        self._register(KvCacheLayout(self._tokens_per_block, (group,)))

    def register_kv_cache_layout(self, layout: Any) -> None:
        """As `register_kv_caches`."""
        self._register(_own_layout(layout))

    @property
    def _tokens_per_block(self) -> int:
        return int(self._llm_args.kv_cache_config.tokens_per_block)

    def _register(self, layout: KvCacheLayout | str) -> None:
        """Begin, rank 0 first, since the others ask its store. `layout`: if it is not known, why."""
        args, failure = None, None
        try:
            if mpi_rank() == 0:
                args = self._make_args(layout)
                self._begin(args, layout)
        except KVFerryError as error:
            failure = str(error)
        told = mpi_broadcast(args, root=0)
        try:
            if mpi_rank() != 0 and told is not None:
                self._begin(replace(told, rank=mpi_rank()), layout)
        except KVFerryError as error:
            failure = str(error)
        failures = [said for said in mpi_allgather(failure) if said is not None]
        if failures:
            raise ConfigError(failures[0])

    def _make_args(self, layout: KvCacheLayout | str) -> LlmArgs | None:
        """What the pools and TensorRT-LLM's arguments say, in kvferry's terms, for rank 0. How a page's elements are
        divided into heads does not matter to whoever copies whole pages, so it is left out. None, after a warning:
        nothing is kept, for pages that are no whole number of tokens among other reasons."""
        host = self._llm_args
        reason = _unnameable(host)
        weights = name_weights(str(host.model), getattr(host, "revision", None)) if reason is None else None
        if weights is None:
            logger.warning(
                "KV is not kept beyond the engine's pool: %s",
                reason or f"the files of {host.model} are not to be found",
            )
            return None
        groups = () if isinstance(layout, str) else layout.groups
        pages = {region.memory.shape[-1] for group in groups for region in group.regions}
        (page,) = pages if len(pages) == 1 else (1,)
        if isinstance(layout, str) or page % self._tokens_per_block:
            logger.warning("KV is not kept beyond the engine's pool: its layout is unknown: %s", layout)
            return None
        if host.tensor_parallel_size > 1:
            self._folder = tempfile.TemporaryDirectory(prefix="kvferry-ranks-")
        url = getattr(getattr(host, "kv_connector_config", None), "server_url", None)
        kv_dtype = getattr(host.kv_cache_config, "dtype", "auto")
        windows = {layer: group.window_size for group in groups for layer in group.layer_ids}
        return LlmArgs(
            engine_id=uuid.uuid4().hex,
            model=str(host.model),
            model_identity=f"tensorrt_llm {tensorrt_llm.__version__}, {kv_dtype}: {weights}",
            kv_dtype=str(layout.dtype).removeprefix("torch."),
            num_layers=len(windows),
            num_kv_heads=page // self._tokens_per_block * host.tensor_parallel_size,
            head_dim=1,
            max_batch_size=getattr(host, "max_batch_size", None) or 1,
            max_num_tokens=getattr(host, "max_num_tokens", None) or 1,
            kv_cache_config=KvCacheConfig(tokens_per_block=self._tokens_per_block),
            kv_connector_config=_own_connector(url or load_options({}).server_url),
            tensor_parallel_size=host.tensor_parallel_size,
            runtime_dir=self._folder.name if self._folder is not None else None,
            sliding_windows=tuple(windows[layer] for layer in sorted(windows)),
        )

    def _begin(self, args: LlmArgs | None, layout: KvCacheLayout | str) -> None:
        if args is None or isinstance(layout, str):
            return
        self._half = offload.KVFerryConnectorWorker(args)
        self._half.register_kv_cache_layout(layout)
        if args.rank == 0:
            _begun.append(_Begun(self._llm_args, args))

    def bind_connector_meta(self, metadata: object) -> None:
        super().bind_connector_meta(metadata)
        if self._half is not None and metadata is not None:
            self._half.bind_connector_meta(metadata)

    def start_load_kv(self, stream: Any) -> None:
        if self._half is not None:
            self._half.start_load_kv(stream)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """ConnectorError: a load of this pass failed."""
        if self._half is not None:
            self._half.wait_for_layer_load(layer_idx, stream)
            self._refuse_failed_loads(self._half)

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        if self._half is not None:
            self._half.save_kv_layer(layer_idx, stream)

    def wait_for_save(self, stream: Any) -> None:
        """ConnectorError: as `wait_for_layer_load`, which a captured pass does not call."""
        if self._half is not None:
            self._half.wait_for_save(stream)
            self._refuse_failed_loads(self._half)

    @staticmethod
    def _refuse_failed_loads(half: offload.KVFerryConnectorWorker) -> None:
        failed = half.take_failed_loads()
        if failed:
            raise ConnectorError(f"what requests {failed} were to load is not there: this pass must not go on")

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        if self._half is None:
            return [], []
        return self._half.get_finished(finished_gen_req_ids, started_loading_req_ids)

    def shutdown(self) -> None:
        """kvferry's engine calls this; under TensorRT-LLM the process's end does."""
        atexit.unregister(self.shutdown)
        half, self._half = self._half, None
        _begun[:] = [begun for begun in _begun if begun.host_args is not self._llm_args]
        if half is not None:
            half.shutdown()
        if self._folder is not None:
            self._folder.cleanup()


def _own_connector(server_url: str | None) -> KvCacheConnectorConfig:
    """Never beside the passes: TensorRT-LLM has no word for an asynchronous load that failed."""
    preset = "kvferry" if server_url is None else SERVER_PRESET
    return KvCacheConnectorConfig(connector=preset, server_url=server_url, options={"async_load": "never"})


def _unnameable(host: Any) -> str | None:
    """Why the KV of an engine with these arguments has parts that nobody here could name, or None."""
    forms = {
        "pipeline parallelism": getattr(host, "pipeline_parallel_size", 1) > 1,
        "context parallelism": getattr(host, "context_parallel_size", 1) > 1,
        "attention data parallelism": getattr(host, "enable_attention_dp", False),
        "speculative decoding": getattr(host, "speculative_config", None) is not None,
    }
    return next((f"{form} is not supported" for form, is_used in forms.items() if is_used), None)


def _own_layout(layout: Any) -> KvCacheLayout | str:
    """TensorRT-LLM's layout in kvferry's terms, with a tensor for each region; or why it is not known."""
    import torch

    groups = []
    for group in layout.groups:
        if len(group.regions) != 1 or group.replicated_regions:
            return f"layer group {group.layer_group_id} has {len(group.regions)} regions"
        (region,) = group.regions
        layers = tuple(dict.fromkeys(int(buffer.layer_id) for buffer in region.buffers))
        roles = ("key", "value") if len(region.buffers) == 2 * len(layers) else ("key",)
        expected = [(layer, role, 1) for layer in layers for role in roles]
        found = [(int(buffer.layer_id), str(buffer.role), int(buffer.expansion)) for buffer in region.buffers]
        if found != expected:
            return f"layer group {group.layer_group_id} holds {found[:3]} and so on"
        flat = region.as_tensor(layout.dtype).as_subclass(torch.Tensor)
        memory = flat.unflatten(1, (len(layers), len(roles), -1))
        own = KvCacheRegion(region.base, region.size, region.stride, region.num_slots, tuple(region.buffers), memory)
        groups.append(KvCacheLayerGroupLayout(int(group.layer_group_id), layers, group.window_size, (own,)))
    return KvCacheLayout(int(layout.tokens_per_block), tuple(groups))
