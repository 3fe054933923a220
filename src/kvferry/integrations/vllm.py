"""kvferry as a KV connector of vLLM, 0.26 to 0.32: vLLM's hooks, each answered by the half that it concerns.

`kv_connector: KVFerryConnector`, registered by `vllm_plugin`; options in `kv_connector_extra_config` or KVFERRY_*.
Types are translated here and in the halves, and nothing is decided. A hook that raises is logged and a miss: vLLM goes
on as if kvferry were not there, as it does where the model's cache is of a kind that is not known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

import torch
import vllm
from vllm import envs
from vllm.config import CUDAGraphMode
from vllm.distributed.kv_events import KVCacheEvent
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.forward_context import get_forward_context, is_forward_context_available

from kvferry.blocks import GroupKind
from kvferry.config import StoreOptions, load_options
from kvferry.errors import ConfigError
from kvferry.integrations.vllm_identity import engine_identity
from kvferry.integrations.vllm_layout import CacheGroup, read_groups, read_layouts
from kvferry.integrations.vllm_messages import FerryMetadata, FerryWorkerMetadata
from kvferry.integrations.vllm_metrics import FerryPromMetrics, FerryStats
from kvferry.integrations.vllm_scheduler import Roles, SchedulerHalf
from kvferry.integrations.vllm_stores import Engine
from kvferry.integrations.vllm_worker import WorkerHalf
from kvferry.observability.log import OnceLog, set_level
from kvferry.transfer.layout import Layout, UnknownLayout

logger = logging.getLogger(__name__)

_REGISTRATION_SECONDS: Final = 15.0
"""Longest that the start waits for the workers. Afterwards kvferry joins in when they are there."""

_TAKES_FAILED_REQUESTS: Final = hasattr(KVConnectorBase_V1, "get_transfer_results")
"""Whether vLLM takes word of failed loads by request. Older versions take it by block, and of models of one group."""

T = TypeVar("T")


class KVFerryConnector(KVConnectorBase_V1, SupportsHMA):
    """One object in vLLM's scheduler, one in each worker. ConfigError: an option is wrong."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._log = OnceLog(logger)
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._groups: list[CacheGroup] = []
        options = load_options(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
        set_level(options.log_level)
        _check_version(vllm_config, kv_cache_config)
        groups = read_groups(kv_cache_config)
        why_not = _unsupported(vllm_config, options, groups)
        if why_not is not None:
            self._warn(why_not)
            return
        assert not isinstance(groups, UnknownLayout)
        self._groups, options = groups, _fit(options, groups, vllm_config.parallel_config.pipeline_parallel_size)
        self._chunk_tokens = options.chunk_tokens
        engine = _engine(vllm_config)
        if role is KVConnectorRole.WORKER:
            self._worker = WorkerHalf(
                engine,
                options,
                writes_early=_writes_early(vllm_config, kv_cache_config),
                one_pass_a_step=vllm_config.speculative_config is None,
            )
            return
        # A load that fails is computed. vLLM's own default is to fail the request, and it asks after this constructor.
        transfer = vllm_config.kv_transfer_config
        transfer.kv_load_failure_policy = "recompute"
        roles = Roles(
            may_load=transfer.is_kv_consumer,
            may_store=transfer.is_kv_producer,
            may_wait=len(groups) == 1 or _TAKES_FAILED_REQUESTS,
        )
        tells_events = _tells_events(vllm_config)
        # Events are of requests that may have ended by then; in its caller's process vLLM makes no step that it need
        # not; and other groups' blocks are taken back, or written to.
        is_full = all(group.kind is GroupKind.FULL for group in groups)
        saves_late = is_full and envs.VLLM_ENABLE_V1_MULTIPROCESSING and not tells_events
        self._scheduler = SchedulerHalf(
            engine,
            options,
            groups[0].tokens_per_block,
            roles,
            tells_events=tells_events,
            saves_late=saves_late and not _writes_early(vllm_config, kv_cache_config),
        )
        if not self._scheduler.wait_for_workers(_REGISTRATION_SECONDS):
            logger.warning("kvferry's workers have not registered yet: nothing is kept until they have")

    @property
    def requires_kv_delivery(self) -> bool:
        """What is not saved is computed again."""
        return False

    # -- scheduler -----------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        return self._answer(partial(self._scheduler.match, request, num_computed_tokens), (0, False))

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            block_ids = blocks.get_block_ids()
            self._answer(partial(self._scheduler.allocated, request, block_ids, num_external_tokens), None)

    def build_connector_meta(self, scheduler_output: Any) -> FerryMetadata:
        if self._scheduler is None:
            return FerryMetadata()
        return self._scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        if self._scheduler is not None:
            told = connector_output.kv_connector_worker_meta
            told = told if isinstance(told, FerryWorkerMetadata) else FerryWorkerMetadata()
            self._scheduler.loads_ended(told.load_ends)
            saved, loaded = connector_output.finished_sending, connector_output.finished_recving
            self._scheduler.take_in(saved or (), loaded or (), told.failed)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self._scheduler is not None and self._scheduler.finished(request), None

    def has_pending_block_frees(self) -> bool:
        return self._scheduler is not None and self._scheduler.holds_blocks

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self._answer(self._scheduler.take_events, []) if self._scheduler is not None else []

    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.disown()
        return True

    # -- worker --------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._worker is None:
            return
        num_blocks = self._kv_cache_config.num_blocks
        broken: list[Layout] | UnknownLayout = UnknownLayout("reading it broke off")
        layouts = self._answer(
            lambda: read_layouts(self._groups, kv_caches, num_blocks, self._block_dim, self._chunk_tokens), broken
        )
        if isinstance(layouts, UnknownLayout):
            self._warn(layouts.reason)
            return
        name_weights = partial(engine_identity, self._vllm_config, vllm.__version__)
        # Another connector that has this one inside may have another role, by which vLLM's scheduler goes.
        frees_late = not has_kv_transfer_group() or get_kv_transfer_group() is self
        self._worker.register(self._groups, layouts, name_weights, frees_late=frees_late)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        if self._worker is not None:
            self._worker.release_preempted(kv_connector_metadata, _stream())

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.bind(connector_metadata, _stream(), by_layer=_waits_by_layer())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.start_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._worker is not None:
            self._worker.wait_for_layer(layer_name, _stream)

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """All layers of a block are saved together after the pass."""

    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.start_saves(_stream())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return self._worker.take_finished() if self._worker is not None else (None, None)

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """How versions that have it learn of failed loads, by request."""
        results = super().get_transfer_results(finished_req_ids)
        if self._worker is not None:
            results.failed_recving = self._worker.failed_loads()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """How older versions learn of them, by block. RuntimeError: they cannot learn of this one, and would go on."""
        failed = self._worker.take_failed_blocks() if self._worker is not None else set()
        if failed and len(self._groups) > 1:
            raise RuntimeError("a load from memory failed, and this vLLM cannot be told of several groups' blocks")
        return failed

    def build_connector_worker_meta(self) -> FerryWorkerMetadata | None:
        if self._worker is None:
            return None
        told = FerryWorkerMetadata(self._worker.take_failed(), self._worker.take_load_ends())
        return told if told.failed or told.load_ends else None

    # -- both ----------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> FerryStats | None:
        """The scheduler's half alone counts, so that nothing is counted once a rank."""
        counts = self._scheduler.take_counts() if self._scheduler is not None else {}
        return FerryStats(counts) if counts else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> FerryStats:
        return FerryStats(data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> FerryPromMetrics:
        return FerryPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        for half in (self._worker, self._scheduler):
            if half is not None:
                half.shutdown()
        self._worker = self._scheduler = None

    def _block_dim(self, name: str, spec: Any) -> int:
        """Newer versions register `[blocks, heads, tokens, content]`; in older ones the attention backend decides."""
        backend = self._vllm_config.compilation_config.static_forward_context[name].get_attn_backend()
        if not hasattr(backend, "get_kv_cache_block_dim") or not hasattr(spec, "num_kv_heads"):
            return 0
        cache_dtype = self._vllm_config.cache_config.cache_dtype
        dim = backend.get_kv_cache_block_dim(
            spec.block_size, spec.num_kv_heads, spec.head_size, cache_dtype_str=cache_dtype
        )
        return int(dim)

    def _answer(self, hook: Callable[[], T], otherwise: T) -> T:
        try:
            return hook()
        except Exception:  # the hook's boundary
            if self._log.warn(hook, "kvferry: a hook failed, which is a miss"):
                logger.exception("the first such failure")
            return otherwise

    def _warn(self, reason: str) -> None:
        logger.warning("KV is not kept beyond vLLM's pool: %s", reason)


def _stream() -> Any:
    return torch.cuda.current_stream() if torch.cuda.is_available() else None


def _waits_by_layer() -> bool:
    """Whether the pass that follows calls the hook before each layer reads its blocks: not from within a CUDA graph."""
    if not is_forward_context_available():
        return False
    context = get_forward_context()
    return isinstance(context.attn_metadata, dict) and context.cudagraph_runtime_mode != CUDAGraphMode.FULL


def _fit(options: StoreOptions, groups: list[CacheGroup], num_stages: int) -> StoreOptions:
    """Chunks of whole blocks: vLLM chooses the size of blocks, of hybrid models by the size of their states. In a
    pipeline more passes overlap than could be told apart, so how long each takes is not known."""
    block = groups[0].tokens_per_block
    load_when = options.load_when if num_stages == 1 else "always"
    return replace(options, chunk_tokens=-(-options.chunk_tokens // block) * block, load_when=load_when)


def _engine(vllm_config: Any) -> Engine:
    parallel = vllm_config.parallel_config
    return Engine(
        engine_id=vllm_config.kv_transfer_config.engine_id,
        model=vllm_config.model_config.model,
        rank=parallel.rank,
        num_ranks=parallel.world_size,
        num_stages=parallel.pipeline_parallel_size,
        is_one_process=parallel.world_size == 1 and parallel.distributed_executor_backend in {"uni", None},
    )


def _tells_events(vllm_config: Any) -> bool:
    events = getattr(vllm_config, "kv_events_config", None)
    return events is not None and events.enable_kv_cache_events


def _writes_early(vllm_config: Any, kv_cache_config: Any) -> bool:
    """Whether blocks are zeroed or copied to before any hook of the step: by vLLM's second model runner, where they are
    at all."""
    is_second_runner = getattr(vllm_config, "use_v2_model_runner", False)
    return is_second_runner and getattr(kv_cache_config, "needs_kv_cache_zeroing", False)


def _check_version(vllm_config: Any, kv_cache_config: Any) -> None:
    """ConfigError: with a connector, whatever it answers, this vLLM goes on from attention's hit and a wrong state."""
    caches = vllm_config.cache_config.enable_prefix_caching and kv_cache_config.has_mamba_layers
    if caches and not hasattr(KVConnectorBase_V1, "supports_divergent_local_hybrid_hits"):
        raise ConfigError(
            f"vLLM {vllm.__version__} computes wrong tokens for hybrid models when it has a connector and caches "
            "prefixes: use a later one, or --no-enable-prefix-caching"
        )


def _unsupported(vllm_config: Any, options: StoreOptions, groups: list[CacheGroup] | UnknownLayout) -> str | None:
    """Why nothing can be kept with this configuration, if so."""
    if isinstance(groups, UnknownLayout):
        return groups.reason
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(vllm_config.parallel_config, name, 1) > 1:
            return f"{name} is more than 1"
    if len(groups) > 1 and options.server_url is not None and not _TAKES_FAILED_REQUESTS:
        return f"vLLM {vllm.__version__} does not survive a load that fails where layers form several groups"
    return None
