"""The names of `tensorrt_llm` without TensorRT-LLM."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from kvferry.config import KvCacheConfig as OwnKvCacheConfig
from kvferry.connector.presets import presets
from kvferry.engine.sampling import SamplingParams
from kvferry.engine.sequence import Sequence, SequenceStatus
from kvferry.errors import ConfigError
from kvferry.integrations.trtllm_namespace import NAMES, ROOT, install
from kvferry.integrations.trtllm_shapes import Logger


@pytest.fixture(autouse=True)
def names() -> Iterator[None]:
    """Our names during the test."""
    finders = list(sys.meta_path)
    assert install()
    yield
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name.partition(".")[0] == ROOT]:
        del sys.modules[name]


def in_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("module", sorted(NAMES))
def test_every_name_of_the_table_is_there(module: str) -> None:
    found = import_module(module)
    assert found.__name__ == module
    for name in NAMES[module]:
        assert getattr(found, name) is not None
        assert name in dir(found)
        exec(f"from {module} import {name}")
    assert import_module(module) is found


def test_a_request_tells_its_state_in_the_names_of_tensorrt_llm() -> None:
    states = import_module("tensorrt_llm.bindings").LlmRequestState
    request = Sequence(1, [5, 6, 7], SamplingParams())
    assert request.state is states.CONTEXT_INIT
    request.status = SequenceStatus.LOADING
    assert request.state is states.DISAGG_GENERATION_TRANS_IN_PROGRESS
    request.status = SequenceStatus.RUNNING
    assert request.state is states.CONTEXT_INIT
    request.tokens.append(8)
    assert request.state is states.GENERATION_IN_PROGRESS
    request.status = SequenceStatus.FINISHED
    assert request.state is states.GENERATION_COMPLETE


def test_names_mean_what_they_mean_in_kvferry() -> None:
    from kvferry import KvCacheConnectorConfig
    from kvferry.connector import KvCacheConnectorWorker

    old, new = (
        import_module(f"tensorrt_llm._torch.pyexecutor.{where}kv_cache_connector") for where in ("", "connectors.")
    )
    assert old.KvCacheConnectorWorker is new.KvCacheConnectorWorker is KvCacheConnectorWorker
    assert import_module("tensorrt_llm").SamplingParams is SamplingParams
    assert import_module("tensorrt_llm.llmapi.llm_args").KvCacheConnectorConfig is KvCacheConnectorConfig


@pytest.mark.parametrize("before", ["from tensorrt_llm import logger", "import tensorrt_llm.logger", ""])
def test_the_logger_is_an_object_and_in_a_module_of_its_name(before: str) -> None:
    exec(before)
    from tensorrt_llm.logger import logger

    assert import_module("tensorrt_llm").logger is logger
    assert isinstance(logger, logging.Logger)


def test_a_missing_name_is_an_error_that_lists_what_is_there() -> None:
    import tensorrt_llm.llmapi as module

    there = r"tensorrt_llm.llmapi has no '{}'; it has: CompletionOutput, KvCacheConfig, .*TorchLlmArgs, llm_args$"
    with pytest.raises(ImportError, match=there.format("BuildConfig")):
        from tensorrt_llm.llmapi import BuildConfig  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=there.format("mpi_session")):
        import tensorrt_llm.llmapi.mpi_session
    with pytest.raises(AttributeError, match=there.format("BuildConfig")):
        _ = module.BuildConfig
    with pytest.raises(ModuleNotFoundError, match=r"tensorrt_llm has no 'models'"):
        import tensorrt_llm.models.llama  # noqa: F401


def test_nothing_is_loaded_before_it_is_asked_for() -> None:
    code = """
import sys
from kvferry.integrations.trtllm_namespace import install
assert install() and install()
import tensorrt_llm.llmapi.llm_args, tensorrt_llm._torch.pyexecutor.connectors.kv_cache_layout
print(not {"torch", "transformers", "msgspec"} & sys.modules.keys())
from tensorrt_llm import logger, mpi_rank
from tensorrt_llm._torch.pyexecutor.kv_cache_connector import KvCacheConnectorScheduler
from tensorrt_llm.llmapi import KvCacheConfig, TorchLlmArgs
print(mpi_rank(), "torch" in sys.modules)
"""
    assert in_python(code) == "True\n0 False\n"


def test_an_installed_tensorrt_llm_is_never_shadowed(tmp_path: Path) -> None:
    package = tmp_path / "tensorrt_llm"
    package.mkdir()
    (package / "__init__.py").write_text("MARK = 'the real one'")
    code = f"""
