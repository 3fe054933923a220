"""What an engine tells a connector's constructors about itself. Knows no connector."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from kvferry.config import KvCacheConfig, KvCacheConnectorConfig


@dataclass(frozen=True, slots=True)
class RankMapping:
    """A rank's place among the ranks of one host, in TensorRT-LLM's names. Each layer is on every rank."""

    rank: int
    world_size: int
    enable_attention_dp: bool = False
    node_rank: int = 0
    pp_rank: int = 0
    pp_size: int = 1

    @property
    def tp_rank(self) -> int:
        return self.rank

    @property
    def tp_size(self) -> int:
        return self.world_size

    def to_mapping(self) -> RankMapping:
        """Itself: TensorRT-LLM has this in two steps."""
        return self


@dataclass(frozen=True, slots=True)
class LlmArgs:
    """An engine's settings, as all generations of connector constructors read them.

    engine_id: unique per engine instance; the same on all its ranks.
    model: where transformers finds the config: a folder or a hub name.
    model_identity: names the weights by content (revision or digest), or None if the engine cannot name them, in which
        case nothing may be kept beyond the engine's life.
    kv_dtype: torch's name of the pool's element type, such as "float32".
    num_layers, num_kv_heads, head_dim: of the whole model, not of one rank's part.
    runtime_dir: where ranks are processes of their own, a folder that only their user may enter, the same for all of
        them; removed when the engine ends.
    """

    engine_id: str
    model: str
    model_identity: str | None
    kv_dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_batch_size: int
    max_num_tokens: int
    kv_cache_config: KvCacheConfig
    kv_connector_config: KvCacheConnectorConfig
    tensor_parallel_size: int = 1
    rank: int = 0
    runtime_dir: str | None = None
    sliding_windows: tuple[int | None, ...] = field(default=())
    pipeline_parallel_size: ClassVar[int] = 1
    enable_attention_dp: ClassVar[bool] = False
    backend: ClassVar[str] = "pytorch"

    @property
    def tokens_per_block(self) -> int:
        """The older constructors' name for `kv_cache_config.tokens_per_block`."""
        return self.kv_cache_config.tokens_per_block

    @property
    def mapping(self) -> RankMapping:
        """This rank's place. `parallel_config.to_mapping()` is the same."""
        return RankMapping(self.rank, self.tensor_parallel_size)

    parallel_config = mapping
