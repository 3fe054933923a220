"""A small connector to copy from: it keeps KV blocks as files in a folder and loads them in a later run.

Built on the public API of `kvferry.connector` alone; knows no store and no engine. Loads and saves are synchronous and
a file holds one block, so that each hook shows what it is for. To serve with, there is the preset `kvferry`.

    scheduler half   names blocks by content, asks the folder which of them exist, plans loads and saves
    worker half      moves bytes between the pool and the folder as planned

Option `folder`: where the files lie; default `~/.cache/kvferry/persistent`. Only damaged files are ever deleted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import tempfile
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvferry.connector.api import (
    NO_BLOCK,
    KvCacheConnectorScheduler,
    KvCacheConnectorWorker,
    Request,
    SchedulerOutput,
)
from kvferry.connector.config import LlmArgs
from kvferry.errors import ConfigError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("kvferry.connector.persistent")

DEFAULT_FOLDER = "~/.cache/kvferry/persistent"


class Copy(msgspec.Struct, frozen=True):
    """One block: the file `name` and the pool's `block_id`. `request_id` tells whom a failed load concerns."""

    request_id: int
    name: str
    block_id: int


class PassPlan(msgspec.Struct, frozen=True):
    """The metadata of a forward pass: plain data, so that it reaches ranks in other processes as well."""

    loads: list[Copy]
    saves: list[Copy]


