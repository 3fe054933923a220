"""Scripts written for TensorRT-LLM, run as a user runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvferry.testing.patience import ENGINE_COMMAND

SCRIPT = Path(__file__).with_name("trtllm_script.py")


def run(
    *arguments: str, command: Sequence[str] = (sys.executable, "-m", "kvferry"), **environment: str
) -> subprocess.CompletedProcess[str]:
    """command: in place of `kvferry`."""
    return subprocess.run(
        [command[0], "-W", "error::ResourceWarning", *command[1:], "trtllm-run", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_connector_runs_unchanged_and_engines_follow_each_other(
    num_ranks: int, tiny_model: Path, tmp_path: Path
) -> None:
    script = shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "blocks").mkdir()
    result = run(script, str(tiny_model), str(tmp_path / "blocks"), str(num_ranks), command=ENGINE_COMMAND)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "[TRT-LLM]" not in line]
    assert lines == ["loaded 0", "loaded 64", "same text True"]
    assert "[TRT-LLM] [I] 64 tokens are in the folder" in result.stdout
    assert "Warning" not in result.stderr
    assert "hook" not in result.stderr
    files = sorted((tmp_path / "blocks" / str(num_ranks - 1)).iterdir())
    assert len(files) == 8
    assert files[0].stat().st_size < 10_000, "a block and what torch.save adds, not the pool that the block is part of"


def test_a_script_runs_as_python_runs_it(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("NAME = 'beside the script'")
    text = """
import sys, neighbour
assert __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals()
print(sys.argv, sys.path[0], __file__, neighbour.NAME)
raise SystemExit(7)
"""
    script = write(tmp_path / "script.py", text)
    arguments = ["--help", "-x", "--", "--config", "a b"]
    result = run(script, *arguments)
    assert result.returncode == 7, result.stderr
    assert result.stdout == f"{[script, *arguments]} {tmp_path} {script} beside the script\n"


@pytest.mark.parametrize("error", ["RuntimeError", "ImportError", "KeyError", "BrokenPipeError"])
def test_the_script_s_own_errors_are_shown_without_our_frames(error: str, tmp_path: Path) -> None:
    script = write(tmp_path / "script.py", f"def fail():\n    raise {error}('mine')\nfail()\n")
    result = run(script)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == f'  File "{script}", line 3, in <module>'
    assert lines[-1].startswith(f"{error}: ")
    assert "kvferry" not in result.stderr


def test_what_is_no_script_is_an_error_of_one_line(tmp_path: Path) -> None:
    for path, reason in (
        (str(tmp_path / "missing.py"), "No such file"),
        (str(tmp_path), "Is a directory"),
        (write(tmp_path / "notes.md", "# What's this?\n\nNot Python."), "is not Python"),
        (write(tmp_path / "zeros", "\0"), "is not Python"),
    ):
        result = run(path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("kvferry trtllm-run: ")
        assert reason in result.stderr
        assert result.stderr.count("\n") == 1


def test_an_installed_tensorrt_llm_is_not_stood_in_for(tmp_path: Path) -> None:
    (tmp_path / "site" / "tensorrt_llm").mkdir(parents=True)
    (tmp_path / "site" / "tensorrt_llm" / "__init__.py").write_text("")
    script = write(tmp_path / "script.py", "print('ran')")
    result = run(script, PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), *sys.path]))
    assert (result.returncode, result.stdout) == (2, "")
    assert f"TensorRT-LLM itself is installed here: python {script}" in result.stderr


def test_an_engine_that_the_end_finds_running_ends_without_a_word(tiny_model: Path, tmp_path: Path) -> None:
    text = f"""
import atexit, time
from tensorrt_llm import LLM, SamplingParams
from tensorrt_llm.llmapi import KvCacheConnectorConfig
connector = KvCacheConnectorConfig(connector="kvferry", options={{"chunk_tokens": 32}})
llm = LLM({str(tiny_model)!r}, kv_connector_config=connector)
atexit.register(time.sleep, 0.3)  # by now no thread pool takes copies any more: passes would be complained of
llm.generate("a" * 600, SamplingParams(max_tokens=4))
running = llm.generate_async("b" * 600, SamplingParams(max_tokens=3000, ignore_eos=True))
next(iter(running))
print("over")
"""
    result = run(write(tmp_path / "script.py", text), command=ENGINE_COMMAND, KVFERRY_L1_SIZE_GB="0.1")
    assert (result.returncode, result.stdout) == (0, "over\n"), result.stderr
    assert "kvferry" not in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(Path(os.environ["KVFERRY_ARENA_DIR"]).iterdir())


@pytest.mark.skipif(
    "TRTLLM_EXAMPLE" not in os.environ,
    reason="needs NVIDIA's example: TRTLLM_EXAMPLE=.../llm_kv_cache_connector.py python -m pytest tests/cli",
)
def test_nvidia_s_example_runs_unchanged(tiny_model: Path) -> None:
    result = run(os.environ["TRTLLM_EXAMPLE"], str(tiny_model))
    assert result.returncode == 0, result.stderr
    assert "KV CONNECTOR: Matched 0 blocks" in result.stdout
    matched = result.stdout.rpartition("KV CONNECTOR: Matched ")[2]
    assert int(matched.split()[0]) > 10, "of a prompt of more than 400 characters, a token each"
