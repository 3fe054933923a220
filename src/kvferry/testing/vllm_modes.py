"""Real vLLM engines that take turns: each with a connector of its own, in a process of its own, driven over a pipe.

For benchmarks. Needs vLLM; what a mode's connector needs is started with it. Does not know what is made of the figures.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvferry.testing.servers import ServerProcess

_LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
_LLAMA |= {"max_position_embeddings": 131072, "rope_theta": 500000.0}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "head_dim": 128,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "small": {
        **_LLAMA,
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 40960,
    },
}
"""Models with random weights: of Llama 3 8B, for a GPU, and one that a CPU can do."""

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "PYTHONHASHSEED": "0",
    "LMCACHE_LOCAL_CPU": "True",
    "LMCACHE_CHUNK_SIZE": "256",
}
MODES = ("none", "native", "lmcache", "example", "kvferry", "server", "liar")
TIMES = ("cold", "pool", "outside")
BATCHES = ("new", "again")
LIKELIEST = 3
"""Tokens that are told of an answer. In bfloat16 a hit may swap the first two of them, if they are nearly as likely, as
its passes have other shapes than a cold run's; it does not bring in a token from behind the third."""

_WORKER = "kvferry.testing.vllm_worker"
_START_SECONDS, _END_SECONDS = 300.0, 30.0
Prompt = dict[str, list[int]]
Round = dict[str, dict[str, Any]]
"""By mode: seconds by their names, `hit_tokens`, and of one prompt `is_same`."""


