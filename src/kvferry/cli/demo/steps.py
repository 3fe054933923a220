"""Runs the demo's questions through engines and says where each prompt's KV came from. Prints nothing to the terminal.

The last steps run in processes of their own: `python -m kvferry.cli.demo.steps`, which reads a `Question` as JSON from
standard input and writes an `Answer`.
"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from kvferry.errors import EngineDeadError, InvariantError, KVFerryError

if TYPE_CHECKING:
    from kvferry import LLM


class Setting(msgspec.Struct, frozen=True):
    """What the demo runs with. The questions share `num_chunks` chunks; the pool is small: it holds one prompt.

    server_url: of the cache server that engines use instead of a store of their own.
    """

    model: str
    disk_path: str
    num_chunks: int = 7
    chunk_tokens: int = 256
    tokens_per_block: int = 32
    pool_tokens: int = 2048
    num_generated_tokens: int = 24
    arena_gb: float = 0.6
    disk_gb: float = 2.0
    server_url: str | None = None


class Question(msgspec.Struct, frozen=True):
    """What such a process is to do."""

    setting: Setting
    token_ids: list[int]


class Answer(msgspec.Struct, frozen=True):
    """What an engine did with a prompt. Tokens from pool, memory and disk and those computed are the prompt's."""

    num_pool_tokens: int
    num_memory_tokens: int
    num_disk_tokens: int
    num_computed_tokens: int
    ttft_seconds: float
    token_ids: list[int]
    text: str

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_pool_tokens + self.num_memory_tokens + self.num_disk_tokens + self.num_computed_tokens


def open_engine(setting: Setting, *, with_kvferry: bool = True, enable_block_reuse: bool = True) -> LLM:
    """An engine, without any connector or with kvferry's: in memory and on disk, or over a cache server.

    Float32 and, by default, greedy: so the same KV gives the same tokens.
    """
    from transformers.utils.logging import disable_progress_bar

    from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig

    disable_progress_bar()
    options: dict[str, Any] = {"chunk_tokens": setting.chunk_tokens}
    if setting.server_url is None:
        options |= {
            "l1_size_gb": setting.arena_gb,
            "disk_path": setting.disk_path,
            "disk_size_gb": setting.disk_gb,
        }
    connector = KvCacheConnectorConfig(
        connector="kvferry-server" if setting.server_url else "kvferry",
        server_url=setting.server_url,
        options=options,
    )
    return LLM(
        setting.model,
        kv_cache_config=KvCacheConfig(
            tokens_per_block=setting.tokens_per_block,
            max_tokens=setting.pool_tokens,
            enable_block_reuse=enable_block_reuse,
        ),
        kv_connector_config=connector if with_kvferry else None,
        max_batch_size=1,
        dtype="float32",
    )


def ask(llm: LLM, token_ids: list[int], num_tokens: int) -> Answer:
    """Put one prompt to the engine. Where loaded tokens lay before is read from the connector's own counters."""
    from kvferry import SamplingParams

    before = _load_counts(llm)
    output = llm.generate(token_ids, SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    from_memory, from_disk = (after - earlier for after, earlier in zip(_load_counts(llm), before, strict=True))
    metrics = output.metrics
    if from_memory + from_disk != metrics.num_connector_tokens:
        raise InvariantError(
            f"the engine took {metrics.num_connector_tokens} tokens from the connector, which counts "
            f"{from_memory} from memory and {from_disk} from disk"
        )
    assert metrics.ttft_seconds is not None, "a finished request had a first token"
    return Answer(
        num_pool_tokens=metrics.num_pool_tokens,
        num_memory_tokens=from_memory,
        num_disk_tokens=from_disk,
        num_computed_tokens=metrics.num_computed_tokens,
        ttft_seconds=metrics.ttft_seconds,
        token_ids=list(output.token_ids),
        text=output.text,
    )


def ask_in_new_process(question: Question) -> Answer:
    """EngineDeadError: the process failed; what it wrote to standard error went to ours."""
    command = [sys.executable, "-m", "kvferry.cli.demo.steps"]
    process = subprocess.run(command, input=msgspec.json.encode(question), stdout=subprocess.PIPE, check=False)
    if process.returncode:
        raise EngineDeadError(f"the process of another engine ended with exit code {process.returncode}")
    return msgspec.json.decode(process.stdout, type=Answer)


def _load_counts(llm: LLM) -> tuple[int, int]:
    """Tokens loaded so far from memory and from disk."""
    manager = llm.connector_manager
    scheduler: Any = manager.scheduler if manager is not None else None
    stats = scheduler.stats() if scheduler is not None else {}
    return int(stats.get("load_tokens_memory", 0)), int(stats.get("load_tokens_disk", 0))


def _main() -> None:
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    try:
        with open_engine(question.setting) as llm:
            answer = ask(llm, question.token_ids, question.setting.num_generated_tokens)
    except KVFerryError as error:
        sys.exit(f"kvferry demo, in another process: {error}")
    sys.stdout.buffer.write(msgspec.json.encode(answer))


if __name__ == "__main__":
    _main()
