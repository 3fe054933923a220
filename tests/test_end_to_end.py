"""Identical tokens, wherever the KV comes from: nowhere, the pool, memory, a cache server that other engines filled, or
disk in a process that never saw it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, RequestOutput, SamplingParams
from kvferry.testing import models
from kvferry.testing.servers import ServerProcess

from .engine.conftest import make_prompt

BLOCK, CHUNK = 8, 16
LENGTHS = [CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + BLOCK - 1, CHUNK + BLOCK, CHUNK + BLOCK + 1, 3 * CHUNK, 3 * CHUNK + 1]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPTS = [make_prompt(length, seed=length) for length in LENGTHS]
POOL_TOKENS = 160
FILLER = make_prompt(POOL_TOKENS - 8, seed=99)


def make_llm(model: Path, *, chunked: bool, connector: KvCacheConnectorConfig | None, reuse: bool = True) -> LLM:
    pool = KvCacheConfig(
        tokens_per_block=BLOCK, max_tokens=POOL_TOKENS, enable_block_reuse=reuse, state_interval_tokens=CHUNK
    )
    return LLM(
        str(model),
        dtype="float32",
        kv_cache_config=pool,
        kv_connector_config=connector,
        max_num_tokens=24 if chunked else 256,
        enable_chunked_prefill=chunked,
    )


def connector(disk: Path, **options: Any) -> KvCacheConnectorConfig:
    known = {"chunk_tokens": CHUNK, "l1_size_gb": 0.02, "disk_path": str(disk), "disk_size_gb": 0.05}
    return KvCacheConnectorConfig(connector="kvferry", options=known | options)


def tokens(output: RequestOutput) -> list[int]:
    return list(output.token_ids)


FAMILIES = [family for family in models.FAMILIES if family != "lfm2"]  # lfm3 has its layers and more
WINDOWED = {"gemma3", "lfm3", "mistral"}
RECURRENT = {"granitemoehybrid", "lfm3"}


def can_be_loaded(length: int, family: str) -> int:
    """Tokens of a prompt that whole chunks hold, less the block of the last token, which is always computed; with
    windows or states less its chunk, as what they need is what was there at a chunk's end."""
    unit = CHUNK if family in WINDOWED | RECURRENT else BLOCK
    return min(length // CHUNK * CHUNK, (length - 1) // unit * unit)


CASES = [(family, chunked) for family in FAMILIES for chunked in (False, True)]


def case_name(case: tuple[str, bool]) -> str:
    return f"{case[0]}-{'chunked' if case[1] else 'whole'}"


def hit_on_disk(root: str) -> None:
    """What the other process does, for each case: generate every prompt, and print tokens and where KV came from."""
    answers = {}
    for family, chunked in CASES:
        disk = Path(root) / case_name((family, chunked))
        with make_llm(Path(root) / family, chunked=chunked, connector=connector(disk)) as llm:
            outputs = [llm.generate(prompt, PARAMS) for prompt in PROMPTS]
            assert llm.connector_manager is not None
            stats = llm.connector_manager.scheduler.stats()
        found = [[tokens(output), output.metrics.num_connector_tokens] for output in outputs]
        answers[case_name((family, chunked))] = [found, stats.get("load_tokens_disk", 0)]
    print(json.dumps(answers))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each family's model."""
    root = tmp_path_factory.mktemp("end-to-end")
    for family in FAMILIES:
        models.make_model(family, root / family)
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, list[list[int]]]:
    """Each family's tokens with every cache off."""
    answers = {}
    for family in FAMILIES:
        with make_llm(root / family, chunked=False, connector=None, reuse=False) as plain:
            answers[family] = [tokens(plain.generate(prompt, PARAMS)) for prompt in PROMPTS]
    return answers


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_tokens_are_the_same_cold_from_pool_and_from_memory(
    case: tuple[str, bool], root: Path, expected: dict[str, list[list[int]]]
) -> None:
    family, chunked = case
    disk = root / case_name(case)
    with make_llm(root / family, chunked=chunked, connector=connector(disk)) as llm:
        for prompt, length, wanted in zip(PROMPTS, LENGTHS, expected[family], strict=True):
            cold = llm.generate(prompt, PARAMS)
            pool = llm.generate(prompt, PARAMS)
            llm.generate(FILLER, PARAMS)
            memory = llm.generate(prompt, PARAMS)
            assert [tokens(output) for output in (cold, pool, memory)] == [wanted] * 3, f"{length} tokens"
            assert cold.metrics.num_computed_tokens == length
            unit = CHUNK if family in RECURRENT else BLOCK
            assert pool.metrics.num_pool_tokens == (length - 1) // unit * unit
            found = (memory.metrics.num_pool_tokens, memory.metrics.num_connector_tokens)
            if family in WINDOWED:  # what is behind a window is given back early, so the filler may push out less
                assert sum(found) >= can_be_loaded(length, family)
            else:
                assert found == (0, can_be_loaded(length, family))
        llm.check()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    with ServerProcess(folder, "--chunk-size", str(CHUNK), "--l1-size-gb", "0.02") as server:
        yield server


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_same_from_a_cache_server_that_another_engine_filled(
    family: str, root: Path, expected: dict[str, list[list[int]]], server: ServerProcess
) -> None:
    for chunked in (False, True):
        config = KvCacheConnectorConfig(
            connector="kvferry-server", server_url=server.url, options={"chunk_tokens": CHUNK}
        )
        with make_llm(root / family, chunked=chunked, connector=config, reuse=False) as llm:
            outputs = [llm.generate(prompt, PARAMS) for prompt in PROMPTS]
        assert [tokens(output) for output in outputs] == expected[family]
        found = [output.metrics.num_connector_tokens for output in outputs]
        assert found == ([can_be_loaded(length, family) for length in LENGTHS] if chunked else [0] * len(LENGTHS))


@pytest.fixture(scope="module")
def from_disk(root: Path) -> dict[str, Any]:
    """What a process finds that never saw the prompts."""
    for family, chunked in CASES:
        disk = root / case_name((family, chunked))
        if not disk.exists():  # when this test runs without those above
            with make_llm(root / family, chunked=chunked, connector=connector(disk)) as llm:
                llm.generate(PROMPTS, PARAMS)
    answer = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import hit_on_disk; hit_on_disk({str(root)!r})"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_tokens_are_the_same_from_disk_in_a_new_process(
    case: tuple[str, bool], expected: dict[str, list[list[int]]], from_disk: dict[str, Any]
) -> None:
    found, num_from_disk = from_disk[case_name(case)]
    wanted = expected[case[0]]
    loaded = [can_be_loaded(length, case[0]) for length in LENGTHS]
    assert found == [[one, num_loaded] for one, num_loaded in zip(wanted, loaded, strict=True)]
    # Where all layers slide, a chunk behind the window counts as loaded and needs no bytes from anywhere.
    assert num_from_disk == sum(loaded) - (CHUNK if case[0] == "mistral" else 0)
