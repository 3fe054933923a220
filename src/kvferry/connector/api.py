"""The two halves of a KV cache connector, and what the engine hands them: TensorRT-LLM's names and shapes.

A connector is a pair of classes. The scheduler half lives beside the engine's scheduler on rank 0 and decides; the
worker half lives in every rank and moves bytes. They talk through one metadata object per forward pass, which rank 0
builds and every rank is given. Which hook is called when, and what holds at that moment, is said at each hook.

An exception in a hook is counted, logged and a miss for the requests it was about: it never ends the engine.

Source of the names and call order: TensorRT-LLM's `kv_cache_connector` module, so that connectors written for it run
here. `KvCacheConnectorWorker.take_failed_loads` and `shutdown` are kvferry's additions; both have defaults.
Knows no store and imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from kvferry.connector.config import LlmArgs
    from kvferry.connector.layout import KvCacheLayout

NO_BLOCK = -1
"""Stands for a block that a layer group does not have at this position. Never an index."""


class Request(Protocol):
    """What a connector may read of a request."""

    @property
    def request_id(self) -> int: ...

    @property
    def cache_salt(self) -> str | None:
        """Requests of different salts must never share KV."""

    @property
    def lora_id(self) -> str | None:
        """Content id of the LoRA adapter, or None."""

    @property
    def num_connector_matched_tokens(self) -> int:
        """Tokens that the engine took from this connector's match; 0 before the match is taken."""

    def get_tokens(self, beam: int) -> Sequence[int]:
        """Prompt and generated token ids so far. Beams are not supported: `beam` is 0."""


@dataclass(slots=True)
class RequestData:
    """One request's share of a forward pass.

    new_tokens: the whole prompt the first time; later only what was added (one token a decode step, none for a further
        prefill chunk).
    new_block_ids: all the request's blocks the first time; later only those added. Empty where there are several layer
        groups, whose ids cannot share a list.
    computed_position: tokens whose KV the engine has before this pass, without those that the connector matched the
        first time the request appears.
    num_scheduled_tokens: tokens that this pass computes.
    block_hashes: the engine's content hashes of the request's full blocks so far, from its first block on.
    priorities: retention priorities of `new_block_ids`, or None.
    new_block_ids_by_layer_group: as `new_block_ids`, one list a layer group; NO_BLOCK where a group has none.
    """

    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int
    block_hashes: list[int] = field(default_factory=list)
    priorities: list[int] | None = None
    cache_salt: str | None = None
    new_block_ids_by_layer_group: list[list[int]] = field(default_factory=list)


@dataclass(slots=True)
class SchedulerOutput:
    """What one forward pass computes. A request is in `new_requests` in its first pass and in `cached_requests` in all
    later ones.

    prefix_loads, attention_dp_rank: TensorRT-LLM's, for prefixes reserved before admission and for attention data
    parallelism; the embedded engine has neither.
    """

    new_requests: list[RequestData] = field(default_factory=list)
    cached_requests: list[RequestData] = field(default_factory=list)
    prefix_loads: list[Any] = field(default_factory=list)
    attention_dp_rank: int | None = None


def _stand_in(flat: str, grouped: str) -> Any:
    """What a class that has the form by layer group alone has for the flat form."""

    def refuse(self: object, *_: object) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has {grouped}, not {flat}")

    return refuse


def _complete(cls: type, base: type, forms: dict[str, str]) -> None:
    """Let a class that overrides the form by layer group leave the flat form out, which is abstract.

    To be called from `__init_subclass__`: abstract methods are counted after it.
    """
    for flat, grouped in forms.items():
        is_grouped = getattr(cls, grouped) is not getattr(base, grouped)
        if is_grouped and getattr(getattr(cls, flat), "__isabstractmethod__", False):
            setattr(cls, flat, _stand_in(flat, grouped))


def _only(groups: list[list[int]], connector: object, hook: str) -> list[int]:
    if len(groups) != 1:
        raise NotImplementedError(f"{type(connector).__name__} lacks {hook}, which {len(groups)} layer groups need")
    return groups[0]