@contextmanager
def connector(mode: str, outside_gb: float, folder: Path) -> Iterator[dict[str, Any] | None]:
    """vLLM's `kv_transfer_config` for a mode, with what it needs running. folder: in memory, for its files."""
    extra: dict[str, Any]
    match mode:
        case "none":
            yield None
        case "native":
            extra = {"cpu_bytes_to_use": int(outside_gb * 1e9)}
            yield {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": extra}
        case "example":
            extra = {"shared_storage_path": str(folder)}
            yield {"kv_connector": "ExampleConnector", "kv_connector_extra_config": extra}
        case "liar":
            extra = {"shared_storage_path": str(folder)}
            lying = {"kv_connector": "LyingConnector", "kv_connector_module_path": _WORKER}
            yield {**lying, "kv_connector_extra_config": extra}
        case "lmcache":
            os.environ["LMCACHE_MAX_LOCAL_CPU_SIZE"] = str(outside_gb)
            yield {"kv_connector": "LMCacheConnectorV1"}
        case "kvferry":
            extra = {"l1_size_gb": outside_gb, "arena_dir": str(folder / "arena")}
            yield {"kv_connector": "KVFerryConnector", "kv_connector_extra_config": extra}
        case "server":
            with ServerProcess(folder, "--l1-size-gb", str(outside_gb)) as server:
                extra = {"server_url": server.url}
                yield {"kv_connector": "KVFerryConnector", "kv_connector_extra_config": extra}
        case _:
            raise ValueError(f"there is no mode {mode!r}")


@dataclass(frozen=True)
class EngineShape:
    """What all engines are made with. model: a folder, or one of SHAPES. share: of the GPU's memory that one may have.
    outside_gb: memory of a connector."""

    model: str
    max_model_len: int
    pool_tokens: int
    block_tokens: int
    share: float
    outside_gb: float


@dataclass(frozen=True)
class Answer:
    """To one prompt. hit_tokens: of the prompt, not computed. likeliest: candidates for the first token, if it was the
    only one asked for."""

    tokens: list[int]
    hit_tokens: int
    likeliest: list[int]


@dataclass(frozen=True)
class Turn:
    """What a mode made of some prompts at once."""

    seconds: float
    answers: list[Answer]


@contextmanager
def engine(mode: str, shape: EngineShape, folder: Path) -> Iterator[Any]:
    """A mode's engine, in this process and those that vLLM starts. folder: as for `connector`."""
    import torch
    from vllm import LLM

    settings: dict[str, Any] = {"max_num_batched_tokens": 8192, "enforce_eager": True, "skip_tokenizer_init": True}
    settings |= {"max_model_len": shape.max_model_len, "worker_extension_cls": f"{_WORKER}.PoolWiper"}
    settings |= {"num_gpu_blocks_override": shape.pool_tokens // shape.block_tokens + 2}
    if torch.cuda.is_available():
        settings["gpu_memory_utilization"] = shape.share
    model = shape.model
    if model in SHAPES:
        model = str(folder / "model")
        Path(model).mkdir()
        Path(model, "config.json").write_text(json.dumps(SHAPES[shape.model]), encoding="utf-8")
        settings |= {"load_format": "dummy", "dtype": "bfloat16"}
    with connector(mode, shape.outside_gb, folder) as transfer:
        if transfer is not None:
            settings["kv_transfer_config"] = {"kv_role": "kv_both", **transfer}
        llm = LLM(model, **settings)
        yield llm
        llm.llm_engine.engine_core.shutdown()  # At its end Python waits for vLLM's processes before it ends them.


def answer(llm: Any, prompts: list[Prompt], num_tokens: int) -> Turn:
    """Greedily, all prompts at once."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=num_tokens, temperature=0, detokenize=False, ignore_eos=True)
    if num_tokens == 1:
        sampling.logprobs = LIKELIEST
    start = time.perf_counter()
    requests = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    outputs = [(request.outputs[0], request.num_cached_tokens) for request in requests]
    return Turn(seconds, [Answer(list(of.token_ids), hit, list((of.logprobs or [{}])[0])) for of, hit in outputs])


def empty_pool(llm: Any) -> bool:
    """Forget and zero what vLLM's pool has, or return False if some of it is in use.

    Zeroes destroy nothing that is still to be saved. Blocks that a connector holds while it saves them are in use. From
    others (OffloadingConnector's) it begins to save with one of the next steps: some are made here, and the worker
    waits for all that was begun before it writes. The prompt of these steps, shorter than a block, leaves nothing to
    save.
    """
    answer(llm, [{"prompt_token_ids": [1] * 8}], 4)
    if not llm.reset_prefix_cache():
        return False
    llm.collective_rpc("wipe_pool")
    return True


def serve(pipe: Any, mode: str, shape: EngineShape, folder: Path) -> None:
    """A mode's process: runs the prompts that come until None comes. folder: as for `connector`."""
    os.setsid()
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    start = time.perf_counter()
    with engine(mode, shape, folder) as llm:
        pipe.send(time.perf_counter() - start)
        while (order := pipe.recv()) is not None:
            prompts, num_tokens = order
            pipe.send(answer(llm, prompts, num_tokens) if prompts else empty_pool(llm))


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
        self._folder = Path(tempfile.mkdtemp(prefix="kvferry-mode-", dir="/dev/shm"))
        self._process = context.Process(target=serve, args=(theirs, name, shape, self._folder))
        self._process.start()
        theirs.close()
        try:
            self.start_seconds: float = self._answer(_START_SECONDS)
        except EngineGoneError:
            self.close()
            raise

    def run(self, prompts: list[Prompt], num_tokens: int) -> Turn:
        turn: Turn = self._ask(prompts, num_tokens)
        return turn

    def evict(self) -> None:
        """Empty vLLM's pool, as soon as nothing is being saved from it. What a hit finds from now on was loaded."""
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
        shutil.rmtree(self._folder, ignore_errors=True)  # what was killed may leave an arena

    def _ask(self, prompts: list[Prompt], num_tokens: int) -> Any:
        try:
            self._pipe.send((prompts, num_tokens))
        except OSError as error:
            raise EngineGoneError(self, "it has ended") from error
        return self._answer(self._timeout_seconds)

    def _answer(self, timeout_seconds: float) -> Any:
        try:
            if self._pipe.poll(timeout_seconds):
                return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise EngineGoneError(self, "it has ended") from error
        raise EngineGoneError(self, f"no answer within {timeout_seconds} s")


def take_turns(modes: list[Mode], prompts: list[Prompt], num_tokens: int, settle: float) -> dict[str, Turn]:
    """What each mode makes of the same prompts. settle: seconds that saves have afterwards."""
    turns = {mode.name: mode.run(prompts, num_tokens) for mode in random.sample(modes, len(modes))}
    time.sleep(settle)
    return turns


def measure_prompt(modes: list[Mode], prompt: Prompt, settle: float) -> Round:
    """Seconds of a new prompt cold, from the pool and from outside it, and tokens hit outside. is_same: the first token
    of each is among the cold run's likeliest."""
    turns = {name: take_turns(modes, [prompt], 1, settle) for name in TIMES[:2]}
    for mode in modes:
        mode.evict()
    turns["outside"] = take_turns(modes, [prompt], 1, settle)
    rows: Round = {}
    for mode in modes:
        of = {name: turns[name][mode.name] for name in TIMES}
        answers = {name: turn.answers[0] for name, turn in of.items()}
        rows[mode.name] = {name: turn.seconds for name, turn in of.items()}
        rows[mode.name]["hit_tokens"] = answers["outside"].hit_tokens
        rows[mode.name]["is_same"] = all(it.tokens[0] in answers["cold"].likeliest for it in answers.values())
    return rows


def measure_batch(modes: list[Mode], prompts: list[Prompt], num_tokens: int, settle: float) -> Round:
    """Seconds of new prompts at once, and of the same after all was evicted, and tokens hit then."""
    new = take_turns(modes, prompts, num_tokens, settle)
    for mode in modes:
        mode.evict()
    again = take_turns(modes, prompts, num_tokens, settle)
    hits = {name: sum(it.hit_tokens for it in turn.answers) for name, turn in again.items()}
    names = [mode.name for mode in modes]
    return {of: {"new": new[of].seconds, "again": again[of].seconds, "hit_tokens": hits[of]} for of in names}


def repeat(modes: list[Mode], num_rounds: int, measure: Callable[[], Round], rounds: list[Round]) -> None:
    """Add so many rounds. An engine that is gone is left out of `modes`, by which is measured, from then on."""
    while modes and len(rounds) < num_rounds:
        try:
            start = time.perf_counter()
            rounds.append(measure())
            print(f"  round {len(rounds)} of {num_rounds}: {time.perf_counter() - start:.1f} s", flush=True)
        except EngineGoneError as error:
            print(f"left out: {error}", flush=True)
            modes.remove(error.mode)
            error.mode.close()