import sys
from kvferry.integrations.trtllm_namespace import install
{{before}}
sys.path.insert(0, {str(tmp_path)!r})
print(install())
import tensorrt_llm
print(tensorrt_llm.MARK, install())
try:
    import tensorrt_llm.llmapi
except ModuleNotFoundError as error:
    print(error)
"""
    missing = "No module named 'tensorrt_llm.llmapi'\n"
    assert in_python(code.format(before="")) == f"False\nthe real one False\n{missing}"
    # Also if it comes into sight later: the finder is the last to be asked.
    assert in_python(code.format(before="install()")) == f"True\nthe real one False\n{missing}"


def test_options_of_tensorrt_llm_are_taken_or_refused() -> None:
    from tensorrt_llm.llmapi import LLM, KvCacheConfig

    config = KvCacheConfig(tokens_per_block=16, enable_partial_reuse=False, use_kv_cache_manager_v2="auto")
    assert isinstance(config, OwnKvCacheConfig)
    assert config.tokens_per_block == 16
    for options, words in (
        ({"host_cache_size": 1 << 30}, ["'host_cache_size'", "<= 0"]),
        ({"use_kv_cache_manager_v2": 3}, ["'use_kv_cache_manager_v2'"]),
        ({"dtype": "fp8"}, ["unknown option 'dtype' of KvCacheConfig", "known: tokens_per_block, ", "max_tokens"]),
    ):
        with pytest.raises(ConfigError) as caught:
            KvCacheConfig(**options)
        assert all(word in str(caught.value) for word in words)
    for options, words in (
        ({"backend": "tensorrt"}, ["'backend' of LLM is 'tensorrt'", "pytorch"]),
        ({"pipeline_parallel_size": 2}, ["'pipeline_parallel_size'", "<= 1"]),
        ({"kv_cache_config": {"max_token": 1}}, ["under kv_cache_config", "'max_tokens'"]),
        ({"moe_expert_parallel_size": 2}, ["unknown option 'moe_expert_parallel_size'", "known: kv_cache_config, "]),
    ):
        with pytest.raises(ConfigError) as caught:
            LLM("no-such-model", **options)
        assert all(word in str(caught.value) for word in words)


def test_a_salt_is_an_argument_of_generate(tiny_model: Path) -> None:
    from tensorrt_llm import LLM, SamplingParams
    from tensorrt_llm.llmapi import KvCacheConfig

    with LLM(tiny_model, backend="pytorch", kv_cache_config=KvCacheConfig(max_tokens=512), max_seq_len=128) as llm:
        outputs = [llm.generate("a" * 70, cache_salt=salt, use_tqdm=False) for salt in (None, None, "x", "x")]
        many = llm.generate(["a" * 70] * 2, [SamplingParams(max_tokens=2)] * 2, cache_salt="x")
    assert [output.metrics.num_pool_tokens for output in outputs] == [0, 64, 0, 64]
    assert [output.metrics.num_pool_tokens for output in many] == [64, 64]


def test_the_registry_is_our_presets() -> None:
    from tensorrt_llm._torch.pyexecutor.connectors.registry import CONNECTOR_REGISTRY

    assert CONNECTOR_REGISTRY.keys() == presets().keys()
    assert CONNECTOR_REGISTRY["lmcache"] == {
        "connector_module": "lmcache.integration.tensorrt_llm.tensorrt_adapter",
        "connector_scheduler_class": "LMCacheKvConnectorScheduler",
        "connector_worker_class": "LMCacheKvConnectorWorker",
    }


def test_the_logger_says_words_and_formats_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    logger = Logger()
    logger.info("KV of %d tokens", 3)
    logger.info("100% of", 3, "tokens")  # noqa: PLE1205 - TensorRT-LLM's logger takes words
    logger.debug("not shown")
    logger.set_level("debug")
    logger.debug("shown")
    logger.set_level("warning")
    logger.info("not shown")
    for _ in range(2):
        logger.warning_once("said", key="once")
        logger.info_once("not shown")
    logger.error("bad")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("[TRT-LLM] ")[2] for line in lines] == [
        "[I] KV of 3 tokens",
        "[I] 100% of 3 tokens",
        "[D] shown",
        "[W] said",
        "[E] bad",
    ]
