"""The embedded engine as its users see it: prompts in, text and tokens out."""

from __future__ import annotations

import contextlib
import itertools
import os
import uuid
import weakref
from dataclasses import replace
from typing import Any, Self, overload

import torch

from kvferry.config import KvCacheConfig, KvCacheConnectorConfig
from kvferry.connector.config import LlmArgs
from kvferry.connector.manager import KvCacheConnectorManager, LocalCollective
from kvferry.connector.presets import resolve
from kvferry.engine.collective import acting_for, enter_world
from kvferry.engine.core import EngineCore
from kvferry.engine.executor import Executor
from kvferry.engine.follower import PoolPlan
from kvferry.engine.groups import GroupedBlocks, Snapshots, check_windows, group_layers
from kvferry.engine.handle import GenerationHandle
from kvferry.engine.kv_pool import KvPool, KvShape, free_bytes, most_pool_bytes
from kvferry.engine.lora import adapter_digest
from kvferry.engine.model import load_model
from kvferry.engine.outputs import RequestOutput
from kvferry.engine.rank import make_worker, part_of_kv, plan_first_rank
from kvferry.engine.ranks import Ranks
from kvferry.engine.sampling import SamplingParams, is_int, is_unicode
from kvferry.engine.scheduler import Limits, Scheduler
from kvferry.engine.sequence import Sequence
from kvferry.engine.text import Detokenizer
from kvferry.errors import RequestError

Prompt = str | list[int]
Sampling = SamplingParams | list[SamplingParams] | None


