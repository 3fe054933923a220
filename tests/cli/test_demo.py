from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from kvferry.cli import demo, main
from kvferry.cli.demo import document
from kvferry.cli.demo.report import Step, make_table
from kvferry.cli.demo.steps import Answer, Setting
from kvferry.testing.servers import PATIENT


def answer(ttft_seconds: float, pool: int = 0, memory: int = 0, disk: int = 0, computed: int = 12) -> Answer:
    return Answer(pool, memory, disk, computed, ttft_seconds, [1, 2], "text")


def test_the_prompts_share_the_document_and_nothing_else(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = document.make_prompts(tokenizer, 600)
    assert prompts.num_shared_tokens >= 600
    assert len({tuple(tokens) for tokens in prompts.token_ids}) == len(document.QUESTIONS) == len(demo.STEPS)
    for tokens in prompts.token_ids:
        assert tokens[: prompts.num_shared_tokens] == prompts.token_ids[0][: prompts.num_shared_tokens]
        assert tokenizer.decode(tokens).count("language reference") == 1
    text = tokenizer.decode(prompts.token_ids[0][: prompts.num_shared_tokens])
    assert text.rstrip().split("</s>")[0].endswith((".", ":"))


def test_a_document_too_short_is_said(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="too short"):
        document.make_prompts(AutoTokenizer.from_pretrained(tiny_model), 10_000_000)


def test_every_place_gives_the_same_tokens(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_CONNECT_DEADLINE_SECONDS", str(PATIENT["connect_deadline_seconds"]))
    setting = Setting(
        str(tiny_model), str(tmp_path), num_chunks=4, chunk_tokens=64, pool_tokens=384, num_generated_tokens=4
    )
    results = demo._run_steps(setting, Console(quiet=True))
    assert [step.name for step in results] == list(demo.STEPS)
    assert all(step.is_same for step in results)
    cold, pool, memory, disk, server = (step.answer for step in results)
    assert cold.num_computed_tokens == cold.num_prompt_tokens
    assert pool.num_pool_tokens >= 256
    assert memory.num_memory_tokens == disk.num_disk_tokens == server.num_memory_tokens >= 256
    assert memory.num_memory_tokens + memory.num_computed_tokens == memory.num_prompt_tokens
    assert disk.num_disk_tokens + disk.num_computed_tokens == disk.num_prompt_tokens
    assert server.num_memory_tokens + server.num_computed_tokens == server.num_prompt_tokens


def test_the_chart_is_saved_where_it_is_said(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_run_steps", lambda *_: [Step("1 cold", "Why?", answer(2.0), is_same=True)])
    assert main(["demo", "--model", str(tiny_model), "--out", str(tmp_path / "a" / "b")]) == 0
    assert (tmp_path / "a" / "b" / "ttft.png").read_bytes().startswith(b"\x89PNG")
    assert "ttft.png" in capsys.readouterr().out


def test_a_difference_is_shown_and_exit_code_1(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [Step("1 cold", "Why?", answer(2.0), is_same=True), Step("2 pool", "How?", answer(0.5), is_same=False)]
    monkeypatch.setattr(demo, "_run_steps", lambda *_: results)
    assert main(["demo", "--model", str(tiny_model), "--out", str(tmp_path)]) == 1
    assert "NO" in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.startswith("kvferry demo: --out")


def test_the_table_fits_a_narrow_terminal() -> None:
    results = [
        Step(name, "q", answer(4.0 / (i + 1), *(1792 if i == j else 0 for j in (1, 2, 3))), is_same=True)
        for i, name in enumerate(demo.STEPS)
    ]
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(make_table(results))
    lines = capture.get().splitlines()
    for name in demo.STEPS:
        assert sum(name in line and line.rstrip().endswith("yes") for line in lines) == 1
    assert "4.0x" in capture.get()
