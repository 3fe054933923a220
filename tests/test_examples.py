from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_folder_connector_hits_in_a_second_run(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "folder_connector.py"), str(tiny_model), str(tmp_path / "blocks")]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines() for _ in range(2)
    )
    assert first[-1] == "0 of 687 prompt tokens were loaded"
    assert second[-1] == "672 of 687 prompt tokens were loaded"
    assert first[:-1] == second[:-1]