class KvCacheConnectorScheduler(ABC):
    """The deciding half, on rank 0 alone. All hooks are called from the engine's loop, never concurrently.

    The engine calls the forms `..._by_layer_group`; where there is one group these call the flat forms by default, so a
    connector writes one of the two. On a model of several groups, flat forms alone are refused at the start.
    """

    def __init__(self, llm_args: LlmArgs) -> None:
        self._llm_args = llm_args
        self._config = llm_args
        super().__init__()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        forms = {
            "request_finished": "request_finished_by_layer_group",
            "update_state_after_alloc": "update_state_after_alloc_by_layer_group",
        }
        _complete(cls, KvCacheConnectorScheduler, forms)

    @abstractmethod
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> object:
        """Called once before each forward pass. The result is bound on every rank for that pass; where ranks are other
        processes it must survive pickling by the host or, here, be encodable by msgspec."""

    @abstractmethod
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens after the first `num_computed_tokens` (which the engine's pool holds) can be loaded, and
        whether asynchronously; a multiple of the block size. Asked once per allocation, before it."""

    @abstractmethod
    def request_finished(self, request: Request, cache_block_ids: list[int]) -> bool:
        """The request generates no more. True: its blocks are still being saved; the engine keeps them until every
        rank's `get_finished` reports the request as saved."""

    @abstractmethod
    def update_state_after_alloc(self, request: Request, block_ids: list[int]) -> None:
        """The match was taken; these are the prompt's blocks in order: `ceil(prompt / tokens_per_block)` ids."""

    def request_finished_by_layer_group(
        self, request: Request, cache_block_ids_by_layer_group: list[list[int]]
    ) -> bool:
        """As `request_finished`, one list a layer group; NO_BLOCK where the window has passed."""
        hook = "request_finished_by_layer_group"
        return self.request_finished(request, _only(cache_block_ids_by_layer_group, self, hook))

    def update_state_after_alloc_by_layer_group(
        self, request: Request, block_ids_by_layer_group: list[list[int]]
    ) -> None:
        """As `update_state_after_alloc`, one list a layer group: `[g][i]` is block `i` of the prompt in group `g`, or
        NO_BLOCK where the group needs none. Of recurrent layers (`KvCacheLayerGroupLayout.kind`) the block in which the
        match ends is to get the state there, and no other."""
        hook = "update_state_after_alloc_by_layer_group"
        self.update_state_after_alloc(request, _only(block_ids_by_layer_group, self, hook))

    def wait_for_initialization(self) -> None:
        """Called once after every rank has registered its pool and before the first request."""

    def cancel_load(self, request: Request, start: int, end: int) -> None:
        """The load of prompt tokens `start` to `end`, which a match promised, is no longer wanted. The blocks of an
        asynchronous load that has begun stay allocated until the ranks report it."""

    def shutdown(self) -> None:
        """The engine ends. Called once, after the last pass."""


class KvCacheConnectorWorker(ABC):
    """The copying half, one per rank. Hooks around a forward pass run in the thread that runs the pass."""

    def __init__(self, llm_args: LlmArgs) -> None:
        self._llm_args = llm_args
        self._config = llm_args
        self._metadata: Any = None
        super().__init__()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _complete(cls, KvCacheConnectorWorker, {"register_kv_caches": "register_kv_cache_layout"})

    def bind_connector_meta(self, metadata: object) -> None:
        """Give this rank the metadata of the coming pass."""
        self._metadata = metadata

    def get_connector_meta(self) -> Any:
        """The metadata bound for this pass."""
        return self._metadata

    def _clear_connector_meta(self) -> None:
        self._metadata = None

    @abstractmethod
    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """The rank's pool, shape `[num_blocks, num_layers, kv_factor, heads * tokens_per_block * head_dim]`. Called
        once, before the first request."""

    def register_kv_cache_layout(self, layout: KvCacheLayout) -> None:
        """The rank's pools as byte ranges: what the engine calls, once, before the first request. By default a layout
        that is one tensor goes to `register_kv_caches`. NotImplementedError: it is not one tensor."""
        pool = layout.as_single_pool_tensor()
        if pool is None:
            raise NotImplementedError(
                f"{type(self).__name__} lacks register_kv_cache_layout, which {len(layout.groups)} layer groups need"
            )
        self.register_kv_caches(pool)

    def register_forward_pass_callable(self) -> Callable[[], object] | None:
        """A callable that the engine runs at the end of each forward pass, on the pass's stream, or None."""
        return None

    @abstractmethod
    def start_load_kv(self, stream: Any) -> None:
        """Begin the pass's loads. `stream` is the stream the forward pass runs on."""

    @abstractmethod
    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Return when, in the order of `stream`, this layer's loads are done. Called before the layer's attention."""

    @abstractmethod
    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """This layer's KV of the pass is written, in the order of `stream`."""

    @abstractmethod
    def wait_for_save(self, stream: Any) -> None:
        """Called at the end of the pass: synchronous saves must be ordered before what `stream` does next."""

    @abstractmethod
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Offers the ids whose asynchronous save or load began since the last call; returns those, offered now or
        earlier, whose save and whose load are done on this rank. Each id once. Called every iteration."""

    def take_failed_loads(self) -> list[int]:
        """Ids of requests a load of which failed on this rank since the last call; the engine recomputes what they
        matched. A failed asynchronous load is reported by `get_finished` as well."""
        return []

    def shutdown(self) -> None:
        """The engine ends. Called once, after the last pass."""
