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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from kvferry.connector.config import LlmArgs

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
    new_block_ids: all the request's blocks the first time; later only those added.
    computed_position: tokens whose KV the engine has before this pass, without those that the connector matched the
        first time the request appears.
    num_scheduled_tokens: tokens that this pass computes.
    block_hashes: the engine's content hashes of the request's full prompt blocks, the first time; else empty.
    priorities: retention priorities of `new_block_ids`, or None.
    new_block_ids_by_layer_group: as `new_block_ids`, one list a layer group; NO_BLOCK where a group has none.
    """

    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int
    num_scheduled_tokens: int
    block_hashes: list[bytes] = field(default_factory=list)
    priorities: list[int] | None = None
    cache_salt: str | None = None
    new_block_ids_by_layer_group: list[list[int]] = field(default_factory=list)


@dataclass(slots=True)
class SchedulerOutput:
    """What one forward pass computes. A request is in `new_requests` in its first pass and in `cached_requests` in all
    later ones."""

    new_requests: list[RequestData] = field(default_factory=list)
    cached_requests: list[RequestData] = field(default_factory=list)


class KvCacheConnectorScheduler(ABC):
    """The deciding half, on rank 0 alone. All hooks are called from the engine's loop, never concurrently."""

    def __init__(self, llm_args: LlmArgs) -> None:
        self._llm_args = llm_args
        self._config = llm_args
        super().__init__()

    @abstractmethod
    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> object:
        """Called once before each forward pass. The result is bound on every rank for that pass; where ranks are other
        processes it must survive pickling by the host or, here, be encodable by msgspec."""

    @abstractmethod
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """How many tokens after the first `num_computed_tokens` (which the engine's pool holds) can be loaded, a multiple
        of the block size, and whether the load is asynchronous. Asked once per allocation, before it."""

    @abstractmethod
    def request_finished(self, request: Request, cache_block_ids: list[int]) -> bool:
        """The request generates no more. True: its blocks are still being saved; the engine keeps them until every
        rank's `get_finished` reports the request as saved."""

    @abstractmethod
    def update_state_after_alloc(self, request: Request, block_ids: list[int]) -> None:
        """The match was taken and the prompt's blocks are allocated: `ceil(prompt / tokens_per_block)` ids, in order."""

    def wait_for_initialization(self) -> None:
        """Called once after every rank has registered its pool and before the first request."""

    def cancel_load(self, request: Request) -> None:
        """An asynchronous load is no longer wanted. Its blocks stay allocated until the ranks report it."""

    def shutdown(self) -> None:
        """The engine ends. Called once, after the last pass."""


class KvCacheConnectorWorker(ABC):
    """The copying half, one per rank. Hooks around a forward pass run in the thread that runs the pass."""

    def __init__(self, llm_args: LlmArgs) -> None:
        self._llm_args = llm_args
        self._config = llm_args
        self._metadata: Any = None
        super().__init__()

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

    def register_forward_pass_callable(self) -> Any:
        """A callable that the engine runs at the start of each forward pass, or None."""
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
