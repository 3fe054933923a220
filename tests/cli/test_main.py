from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import kvferry
from kvferry.cli import COMMANDS, main


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: kvferry {command}" in printed
    assert f"examples:\n  kvferry {command}" in printed


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["generate"], ["config", "extra"]])
def test_wrong_usage_is_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: kvferry")


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"kvferry {kvferry.__version__}\n"


def test_config_shows_values_and_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kvferry.yaml"
    path.write_text("chunk_tokens: 64\n")
    monkeypatch.setenv("KVFERRY_CONFIG_FILE", str(path))
    monkeypatch.setenv("KVFERRY_L1_SIZE_GB", "2")
    assert main(["config"]) == 0
    rows = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines()}
    assert rows["chunk_tokens"] == ["64", str(path)]
    assert rows["l1_size_gb"] == ["2.0", "KVFERRY_L1_SIZE_GB"]
    assert rows["disk_path"] == ["-", "default"]


def test_a_wrong_option_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVFERRY_L1_SIZE", "2")
    assert main(["config"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvferry config: unknown option 'l1_size'")
    assert captured.err.count("\n") == 1


def test_connectors_lists_presets_and_reasons(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvferry.connector import Preset, presets

    entries = {**presets(), "broken": Preset("no_such_connector", "S", "W")}
    monkeypatch.setattr(sys.modules["kvferry.connector.presets"], "_presets", entries)
    assert main(["connectors"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["kvferry"].endswith("importable")
    assert rows["persistent"].endswith("importable")
    assert "No module named 'no_such_connector'" in rows["broken"]


def test_a_reader_that_leaves_is_no_traceback() -> None:
    command = f"{sys.executable} -m kvferry connectors | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize(
    ("package", "argv"),
    [
        ("rich", ["demo"]),
        ("torch", ["generate", "m", "-p", "x"]),
        ("transformers", ["demo"]),
        ("fastapi", ["serve", "m"]),
    ],
)
def test_a_missing_extra_is_one_line_that_says_what_to_install(package: str, argv: list[str], tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
from kvferry.cli import main
sys.exit(main({argv!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install" in done.stderr
    assert package in done.stderr
    assert done.stderr.count("\n") == 1
