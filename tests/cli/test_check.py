from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvferry.cli import main
from kvferry.testing.connector import SCENARIOS

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = "folder_connector:FolderScheduler,FolderWorker"


@pytest.fixture
def in_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an author is, in the folder of the connector's module."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "folder_connector", raising=False)


@pytest.mark.usefixtures("in_examples")
def test_the_example_passes_in_all_scenarios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["check", EXAMPLE, "--option", f"folder={tmp_path}", "--persistent", "--chunk-tokens=32", "--block-tokens=8"]
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[3 : 3 + len(SCENARIOS)]] == list(SCENARIOS)
    assert "two-ranks        ok" in printed.out
    assert "no scenario failed" in printed.out
    assert [line.removesuffix(" ...") for line in printed.err.splitlines() if line.endswith(" ...")] == list(SCENARIOS)


@pytest.mark.usefixtures("in_examples")
def test_a_fault_is_exit_code_1_and_json_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", "--list"])
    assert "salt-ignored" in capsys.readouterr().out
    code = main(["check", "kvferry", "--option=l1_size_gb=0.01", "--scenario=restart", "--persistent", "--json"])
    assert code == 1
    report = json.loads(capsys.readouterr().out)
    assert [finding["fault"] for finding in report["scenarios"][0]["findings"]] == ["no-hit-after-restart"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no CONNECTOR is given"),
        (["no-such-preset"], "no connector preset 'no-such-preset'"),
        (["no_such_module:A,B"], "No module named 'no_such_module'"),
        (["kvferry.connector.persistent:A,B"], "has no class 'A'"),
        (["kvferry.connector.persistent:A"], "is not MODULE:SCHEDULER,WORKER"),
        (["kvferry", "--option", "l1_size_gb"], "--option 'l1_size_gb' is not KEY=VALUE"),
        (["kvferry", "--option", "l1_size_gb=many", "--scenario", "cold"], "l1_size_gb"),
        (["kvferry", "--scenario", "no-such"], "no scenario 'no-such'; there are cold,"),
        (["kvferry", "--chunk-tokens", "100"], "chunk_tokens=100 is not a multiple"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    told = [line for line in printed.err.splitlines() if line.startswith("kvferry check:")]
    assert len(told) == 1
    assert message in told[0]


def test_the_persistent_preset_is_checked_in_a_folder_that_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["check", "persistent", "--scenario", "short"]) == 0
    assert list(tmp_path.iterdir()) == []
