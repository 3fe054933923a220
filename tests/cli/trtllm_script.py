"""A script as people write them for TensorRT-LLM: a connector and a run of it, with TensorRT-LLM's names alone.

    kvferry trtllm-run trtllm_script.py MODEL FOLDER [NUM_RANKS]

Two engines, one after the other, answer one prompt; the second finds the first one's blocks, which lie in FOLDER. With
several ranks one engine answers twice, as it starts a process a rank.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tensorrt_llm import LLM, SamplingParams, logger, mpi_rank
from tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector import (
    KvCacheConnectorScheduler,
    KvCacheConnectorWorker,
    SchedulerOutput,
)
from tensorrt_llm._torch.pyexecutor.connectors.kv_cache_layout import valid_page_slots
from tensorrt_llm._utils import mpi_allgather, mpi_barrier, mpi_broadcast, mpi_world_size
from tensorrt_llm.bindings.internal.batch_manager import LlmRequest
from tensorrt_llm.llmapi import KvCacheConfig, KvCacheConnectorConfig
from tensorrt_llm.llmapi.llm_args import TorchLlmArgs

FOLDER_FILE = Path(__file__).with_suffix(".folder")
"""Says where blocks lie: ranks in other processes know neither our arguments nor our variables."""


@dataclass
class Errands:
    """Files and blocks of one pass."""

    fetch: list[tuple[str, int]] = field(default_factory=list)
    keep: list[tuple[str, int]] = field(default_factory=list)


class Carrier(KvCacheConnectorWorker):
    def __init__(self, llm_args: TorchLlmArgs) -> None:
        super().__init__(llm_args)
        assert mpi_broadcast({"leader": mpi_rank()}) == {"leader": 0}
        assert mpi_allgather(mpi_rank()) == list(range(mpi_world_size())) == list(range(llm_args.tensor_parallel_size))
        assert mpi_rank() == llm_args.parallel_config.to_mapping().rank
        mpi_barrier()
        self.folder = Path(FOLDER_FILE.read_text()) / str(mpi_rank())
        self.folder.mkdir(exist_ok=True)

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        self.pool = kv_cache_tensor

    def start_load_kv(self, stream: torch.cuda.Stream) -> None:
        for name, block in self.get_connector_meta().fetch:
            self.pool[block].copy_(torch.load(self.folder / name))

    def wait_for_layer_load(self, layer_idx: int, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(stream)

    def save_kv_layer(self, layer_idx: int, stream: torch.cuda.Stream) -> None:
        stream.wait_event(stream.record_event())

    def wait_for_save(self, stream: torch.cuda.Stream) -> None:
        stream.synchronize()
        for name, block in self.get_connector_meta().keep:
            torch.save(self.pool[block].cpu(), self.folder / name)

    def get_finished(self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]):
        return [], []


class Foreman(KvCacheConnectorScheduler):
    def __init__(self, llm_args: TorchLlmArgs) -> None:
        super().__init__(llm_args)
        self.folder = Path(FOLDER_FILE.read_text()) / "0"
        self.size = llm_args.kv_cache_config.tokens_per_block
        self.offered: dict[int, int] = {}

    def name(self, tokens: list[int], salt: str | None) -> str:
        return hashlib.sha256(json.dumps([list(tokens), salt]).encode()).hexdigest()

    def get_num_new_matched_tokens(self, request: LlmRequest, num_computed_tokens: int) -> tuple[int, bool]:
        tokens = request.get_tokens(0)
        assert request.prompt_len == len(tokens) and request.get_tokens() == [tokens]
        end = num_computed_tokens
        while end + self.size < len(tokens):
            if not (self.folder / self.name(tokens[: end + self.size], request.cache_salt)).exists():
                break
            end += self.size
        self.offered[request.request_id] = end
        logger.info("%d tokens are in the folder", end - num_computed_tokens)
        return end - num_computed_tokens, False

    def update_state_after_alloc(self, request: LlmRequest, block_ids: list[int]) -> None:
        assert request.context_current_position == self.offered[request.request_id]

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Errands:
        errands = Errands()
        for data in scheduler_output.new_requests:
            known = self.offered.pop(data.request_id)
            for place, block in valid_page_slots(data.new_block_ids):
                end = (place + 1) * self.size
                name = self.name(data.new_tokens[:end], data.cache_salt)
                if data.computed_position < end <= known:
                    errands.fetch.append((name, block))
                elif known < end <= len(data.new_tokens):
                    errands.keep.append((name, block))
        return errands

    def request_finished(self, request: LlmRequest, cache_block_ids: list[int]) -> bool:
        return False


def main(model: str, folder: str, num_ranks: str = "1") -> None:
    FOLDER_FILE.write_text(folder)
    connector = KvCacheConnectorConfig(
        connector_module=Path(__file__).stem,
        connector_scheduler_class="Foreman",
        connector_worker_class="Carrier",
    )
    options = {
        "backend": "pytorch",
        "cuda_graph_config": None,
        "disable_overlap_scheduler": True,
        "tensor_parallel_size": int(num_ranks),
        "kv_cache_config": KvCacheConfig(
            tokens_per_block=8, free_gpu_memory_fraction=0.1, enable_block_reuse=False, enable_partial_reuse=False
        ),
    }
    prompt = "A ferry carries people and goods across water, there and back again."
    texts = []
    llm = LLM(model=model, kv_connector_config=connector, **options)
    for turn in range(2):
        if turn == 1 and num_ranks == "1":
            del llm
            llm = LLM(model=model, kv_connector_config=connector, **options)
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=8, ignore_eos=True))
        print("loaded", output.metrics.num_connector_tokens)
        texts.append(output.outputs[0].text)
    assert texts[0] == texts[1]
    print("same text", len(texts[0]) > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
