"""Whatever breaks below the engine is a miss and one warning: every request is answered with the same tokens."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvferry import LLM, KvCacheConfig, KvCacheConnectorConfig, SamplingParams
from kvferry.testing.models import make_model

from .engine.conftest import make_prompt

BLOCK, CHUNK = 8, 32
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPTS = [make_prompt(100, seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("faults") / "model")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[tuple[int, ...]]:
    with LLM(str(model), kv_cache_config=KvCacheConfig(tokens_per_block=BLOCK, max_tokens=512)) as llm:
        return [llm.generate(prompt, PARAMS).token_ids for prompt in PROMPTS]


def make_llm(model: Path, disk: Path | None = None, l1_size_gb: float = 0.02) -> LLM:
    """An engine whose pool forgets each prompt, over a store of its own and a disk that may outlive it."""
    options = {"chunk_tokens": CHUNK, "l1_size_gb": l1_size_gb, "disk_path": str(disk) if disk else None}
    return LLM(
        str(model),
        kv_cache_config=KvCacheConfig(tokens_per_block=BLOCK, max_tokens=128, enable_block_reuse=False),
        kv_connector_config=KvCacheConnectorConfig(connector="kvferry", options=options),
    )


def generate_all(llm: LLM, expected: list[tuple[int, ...]]) -> int:
    """Generate every prompt, hold its tokens against those without a cache; returns the tokens that were loaded."""
    outputs = [llm.generate(prompt, PARAMS) for prompt in PROMPTS]
    assert [output.token_ids for output in outputs] == expected
    return sum(output.metrics.num_connector_tokens for output in outputs)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def parts(disk: Path) -> list[Path]:
    """The files of the disk tier that hold KV, largest kind first."""
    files = [path for path in disk.rglob("*") if path.is_file()]
    most = max(path.stat().st_size for path in files)
    return sorted(path for path in files if path.stat().st_size == most)


def test_a_full_store_evicts_and_goes_on(model: Path, expected: list[tuple[int, ...]]) -> None:
    part_bytes = 3 * 2 * 2 * CHUNK * 8 * 4
    with make_llm(model, l1_size_gb=8 * part_bytes / 1e9) as llm:
        generate_all(llm, expected)
        generate_all(llm, expected)
        assert llm.connector_manager is not None
        store = llm.connector_manager.scheduler._store
        stats = store.stats()
        store.check()
        assert llm.generate(PROMPTS[-1], PARAMS).metrics.num_connector_tokens > 0
    assert stats["evicted_entries"] > 0


def damage_bit(disk: Path) -> None:
    for path in parts(disk):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.write_bytes(data)


def truncate(disk: Path) -> None:
    for path in parts(disk):
        os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [damage_bit, truncate], ids=["flipped-bit", "truncated"])
def test_damaged_files_are_misses_and_removed(
    damage: Callable[[Path], None],
    model: Path,
    expected: list[tuple[int, ...]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with make_llm(model, tmp_path) as llm:
        generate_all(llm, expected)
    damage(tmp_path)
    damaged = {path: path.read_bytes() for path in parts(tmp_path)}
    caplog.clear()
    with make_llm(model, tmp_path) as llm:
        assert generate_all(llm, expected) == 0
        assert generate_all(llm, expected) > 0
        llm.check()
    assert len(warnings(caplog)) == 1, warnings(caplog)
    assert all(not path.exists() or path.read_bytes() != content for path, content in damaged.items())
    with make_llm(model, tmp_path) as llm:
        assert generate_all(llm, expected) > 0


def test_a_vanished_folder_is_a_miss(
    model: Path, expected: list[tuple[int, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk = tmp_path / "disk"
    with make_llm(model, disk) as llm:
        generate_all(llm, expected)
    with make_llm(model, disk) as llm:
        shutil.rmtree(disk)
        generate_all(llm, expected)
        assert generate_all(llm, expected) > 0
    assert 1 <= len(warnings(caplog)) <= 2, warnings(caplog)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options, again and again on one folder, and unmounts it in the end."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount, as root has it outside containers: {done.stderr.decode().strip()}")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", str(folder)], capture_output=True, check=False)


def test_a_full_disk_stops_taking_writes_and_is_one_warning(
    model: Path, expected: list[tuple[int, ...]], mount: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    disk = mount("size=64k")
    with make_llm(model, disk) as llm:
        generate_all(llm, expected)
        assert generate_all(llm, expected) > 0
        llm.check()
    assert len(warnings(caplog)) == 1, warnings(caplog)


def test_a_read_only_disk_is_read_and_is_one_warning(
    model: Path, expected: list[tuple[int, ...]], mount: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    disk = mount("size=64m")
    with make_llm(model, disk) as llm:
        assert generate_all(llm, expected) == 0
    assert warnings(caplog) == []
    mount("remount,ro")
    with make_llm(model, disk) as llm:
        assert generate_all(llm, expected) > 0
        llm.generate(make_prompt(100, seed=50), PARAMS)
    assert len(warnings(caplog)) == 1, warnings(caplog)
    mount("remount,rw")


def test_a_folder_that_cannot_be_made_leaves_memory(
    model: Path, expected: list[tuple[int, ...]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with make_llm(model, tmp_path / "file" / "disk") as llm:
        generate_all(llm, expected)
        assert generate_all(llm, expected) > 0
    assert len(warnings(caplog)) == 1, warnings(caplog)
