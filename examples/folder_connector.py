"""A connector of your own, to start from: KV blocks as files in a folder, which the next engine finds again.

    cd examples
    kvferry check folder_connector:FolderScheduler,FolderWorker --option folder={tmp} --persistent
    python folder_connector.py MODEL FOLDER    # twice: the second run loads what the first one saved

MODEL is a folder, a .gguf file or a hub name such as HuggingFaceTB/SmolLM2-135M-Instruct.

A connector is two classes. The scheduler half lives once, beside the engine's scheduler: it says what can be loaded and
plans copies. The worker half lives on every rank and copies. What goes from one to the other, once a forward pass, is
the metadata: plain data, for ranks may be other processes. A served one has checksums and limits besides: see
src/kvferry/connector/persistent.py.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvferry import LLM, KvCacheConnectorConfig, SamplingParams
from kvferry.connector import KvCacheConnectorScheduler, KvCacheConnectorWorker, LlmArgs, Request, SchedulerOutput


@dataclass
class Plan:
    """The metadata of a pass: (request id, file's name, block id)."""

    loads: list[tuple[int, str, int]] = field(default_factory=list)
    saves: list[tuple[int, str, int]] = field(default_factory=list)


@dataclass
class Running:
    """What we know of a request: `names[i]` and `block_ids[i]` are those of its i-th block. `hit` blocks are loaded."""

    salt: str
    tokens: list[int]
    names: list[str] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    hit: range = range(0)


def rank_folder(args: LlmArgs, rank: int) -> Path:
    """Ranks hold different heads of the same tokens, and two models different KV: each has a folder of its own."""
    shape = f"{args.model_identity} {args.kv_dtype} {args.tokens_per_block} {args.tensor_parallel_size}"
    model = hashlib.sha256(shape.encode()).hexdigest()
    return Path(args.kv_connector_config.options["folder"]) / model / str(rank)


class FolderScheduler(KvCacheConnectorScheduler):
    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._size = llm_args.tokens_per_block
        self._folders = [rank_folder(llm_args, rank) for rank in range(llm_args.tensor_parallel_size)]
        self._running: dict[int, Running] = {}

    def _name_full_blocks(self, request: Running) -> None:
        """KV depends on every token before it, and salts keep tenants apart: all of that is in a block's name. Python's
        `hash` would not do: another process gets another number."""
        for i in range(len(request.names), len(request.tokens) // self._size):
            before = request.names[-1] if request.names else request.salt
            tokens = request.tokens[i * self._size : (i + 1) * self._size]
            request.names.append(hashlib.sha256(f"{before} {tokens}".encode()).hexdigest())

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """The engine asks: my pool has so many tokens of this prompt, what can you load after them?"""
        mine = Running(repr((request.cache_salt, request.lora_id)), list(request.get_tokens(0)))
        self._name_full_blocks(mine)
        self._running[request.request_id] = mine
        first = end = num_computed_tokens // self._size
        # The last token is left to the engine, which needs its logits: so the block that ends with it is, too.
        last = (len(mine.tokens) - 1) // self._size
        while end < last and all((folder / mine.names[end]).exists() for folder in self._folders):
            end += 1
        mine.hit = range(first, end)
        return len(mine.hit) * self._size, False  # True would promise a load beside the passes

    def update_state_after_alloc(self, request: Request, block_ids: list[int]) -> None:
        """The engine gave the prompt its blocks; perhaps it did not take our offer."""
        if not request.num_connector_matched_tokens:
            self._running[request.request_id].hit = range(0)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Plan:
        """A pass begins: load what was promised, and save every block that is full when the pass has ended."""
        plan = Plan()
        for data in scheduler_output.new_requests:  # in its first pass a request comes with its prompt and all blocks
            mine = self._running[data.request_id]
            mine.block_ids = list(data.new_block_ids)
            plan.loads += [(data.request_id, mine.names[i], mine.block_ids[i]) for i in mine.hit]
            computed = data.computed_position + len(mine.hit) * self._size
            self._save(plan, data.request_id, range(computed + data.num_scheduled_tokens))
        for data in scheduler_output.cached_requests:  # later only with what is new: one token, now and then a block
            mine = self._running[data.request_id]
            mine.tokens += data.new_tokens
            mine.block_ids += data.new_block_ids
            self._name_full_blocks(mine)
            end = data.computed_position + data.num_scheduled_tokens
            self._save(plan, data.request_id, range(data.computed_position, end))
        return plan

    def _save(self, plan: Plan, request_id: int, computed: range) -> None:
        mine = self._running[request_id]
        for i in range(computed.start // self._size, computed.stop // self._size):
            plan.saves.append((request_id, mine.names[i], mine.block_ids[i]))

    def request_finished(self, request: Request, cache_block_ids: list[int]) -> bool:
        self._running.pop(request.request_id, None)
        return False  # True would keep its blocks until `get_finished` says that they are saved


class FolderWorker(KvCacheConnectorWorker):
    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._folder = rank_folder(llm_args, llm_args.rank)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._failed: set[int] = set()

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        self._pool = kv_cache_tensor  # [blocks, layers, keys and values, heads * tokens * head_dim]

    def start_load_kv(self, stream: Any) -> None:
        """Everything is loaded here, before the first layer. What cannot be is told in `take_failed_loads`."""
        self._failed.clear()
        for request_id, name, block_id in self.get_connector_meta().loads:
            block = self._pool[block_id]
            try:
                content = bytearray((self._folder / name).read_bytes())
                block.copy_(torch.frombuffer(content, dtype=block.dtype).view(block.shape))
            except (OSError, RuntimeError, ValueError):  # gone since the match, or cut short
                self._failed.add(request_id)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Layer `layer_idx` is about to be computed: its loads must be in the pool when this returns."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Layer `layer_idx` is computed. A file holds all layers, so we wait for the last."""

    def wait_for_save(self, stream: Any) -> None:
        """The pass has ended; after this the engine may write to the blocks again."""
        for request_id, name, block_id in self.get_connector_meta().saves:
            path = self._folder / name
            if request_id not in self._failed and not path.exists():
                block = self._pool[block_id].contiguous().view(-1).view(torch.uint8).cpu()
                path.with_suffix(".part").write_bytes(block.numpy().tobytes())
                path.with_suffix(".part").rename(path)  # a file is there whole or not at all

    def take_failed_loads(self) -> list[int]:
        """The engine computes what these requests had matched."""
        failed, self._failed = list(self._failed), set()
        return failed

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        return [], []  # nothing runs beside the passes


def main(model: str, folder: str) -> None:
    connector = KvCacheConnectorConfig(
        connector_module="folder_connector",
        connector_scheduler_class="FolderScheduler",
        connector_worker_class="FolderWorker",
        options={"folder": folder},
    )
    with LLM(model, kv_connector_config=connector) as llm:
        output = llm.generate("A ferry carries people and goods. " * 20 + "A ferry", SamplingParams(max_tokens=16))
    print(output.text)
    print(f"{output.metrics.num_connector_tokens} of {output.metrics.num_prompt_tokens} prompt tokens were loaded")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
