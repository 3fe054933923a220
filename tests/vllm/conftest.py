"""Models, folders and answers that tests on real vLLM engines share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm_engines import Expected, running

from kvferry.testing import patience

_SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
}
_WINDOWS: dict[str, Any] = {
    "num_hidden_layers": 6,
    "sliding_window": 256,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}


@pytest.fixture(scope="session", autouse=True)
def _arena_folder() -> Iterator[None]:
    """Arenas of this run lie in a folder of their own, and none is left."""
    for name in [name for name in os.environ if name.startswith("KVFERRY_")]:
        del os.environ[name]
    folder = Path(tempfile.mkdtemp(prefix="kvferry-test-", dir="/dev/shm"))
    os.environ["KVFERRY_ARENA_DIR"] = str(folder)
    yield
    left = sorted(path.name for path in folder.iterdir())
    shutil.rmtree(folder)
    assert not left, f"arenas left behind: {left}"


@pytest.fixture(scope="session", autouse=True)
def _be_patient(_arena_folder: None) -> Iterator[None]:
    """The machine may stand still for seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patience.be_patient(patch.setattr)
        for name, seconds in patience.DEADLINES.items():
            patch.setenv(name, seconds)
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full attention alone."""
    from kvferry.testing.models import make_model

    return make_model("llama", tmp_path_factory.mktemp("llama"), **_SIZES)


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in three have a window: vLLM makes three groups of it."""
    from kvferry.testing.models import make_model

    return make_model("gemma3", tmp_path_factory.mktemp("gemma"), **_SIZES, **_WINDOWS)


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multi-head latent attention, all of its layers dense."""
    from kvferry.testing.models import make_model

    sizes = {**_SIZES, "head_dim": 64, "num_key_value_heads": 4}
    return make_model("deepseek_v2", tmp_path_factory.mktemp("deepseek"), **sizes)


@pytest.fixture(scope="session")
def expected() -> Expected:
    """What an engine without a connector and with room for everything answers. Asked once for each question."""
    known: dict[str, list[list[int]]] = {}

    def ask(model: Path, prompts: Sequence[Any], num_tokens: int) -> list[list[int]]:
        key = repr((model, prompts, num_tokens))
        if key not in known:
            with running(model, connector=False, num_gpu_blocks_override=300) as engine:
                known[key] = engine.generate(prompts, num_tokens)
        return known[key]

    return ask
