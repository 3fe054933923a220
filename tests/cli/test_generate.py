from __future__ import annotations

import io
from pathlib import Path

import pytest

from kvferry.cli import main


def generate(model: Path, *arguments: str, prompt: str = "hello there") -> int:
    return main(["generate", str(model), "-p", prompt, "--max-tokens", "8", "--dtype", "float32", *arguments])


@pytest.fixture
def engine_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "engine.yaml"
    folder = tmp_path / "kv"
    path.write_text(
        "kv_cache_config: {tokens_per_block: 4, max_tokens: 256}\n"
        f"kv_connector_config: {{connector: persistent, options: {{folder: {folder}}}}}\n"
    )
    return path


def test_text_goes_to_stdout_and_metrics_to_stderr(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tiny_model, "--ignore-eos") == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("\n")
    assert "prompt 11 tokens (0 from the pool, 0 from the connector, 11 computed)" in captured.err
    assert "8 tokens in" in captured.err


def test_a_second_run_hits_what_the_first_left(
    tiny_model: Path, engine_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for matched in (0, 8):
        assert generate(tiny_model, "--config", str(engine_yaml), "--ignore-eos") == 0
        captured = capsys.readouterr()
        assert f"{matched} from the connector, {11 - matched} computed" in captured.err
        printed.append(captured.out)
    assert printed[0] == printed[1]


def test_a_prompt_is_read_from_stdin(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("abcde"))
    assert generate(tiny_model, prompt="-") == 0
    assert "prompt 5 tokens" in capsys.readouterr().err


def test_chat_puts_the_prompt_into_the_template(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tiny_model, "--chat", "--connector", "kvferry", prompt="hi") == 0
    plain = len("<s>user\nhi</s><s>assistant\n")
    num_tokens = plain - 2 * len("<s>") - len("</s>") + 3
    assert f"prompt {num_tokens} tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-tokens", "0"], "max_tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--connector", "kvfery"], "known: kvbm, kvferry"),
        (["--config", "/no/such/engine.yaml"], "/no/such/engine.yaml"),
        (["--dtype", "int3"], "int3"),
        (["--device", "quantum"], "quantum"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tiny_model: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(tiny_model, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvferry generate: ")
    assert words in captured.err


def test_a_path_that_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_an_unknown_key_of_the_engine_file_is_named(
    tiny_model: Path, engine_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine_yaml.write_text("max_batchsize: 4\n")
    assert generate(tiny_model, "--config", str(engine_yaml)) == 2
    assert "did you mean 'max_batch_size'?" in capsys.readouterr().err