@dataclass(slots=True)
class _Tracked:
    """What the scheduler half remembers of a request. `names` are those of the full blocks of `tokens`."""

    root: bytes
    tokens: list[int]
    names: list[str] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    matched: range = range(0)

    def extend_names(self, block_tokens: int) -> None:
        """Name the blocks that have become full. A name covers all tokens before its block too: KV depends on them."""
        for i in range(len(self.names), len(self.tokens) // block_tokens):
            parent = bytes.fromhex(self.names[-1]) if self.names else self.root
            tokens = array("q", self.tokens[i * block_tokens : (i + 1) * block_tokens]).tobytes()
            self.names.append(hashlib.sha256(parent + tokens).hexdigest())


class PersistentConnectorScheduler(KvCacheConnectorScheduler):
    """Decides which blocks are loaded and saved."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._num_ranks = llm_args.tensor_parallel_size
        self._folders = [BlockFolder(_folder_path(llm_args), rank, self._num_ranks) for rank in range(self._num_ranks)]
        self._block_tokens = llm_args.tokens_per_block
        self._requests: dict[int, _Tracked] = {}

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """Count the blocks on disk that go on where the pool's end."""
        if self._llm_args.model_identity is None:
            return 0, False  # files outlive the engine: with unnamed weights nobody could say whose KV they hold
        tracked = _Tracked(_root(self._llm_args, request), list(request.get_tokens(0)))
        tracked.extend_names(self._block_tokens)
        self._requests[request.request_id] = tracked
        first = num_computed_tokens // self._block_tokens
        # At least one token is left to compute: its logits give the first new token.
        limit = (len(tracked.tokens) - 1) // self._block_tokens
        end = first
        while end < limit and all(folder.holds(tracked.names[end]) for folder in self._folders):
            end += 1
        tracked.matched = range(first, end)
        return len(tracked.matched) * self._block_tokens, False  # False: loaded within the pass, not beside it

    def update_state_after_alloc(self, request: Request, block_ids: list[int]) -> None:
        """The prompt has its blocks, which the first pass tells as well. If the match was not taken, forget it."""
        tracked = self._requests.get(request.request_id)
        if tracked is not None and request.num_connector_matched_tokens == 0:
            tracked.matched = range(0)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> PassPlan:
        """Loads for the requests that start in this pass, and saves of all blocks that are full after it."""
        plan = PassPlan([], [])
        for data in scheduler_output.new_requests:
            tracked = self._requests.get(data.request_id)
            if tracked is None:
                continue
            tracked.block_ids = list(data.new_block_ids)
            plan.loads.extend(Copy(data.request_id, tracked.names[i], tracked.block_ids[i]) for i in tracked.matched)
            # `computed_position` leaves out what we matched. Blocks that the pool had may be new to the folder.
            num_matched = len(tracked.matched) * self._block_tokens
            end = data.computed_position + num_matched + data.num_scheduled_tokens
            self._plan_saves(plan, data.request_id, 0, end)
        for data in scheduler_output.cached_requests:
            tracked = self._requests.get(data.request_id)
            if tracked is None:
                continue
            tracked.tokens += data.new_tokens
            tracked.block_ids += data.new_block_ids
            tracked.extend_names(self._block_tokens)
            self._plan_saves(
                plan, data.request_id, data.computed_position, data.computed_position + data.num_scheduled_tokens
            )
        return plan

    def _plan_saves(self, plan: PassPlan, request_id: int, start: int, end: int) -> None:
        """Plan to save the full blocks that hold tokens `start` to `end`. What the folder has, the worker skips."""
        tracked = self._requests[request_id]
        for i in range(start // self._block_tokens, end // self._block_tokens):
            if tracked.block_ids[i] != NO_BLOCK:  # a sliding window has passed it
                plan.saves.append(Copy(request_id, tracked.names[i], tracked.block_ids[i]))

    def request_finished(self, request: Request, cache_block_ids: list[int]) -> bool:
        """Forget the request. False: saves end within their pass, so its blocks are free at once."""
        self._requests.pop(request.request_id, None)
        return False


class PersistentConnectorWorker(KvCacheConnectorWorker):
    """Moves bytes between one rank's pool and the folder."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._folder = BlockFolder(_folder_path(llm_args), llm_args.rank, llm_args.tensor_parallel_size)
        self._failed: set[int] = set()

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """Keep the pool. `pool[block_id]` is all layers' KV of a block."""
        self._pool = kv_cache_tensor
        self._block_bytes = kv_cache_tensor[0].numel() * kv_cache_tensor.element_size()

    def start_load_kv(self, stream: Any) -> None:
        """Load everything now: `copy_` from pageable memory returns when the pool has the bytes."""
        import torch  # here, because a connector's module imports without it

        self._failed.clear()
        for load in self.get_connector_meta().loads:
            content = self._folder.read(load.name, self._block_bytes)
            if content is None:  # damaged, or deleted since the match
                self._failed.add(load.request_id)
                continue
            block = self._pool[load.block_id]
            block.copy_(torch.frombuffer(content, dtype=torch.uint8).view(block.dtype).view(block.shape))

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Nothing to wait for: `start_load_kv` loaded all layers."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Nothing yet: a file holds all layers of a block, so `wait_for_save` writes it."""

    def wait_for_save(self, stream: Any) -> None:
        """The pass is over: save the blocks that it filled."""
        import torch

        for save in self.get_connector_meta().saves:
            # After a failed load the pass computed on garbage. The engine computes those tokens again.
            if save.request_id not in self._failed and not self._folder.holds(save.name):
                block = self._pool[save.block_id].contiguous().view(-1).view(torch.uint8)
                self._folder.write(save.name, block.cpu().numpy().data)

    def take_failed_loads(self) -> list[int]:
        """Never keep a failed load to yourself: the engine would take the blocks' old bytes for KV."""
        failed, self._failed = list(self._failed), set()
        return failed

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Nothing runs beside the passes."""
        return [], []


class BlockFolder:
    """One rank's files. A file is a header (magic, payload length, name, payload's BLAKE2b) and the block's bytes."""

    _HEADER = struct.Struct("<8sQ32s32s")
    _MAGIC = b"kvfblk01"

    def __init__(self, path: Path, rank: int, num_ranks: int) -> None:
        self._path = path
        self._suffix = f"-{rank}-of-{num_ranks}.kv"
        self._write_failed = False
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"option 'folder' is {str(path)!r}: {error.strerror}") from error

    def holds(self, name: str) -> bool:
        """Whether there is a file; whether it is sound shows when it is read."""
        return (self._path / (name + self._suffix)).exists()

    def read(self, name: str, num_bytes: int) -> bytearray | None:
        """The block's bytes, or None if they are not exactly what was written. A damaged file is deleted."""
        path = self._path / (name + self._suffix)
        try:
            file = bytearray(path.read_bytes())
        except OSError:
            return None
        content = file[self._HEADER.size :]
        if len(content) == num_bytes and file[: self._HEADER.size] == self._header(name, content):
            return content
        logger.warning("%s is damaged: deleted", path)
        path.unlink(missing_ok=True)
        return None

    def write(self, name: str, content: memoryview) -> None:
        """Make a file that is there whole or not at all. A folder that cannot be written costs hits, not requests."""
        temporary = None
        try:
            with tempfile.NamedTemporaryFile(dir=self._path, delete=False) as file:
                temporary = Path(file.name)
                file.write(self._header(name, content))
                file.write(content)
            temporary.replace(self._path / (name + self._suffix))
        except OSError as error:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            if not self._write_failed:
                logger.warning("cannot write to %s (%s): blocks are not kept", self._path, error.strerror)
            self._write_failed = True

    def _header(self, name: str, content: bytearray | memoryview) -> bytes:
        checksum = hashlib.blake2b(content, digest_size=32).digest()
        return self._HEADER.pack(self._MAGIC, len(content), bytes.fromhex(name), checksum)


def _folder_path(llm_args: LlmArgs) -> Path:
    options = dict(llm_args.kv_connector_config.options)
    folder = options.pop("folder", DEFAULT_FOLDER)
    if options:
        raise ConfigError(f"unknown option {min(options)!r} of the connector 'persistent'; it has 'folder'")
    return Path(os.fspath(folder)).expanduser()


def _root(llm_args: LlmArgs, request: Request) -> bytes:
    """Names what a block's bytes depend on besides tokens. Whatever is missing here is served to the wrong request."""
    identity = (
        (llm_args.model_identity, llm_args.kv_dtype, llm_args.num_layers, llm_args.num_kv_heads, llm_args.head_dim),
        (llm_args.tokens_per_block, llm_args.tensor_parallel_size),
        (request.cache_salt, request.lora_id),
    )
    return hashlib.sha256(msgspec.json.encode(identity)).digest()
