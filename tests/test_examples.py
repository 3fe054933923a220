from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_persistent_connector_hits_in_a_second_run(tiny_model: Path, tmp_path: Path) -> None:
    printed = [
        subprocess.run(
            [
                sys.executable,
                str(EXAMPLES / "persistent_connector.py"),
                str(tiny_model),
                str(tmp_path / "kv"),
                "a" * 70,
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    ]
    assert "70 prompt tokens: 0 loaded" in printed[0]
    assert "70 prompt tokens: 64 loaded" in printed[1]
    assert printed[0].splitlines()[:-1] == printed[1].splitlines()[:-1]
