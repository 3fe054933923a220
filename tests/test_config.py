from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import pytest

from kvferry.config import (
    EngineOptions,
    KvCacheConfig,
    KvCacheConnectorConfig,
    StoreOptions,
    explain_options,
    load_options,
    read_engine_yaml,
)
from kvferry.errors import ConfigError


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_need_no_source() -> None:
    assert load_options({}, {}) == StoreOptions()
    assert {setting.source for setting in explain_options({}, {})} == {"default"}
    assert all(setting.description for setting in explain_options({}, {}))


def test_the_nearest_source_wins_and_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "kvferry.yaml", "chunk_tokens: 64\nl1_size_gb: 2\neviction_policy: s3fifo\n")
    environ = {"KVFERRY_CONFIG_FILE": path, "KVFERRY_L1_SIZE_GB": "3.5", "KVFERRY_DISK_THREADS": "4", "OTHER": "x"}
    settings = {setting.name: setting for setting in explain_options({"disk_threads": 8}, environ)}
    found = {name: (setting.value, setting.source) for name, setting in settings.items()}
    assert found["chunk_tokens"] == (64, path)
    assert found["eviction_policy"] == ("s3fifo", path)
    assert found["l1_size_gb"] == (3.5, "KVFERRY_L1_SIZE_GB")
    assert found["disk_threads"] == (8, "argument")
    assert found["log_level"] == ("warning", "default")
    assert list(settings) == [field.name for field in dataclasses.fields(StoreOptions)]
    assert load_options({"disk_threads": 8}, environ).l1_size_gb == 3.5


def test_the_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVFERRY_CHUNK_TOKENS", "128")
    assert load_options().chunk_tokens == 128


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load_options({}, {"KVFERRY_DISK_PATH": "", "KVFERRY_CONFIG_FILE": ""}) == StoreOptions()