class LLM:
    """A model served by the embedded engine.

    model: a folder, a .gguf file or a hub name. dtype: "auto" or a floating-point type's name. device: "auto" (a GPU if
    there is one), "cpu", "cuda" or "cuda:1". max_num_tokens: most tokens that one forward pass computes; without
    chunked prefill no prompt may be longer. tensor_parallel_size: so many ranks share the model's heads, this process
    and others that it starts, on as many GPUs; the engine ends when one is lost, and one that shows no life for
    rank_timeout_seconds is. max_seq_len: most tokens of a prompt and its output. Use it as a context manager, or call
    `shutdown`; an engine that nobody holds any more shuts itself down, as does one that the process's end finds.

    Raises RequestError (a ValueError) if there is no such model or a limit makes no sense. ConfigError, ConnectorError:
    the connector cannot be used. EngineDeadError: another rank could not start.
    """

    def __init__(  # noqa: PLR0913 - a host's options, by keyword
        self,
        model: str | os.PathLike[str],
        *,
        kv_cache_config: KvCacheConfig | None = None,
        kv_connector_config: KvCacheConnectorConfig | None = None,
        tensor_parallel_size: int = 1,
        rank_timeout_seconds: float = 10.0,
        max_seq_len: int | None = None,
        max_batch_size: int = 8,
        max_num_tokens: int = 8192,
        enable_chunked_prefill: bool = True,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        if not 1 <= max_batch_size <= max_num_tokens:
            raise RequestError(
                f"max_batch_size ({max_batch_size}) must be at least 1 and at most max_num_tokens ({max_num_tokens})"
            )
        if max_seq_len is not None and max_seq_len < 1:
            raise RequestError(f"max_seq_len must be at least 1, not {max_seq_len}")
        self._kv_cache_config = kv_cache_config or KvCacheConfig()
        if kv_connector_config is not None:
            resolve(kv_connector_config)
        self._limits = Limits(
            max_batch_size,
            max_num_tokens,
            enable_chunked_prefill,
            max_loading_share=self._kv_cache_config.max_loading_share,
            transfer_deadline_seconds=self._kv_cache_config.transfer_deadline_seconds,
        )
        self._max_seq_len = max_seq_len
        self._plan = plan_first_rank(os.fspath(model), dtype, _find_device(device), tensor_parallel_size)
        self._ranks = Ranks(self._plan, rank_timeout_seconds) if tensor_parallel_size > 1 else None
        collective = self._ranks.collective if self._ranks is not None else LocalCollective()
        enter_world(collective)
        try:
            with acting_for(collective):
                self._start(kv_connector_config)
        except BaseException:
            if self._ranks is not None:
                self._ranks.close(at_once=True)
            raise
        self._request_ids = itertools.count(1)
        weakref.finalize(self, self._core.shutdown)

    def _start(self, connector_config: KvCacheConnectorConfig | None) -> None:
        plan, ranks, device = self._plan, self._ranks, torch.device(self._plan.device)
        self._loaded = load_model(plan.model, plan.dtype, device, ranks.group if ranks is not None else None)
        self.tokenizer = self._loaded.tokenizer
        self._max_positions = min(self._loaded.max_positions, self._max_seq_len or self._loaded.max_positions)
        check_windows(self._loaded.windows, self._kv_cache_config.max_attention_window, self._max_positions)
        self._limits = replace(self._limits, stop_token_ids=self._loaded.stop_token_ids)
        shape = part_of_kv(self._loaded, plan.num_ranks)
        num_blocks = self._find_num_blocks(shape, device)
        args = self._llm_args(connector_config) if connector_config is not None else None
        if ranks is not None:
            ranks.make_pools(PoolPlan(num_blocks, self._kv_cache_config.tokens_per_block, args))
        snapshots = self._snapshots(num_blocks, is_kept=args is not None or self._kv_cache_config.enable_block_reuse)
        groups = group_layers(self._loaded.windows, self._loaded.state_layers, snapshots)
        self._pool = KvPool(shape, groups, num_blocks, self._kv_cache_config.tokens_per_block, device)
        self._executor = Executor(self._loaded.model, self._pool)
        with ranks.explained() if ranks is not None else contextlib.nullcontext():
            self._executor.warm_up()
        manager = _connect(args, self._pool, ranks) if args is not None else None
        if manager is None and ranks is not None:
            ranks.await_started()
        self.connector_manager = manager
        self._blocks = GroupedBlocks(
            self._pool.groups,
            self._pool.num_blocks,
            self._pool.tokens_per_block,
            enable_reuse=self._kv_cache_config.enable_block_reuse,
        )
        self._scheduler = Scheduler(self._blocks, self._limits, manager)
        self._core = EngineCore(self._scheduler, self._executor, manager, ranks)

    def _find_num_blocks(self, shape: KvShape, device: torch.device) -> int:
        """As configured, within what the rank with the least memory can hold. EngineDeadError: a rank did not load."""
        config = self._kv_cache_config
        if shape.states and config.state_interval_tokens % config.tokens_per_block:
            raise RequestError(
                f"state_interval_tokens={config.state_interval_tokens} is not a multiple of "
                f"tokens_per_block={config.tokens_per_block}"
            )
        started = self._ranks.await_started() if self._ranks is not None else []
        if any(other.identity != self._loaded.identity for other in started):
            raise RequestError(f"the files of {self._plan.model} changed while ranks loaded them")
        max_tokens = config.max_tokens or self._limits.max_batch_size * self._max_positions
        if config.max_tokens is None or config.free_gpu_memory_fraction is not None:
            free = min([free_bytes(device), *(other.free_bytes for other in started)])
            most_bytes = most_pool_bytes(free, config.free_gpu_memory_fraction, device, self._plan.num_ranks)
            token_bytes = shape.block_bytes(1) + -(-shape.state_bytes // config.state_interval_tokens)
            beside = shape.state_bytes * self._num_moving_states
            max_tokens = min(max_tokens, max(0, most_bytes - beside) // token_bytes)
        num_blocks = max_tokens // config.tokens_per_block
        if num_blocks < 1:
            raise RequestError(f"a pool of {max_tokens} tokens holds no block of {config.tokens_per_block} tokens")
        return num_blocks

    def _snapshots(self, num_blocks: int, *, is_kept: bool) -> Snapshots:
        """is_kept: whether anything could use a state again; otherwise no pass is cut short for one."""
        pool_tokens = num_blocks * self._kv_cache_config.tokens_per_block
        interval = self._kv_cache_config.state_interval_tokens if is_kept else pool_tokens
        return Snapshots(interval, pool_tokens // interval + self._num_moving_states)

    @property
    def _num_moving_states(self) -> int:
        """States that requests hold beside those kept at each interval: where each began, where its load ends, and the
        one that it computes."""
        return 3 * self._limits.max_batch_size

    def _llm_args(self, connector_config: KvCacheConnectorConfig) -> LlmArgs:
        return LlmArgs(
            engine_id=uuid.uuid4().hex,
            model=self._loaded.source.name_or_path,
            model_identity=self._loaded.identity,
            kv_dtype=str(next(self._loaded.model.parameters()).dtype).removeprefix("torch."),
            num_layers=self._loaded.num_layers,
            num_kv_heads=self._loaded.num_kv_heads,
            head_dim=self._loaded.head_dim,
            max_batch_size=self._limits.max_batch_size,
            max_num_tokens=self._limits.max_num_tokens,
            kv_cache_config=self._kv_cache_config,
            kv_connector_config=connector_config,
            tensor_parallel_size=self._plan.num_ranks,
            runtime_dir=self._ranks.runtime_dir if self._ranks is not None else None,
            sliding_windows=self._loaded.windows,
        )

    # -- requests ----------------------------------------------------------------------------------------------------

    @overload
    def generate(
        self, prompts: Prompt, sampling_params: Sampling = None, lora_path: str | None = None
    ) -> RequestOutput: ...

    @overload
    def generate(
        self, prompts: list[str] | list[list[int]], sampling_params: Sampling = None, lora_path: str | None = None
    ) -> list[RequestOutput]: ...

    def generate(
        self, prompts: Any, sampling_params: Sampling = None, lora_path: str | None = None
    ) -> RequestOutput | list[RequestOutput]:
        """Generate for one prompt (a string or a list of token ids) or for a list of them, and wait.

        `sampling_params` is one for all prompts or one for each; `lora_path` the folder of a peft adapter for all. One
        prompt gives one output, a list gives a list in the order of the prompts. RequestError: a prompt, value or
        adapter cannot be served; then none of them ran.
        """
        is_single = isinstance(prompts, str) or (isinstance(prompts, list) and all(map(is_int, prompts)))
        many = [prompts] if is_single else list(prompts)
        params = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(many)
        if len(params) != len(many):
            raise RequestError(f"{len(params)} sampling_params for {len(many)} prompts")
        sequences = [self._make_sequence(prompt, one, lora_path) for prompt, one in zip(many, params, strict=True)]
        handles = [self._submit(sequence, prompt) for sequence, prompt in zip(sequences, many, strict=True)]
        try:
            outputs = [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.abort()
            raise
        return outputs[0] if is_single else outputs

    def generate_async(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, lora_path: str | None = None
    ) -> GenerationHandle:
        """Start one request and return at once; the handle streams it. RequestError: it cannot be served."""
        return self._submit(self._make_sequence(prompt, sampling_params, lora_path), prompt)

    def _make_sequence(self, prompt: Any, params: SamplingParams | None, lora_path: str | None) -> Sequence:
        """Check a request against every limit, before anything runs."""
        params = params or SamplingParams()
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params must be SamplingParams, not {type(params).__name__}")
        tokens = self._tokenize(prompt)
        if not tokens:
            raise RequestError("the prompt is empty; at least 1 token is needed")
        if params.stop_strings and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model's folder has none")
        vocab_size = self._loaded.vocab_size
        if bad := [token for token in tokens if not (is_int(token) and 0 <= token < vocab_size)]:
            raise RequestError(f"{bad[0]!r} is no token id of this model; ids are integers from 0 to {vocab_size - 1}")
        self._check_length(len(tokens), params.max_tokens)
        lora_id = self._load_adapter(lora_path) if lora_path is not None else None
        return Sequence(next(self._request_ids), tokens, params, lora_id)

    def _load_adapter(self, folder: str) -> str:
        if self._ranks is not None:
            raise RequestError(
                "LoRA adapters are not to be had with tensor_parallel_size > 1: nothing cuts their weights"
            )
        lora_id = adapter_digest(folder)
        self._core.call(lambda: self._executor.adapters.load(lora_id, folder))
        return lora_id

    def _check_length(self, num_prompt: int, max_tokens: int) -> None:
        asked = f"a prompt of {num_prompt} tokens and max_tokens={max_tokens}"
        if num_prompt + max_tokens > self._max_positions:
            whose = (
                "the model's limit" if self._max_positions == self._loaded.max_positions else "max_seq_len, the limit"
            )
            raise RequestError(f"{asked} exceed {whose} of {self._max_positions} tokens")
        pool_tokens = self._pool.num_blocks * self._pool.tokens_per_block
        if num_prompt + max_tokens - 1 > pool_tokens:
            raise RequestError(f"{asked} exceed the pool's limit of {pool_tokens} tokens (kv_cache_config.max_tokens)")
        if not self._limits.enable_chunked_prefill and num_prompt > self._limits.max_num_tokens:
            raise RequestError(
                f"a prompt of {num_prompt} tokens exceeds max_num_tokens={self._limits.max_num_tokens}, "
                "the limit of one pass without enable_chunked_prefill"
            )

    def _tokenize(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("this model's folder has no tokenizer: give the prompt as a list of token ids")
            if not is_unicode(prompt):
                raise RequestError("the prompt is no Unicode text: it holds half of a surrogate pair")
            return list(self.tokenizer.encode(prompt)) if prompt else []
        if not isinstance(prompt, list):
            raise RequestError(f"a prompt is a string or a list of token ids, not {type(prompt).__name__}")
        return prompt

    def _submit(self, sequence: Sequence, prompt: Any) -> GenerationHandle:
        text = Detokenizer(self.tokenizer, sequence.params.stop_strings) if self.tokenizer is not None else None
        handle = GenerationHandle(self._core, sequence, prompt if isinstance(prompt, str) else None, text)
        self._core.submit(sequence, handle.on_progress)
        return handle

    def max_new_tokens(self, num_prompt_tokens: int) -> int:
        """The largest `max_tokens` that a prompt of so many tokens may ask for; below 1 if it is too long."""
        pool_tokens = self._pool.num_blocks * self._pool.tokens_per_block
        return min(self._max_positions, pool_tokens + 1) - num_prompt_tokens

    # -- the end -----------------------------------------------------------------------------------------------------

    @property
    def failure(self) -> BaseException | None:
        """What ended the engine's loop, or None."""
        return self._core.failure

    def check(self) -> None:
        """Prove that the pool's books are right, between two iterations. InvariantError: they are not."""
        self._core.call(self._scheduler.check)

    def shutdown(self) -> None:
        """Abort what runs, let the connector finish, free the pool. Further calls do nothing."""
        self._core.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()


def _connect(args: LlmArgs, pool: KvPool, ranks: Ranks | None) -> KvCacheConnectorManager:
    """Make both halves in the order the API promises: all workers have their pools before the scheduler half exists."""
    worker = make_worker(args, pool)
    scheduler = None
    try:
        if ranks is not None:
            ranks.await_started()
        scheduler = resolve(args.kv_connector_config).scheduler(args)
        scheduler.wait_for_initialization()
    except BaseException:
        worker.shutdown()
        if scheduler is not None:
            scheduler.shutdown()
        raise
    return KvCacheConnectorManager(args, worker, scheduler, ranks.collective if ranks is not None else None)


def _find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"{name!r} is no device: {error}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise RequestError(f"device {name!r} is not to be had here")
    return device
