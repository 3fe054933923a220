"""What all tests share: no options from outside, arenas in a folder of their own, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("kvferry", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvferry")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device; on a machine with one: python -m pytest -m gpu")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def arena_folder() -> Iterator[Path]:
    """Where arenas of this run lie, so that runs side by side do not meet. Tests clean up after themselves."""
    for name in [name for name in os.environ if name.startswith("KVFERRY_")]:
        del os.environ[name]
    folder = Path(tempfile.mkdtemp(prefix="kvferry-test-", dir="/dev/shm"))
    os.environ["KVFERRY_ARENA_DIR"] = str(folder)
    threads = set(threading.enumerate())
    yield folder
    del os.environ["KVFERRY_ARENA_DIR"]
    arenas = sorted(path.name for path in folder.iterdir())
    shutil.rmtree(folder)
    # tqdm, which transformers uses, keeps a monitor thread.
    left = [thread for thread in set(threading.enumerate()) - threads if type(thread).__name__ != "TMonitor"]
    assert not arenas, f"arenas left behind: {arenas}"
    assert not left, f"threads left behind: {left}"