def test_folders_may_be_paths_and_begin_at_home(tmp_path: Path) -> None:
    assert StoreOptions(disk_path=tmp_path).disk_path == str(tmp_path)  # type: ignore[arg-type]
    assert load_options({}, {"KVFERRY_DISK_PATH": "~/kv"}).disk_path == str(Path("~/kv").expanduser())


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        ({"chunk_token": 1}, {}, ["'chunk_token'", "argument", "'chunk_tokens'"]),
        ({}, {"KVFERRY_L1_SIZE": "1"}, ["'l1_size'", "environment", "'l1_size_gb'"]),
        ({"zzz": 1}, {}, ["'zzz'", "known: chunk_tokens, "]),
        ({"chunk_tokens": "256"}, {}, ["'chunk_tokens'", "argument", "'256'", "`int`"]),
        ({"chunk_tokens": True}, {}, ["'chunk_tokens'", "`int`"]),
        ({"chunk_tokens": 0}, {}, ["'chunk_tokens'", "0", ">= 1"]),
        ({"l1_size_gb": 0}, {}, ["'l1_size_gb'", "> 0"]),
        ({"disk_size_gb": -1.0}, {}, ["'disk_size_gb'", "-1.0", "> 0"]),
        ({"l1_size_gb": math.inf}, {}, ["'l1_size_gb'", "finite"]),
        ({"l1_size_gb": math.nan}, {}, ["'l1_size_gb'"]),
        ({"eviction_policy": "fifo"}, {}, ["'eviction_policy'", "lru, s3fifo"]),
        ({}, {"KVFERRY_DISK_THREADS": "many"}, ["'disk_threads'", "KVFERRY_DISK_THREADS", "'many'", "`int`"]),
        ({}, {"KVFERRY_LOAD_DEADLINE_SECONDS": "-1"}, ["KVFERRY_LOAD_DEADLINE_SECONDS", ">= 0"]),
        ({}, {"KVFERRY_CONFIG_FILE": "/no/such/file"}, ["/no/such/file", "No such file"]),
    ],
)
def test_a_wrong_option_is_named_with_its_source(
    arguments: dict[str, Any], environ: dict[str, str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_options(arguments, environ)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chunk_tokns: 1", ["'chunk_tokns'", "'chunk_tokens'"]),
        ("chunk_tokens: many", ["'chunk_tokens'", "'many'", "`int`"]),
        ("- chunk_tokens", ["no mapping"]),
        ("1: 2", ["no mapping"]),
        ("a: [", ["not YAML"]),
        ("!!python/object/apply:os.getcwd []", ["not YAML"]),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path / "options.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_options({}, {"KVFERRY_CONFIG_FILE": path})
    for word in [path, *words]:
        assert word in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not YAML"):
        load_options({}, {"KVFERRY_CONFIG_FILE": str(path)})


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert load_options({}, {"KVFERRY_CONFIG_FILE": write(tmp_path / "empty.yaml", "# nothing\n")}) == StoreOptions()


@pytest.mark.parametrize("make", [StoreOptions, KvCacheConfig])
def test_objects_check_their_values_too(make: Any) -> None:
    field = dataclasses.fields(make)[0].name
    with pytest.raises(ConfigError, match=f"'{field}' of {make.__name__} is 0: expected `int` >= 1"):
        make(**{field: 0})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["neither", "connector_module"]),
        ({"connector": "kvferry", "connector_module": "m"}, ["'kvferry'", "preset", "connector_module"]),
        ({"connector_module": "m"}, ["without connector_scheduler_class and connector_worker_class"]),
        (
            {"connector_module": "m", "connector_worker_class": "W"},
            ["connector_module and connector_worker_class", "without connector_scheduler_class"],
        ),
        ({"connector": 3}, ["'connector'", "3"]),
    ],
)
def test_a_connector_is_a_preset_or_three_names(arguments: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        KvCacheConnectorConfig(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_complete_connectors_are_taken() -> None:
    assert KvCacheConnectorConfig(connector="kvferry", options={"chunk_tokens": 64}).options == {"chunk_tokens": 64}
    explicit = KvCacheConnectorConfig(connector_module="m", connector_scheduler_class="S", connector_worker_class="W")
    assert explicit.connector is None


def test_an_engine_file_gives_the_arguments_of_an_engine(tmp_path: Path) -> None:
    path = write(
        tmp_path / "engine.yaml",
        """
kv_cache_config:
  tokens_per_block: 16
  enable_block_reuse: false
kv_connector_config:
  connector: persistent
  options: {folder: /data/kv}
max_batch_size: 4
enable_chunked_prefill: false
""",
    )
    assert read_engine_yaml(path) == {
        "kv_cache_config": KvCacheConfig(tokens_per_block=16, enable_block_reuse=False),
        "kv_connector_config": KvCacheConnectorConfig(connector="persistent", options={"folder": "/data/kv"}),
        "max_batch_size": 4,
        "enable_chunked_prefill": False,
    }


def test_options_of_tensorrt_llm_that_change_nothing_are_checked_and_left_out(tmp_path: Path) -> None:
    text = """
backend: pytorch
cuda_graph_config: null
disable_overlap_scheduler: true
pipeline_parallel_size: 1
max_seq_len: 2048
kv_cache_config:
  enable_partial_reuse: false
  free_gpu_memory_fraction: 0.8
  max_attention_window: [1024, 4096]
"""
    assert read_engine_yaml(write(tmp_path / "engine.yaml", text)) == {
        "max_seq_len": 2048,
        "kv_cache_config": KvCacheConfig(free_gpu_memory_fraction=0.8, max_attention_window=(1024, 4096)),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("backend: tensorrt", ["'backend'", "pytorch"]),
        ("cuda_graph_config: true", ["'cuda_graph_config'"]),
        ("kv_cache_config: {enable_partial_reuse: 1}", ["under kv_cache_config", "'enable_partial_reuse'"]),
        ("kv_cache_config: {free_gpu_memory_fraction: 1.5}", ["'free_gpu_memory_fraction'", "<= 1"]),
        ("moe_config: {}", ["'moe_config'", "known: kv_cache_config, ", "backend"]),
        ("max_batchsize: 1", ["'max_batchsize'", "'max_batch_size'"]),
        ("kv_cache_config: {token_per_block: 1}", ["under kv_cache_config", "'tokens_per_block'"]),
        ("kv_cache_config: {tokens_per_block: 0}", ["under kv_cache_config", ">= 1"]),
        ("kv_cache_config: null", ["'kv_cache_config'"]),
        ("kv_connector_config: {connector: a, connector_module: b}", ["under kv_connector_config", "preset"]),
        ("max_num_tokens: lots", ["'max_num_tokens'", "'lots'", "`int`"]),
    ],
)
def test_a_wrong_engine_file_is_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    path = write(tmp_path / "engine.yaml", text)
    with pytest.raises(ConfigError) as caught:
        read_engine_yaml(path)
    for word in [path, *words]:
        assert word in str(caught.value)


def test_engine_options_are_the_arguments_of_the_engine() -> None:
    from kvferry.engine.llm import LLM

    parameters = [
        parameter
        for parameter in inspect.signature(LLM.__init__).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    assert [parameter.name for parameter in parameters] == [field.name for field in dataclasses.fields(EngineOptions)]
    defaults = EngineOptions()
    for parameter in parameters:
        if parameter.default is not None:
            assert parameter.default == getattr(defaults, parameter.name)
