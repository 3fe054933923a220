"""What all tests share: no options from outside, arenas in a folder of their own, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import string
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("kvferry", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvferry")

collect_ignore = ["vllm"]
"""What runs in an environment of its own: `make test-vllm`."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-rounds", type=int, default=1, help="how often each row of test_server_faults.py runs")


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


@pytest.fixture(scope="session", autouse=True)
def be_patient(arena_folder: Path) -> Iterator[None]:
    """The machine may stand still for seconds: that makes no hook a slow one, and no answer one that does not come, in
    this process and in those that it starts. Tests of such limits set their own."""
    from kvferry.engine import ranks
    from kvferry.testing import patience

    with pytest.MonkeyPatch.context() as patch:
        patience.be_patient(patch.setattr)
        patch.setattr(ranks, "_START", patience.patient_start(ranks._START))
        patch.setattr(ranks, "_EXPLAIN_SECONDS", 10.0)
        for name, seconds in patience.DEADLINES.items():
            patch.setenv(name, seconds)
        yield


@pytest.fixture
def real_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test that is about them."""
    from kvferry.testing import patience

    patience.be_real(monkeypatch.setattr)
    for name in patience.DEADLINES:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a tokenizer of single characters."""
    import torch
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    characters = ["<unk>", "<s>", "</s>", *string.printable]
    backend = Tokenizer(WordLevel({text: index for index, text in enumerate(characters)}, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex("(?m)."), "isolated")
    backend.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
