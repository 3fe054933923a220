"""Real vLLM engines that take turns: each with a connector of its own, in a process of its own, driven over a pipe.

For benchmarks. Needs vLLM; what a mode's connector needs is started with it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvferry.testing.servers import ServerProcess

LLAMA_8B = """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "head_dim": 128,
"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0, "torch_dtype": "bfloat16"}"""
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "PYTHONHASHSEED": "0",
    "LMCACHE_LOCAL_CPU": "True",
    "LMCACHE_CHUNK_SIZE": "256",
}
MODES = ("none", "native", "lmcache", "example", "kvferry", "server")
_END_SECONDS = 30.0
Prompt = dict[str, list[int]]


@contextmanager
def connector(mode: str, outside_gb: float) -> Iterator[dict[str, Any] | None]:
    """vLLM's `kv_transfer_config` for a mode, with what it needs running."""
    extra: dict[str, Any]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        match mode:
            case "none":
                yield None
            case "native":
                extra = {"cpu_bytes_to_use": int(outside_gb * 1e9)}
                yield {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": extra}
            case "example":
                yield {"kv_connector": "ExampleConnector", "kv_connector_extra_config": {"shared_storage_path": folder}}
            case "lmcache":
                os.environ["LMCACHE_MAX_LOCAL_CPU_SIZE"] = str(outside_gb)
                yield {"kv_connector": "LMCacheConnectorV1"}
            case "kvferry":
                yield {"kv_connector": "KVFerryConnector", "kv_connector_extra_config": {"l1_size_gb": outside_gb}}
            case "server":
                with ServerProcess(Path(folder), "--l1-size-gb", str(outside_gb)) as server:
                    extra = {"server_url": server.url}
                    yield {"kv_connector": "KVFerryConnector", "kv_connector_extra_config": extra}
            case _:
                raise ValueError(f"there is no mode {mode!r}")


@dataclass(frozen=True)
class EngineShape:
    """What all engines are made with. model: a folder; None: random weights in the shape of Llama 3 8B, for a GPU.
    share: of the GPU's memory that one may have. outside_gb: memory of a connector."""

    model: str | None
    max_model_len: int
    pool_tokens: int
    block_tokens: int
    share: float
    outside_gb: float


def serve(pipe: Any, mode: str, shape: EngineShape) -> None:
    """A mode's process: runs the prompts that come until None comes."""
    os.setsid()
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    import torch
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {"max_num_batched_tokens": 8192, "enforce_eager": True, "skip_tokenizer_init": True}
    if torch.cuda.is_available():
        settings["gpu_memory_utilization"] = shape.share
    model = shape.model or tempfile.mkdtemp()
    if shape.model is None:
        Path(model, "config.json").write_text(LLAMA_8B, encoding="utf-8")
        settings |= {"load_format": "dummy", "dtype": "bfloat16"}
    settings |= {"max_model_len": shape.max_model_len}
    settings |= {"num_gpu_blocks_override": shape.pool_tokens // shape.block_tokens + 2}
    start = time.perf_counter()
    with connector(mode, shape.outside_gb) as transfer:
        if transfer is not None:
            settings["kv_transfer_config"] = {"kv_role": "kv_both", **transfer}
        llm = LLM(model, **settings)
        pipe.send(time.perf_counter() - start)
        while (order := pipe.recv()) is not None:
            prompts, num_tokens = order
            if not prompts:
                pipe.send(llm.reset_prefix_cache())
                continue
            sampling = SamplingParams(max_tokens=num_tokens, temperature=0, detokenize=False, ignore_eos=True)
            start = time.perf_counter()
            answers = llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
            pipe.send((seconds, [(list(of.outputs[0].token_ids), of.num_cached_tokens) for of in answers]))
        llm.llm_engine.engine_core.shutdown()  # At its end Python waits for vLLM's processes before it ends them.


class EngineGoneError(Exception):
    """An engine does not answer, or has ended. mode: whose it is."""

    def __init__(self, mode: Mode, why: str) -> None:
        super().__init__(f"{mode.name}: {why}")
        self.mode = mode


class Mode:
    """A mode's process, seen from here, once its engine is ready. EngineGoneError, from every method: it is no more."""

    def __init__(self, name: str, shape: EngineShape, timeout_seconds: float) -> None:
        self.name, self._timeout_seconds = name, timeout_seconds
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, shape))
        self._process.start()
        theirs.close()
        try:
            self.start_seconds: float = self._answer()
        except EngineGoneError:
            self.close()
            raise

    def run(self, prompts: list[Prompt], num_tokens: int = 1) -> tuple[float, list[Any]]:
        """Seconds, and each prompt's tokens and how many of its tokens were not computed."""
        answer: tuple[float, list[Any]] = self._ask(prompts, num_tokens)
        return answer

    def evict(self) -> None:
        """Empty vLLM's pool, as soon as nothing is being saved from it."""
        deadline = time.monotonic() + self._timeout_seconds
        while not self._ask([], 0):
            if time.monotonic() > deadline:
                raise EngineGoneError(self, "its blocks stay in use")
            time.sleep(0.1)

    def close(self) -> None:
        """End the engine, or kill it if it does not end."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)
            self._process.join(_END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            assert self._process.pid is not None
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()

    def _ask(self, prompts: list[Prompt], num_tokens: int) -> Any:
        try:
            self._pipe.send((prompts, num_tokens))
        except OSError as error:
            raise EngineGoneError(self, "it has ended") from error
        return self._answer()

    def _answer(self) -> Any:
        try:
            if self._pipe.poll(self._timeout_seconds):
                return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise EngineGoneError(self, "it has ended") from error
        raise EngineGoneError(self, f"no answer within {self._timeout_seconds} s")
