"""The house rules that no tool checks: budgets, names, the list of options, what an import may cost."""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import kvferry
from kvferry import config, connector

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PYTHON_FILES = [path for folder in ("src", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
TEXT_FILES = [
    *PYTHON_FILES,
    *(ROOT / "docs").rglob("*.md"),
    *(path for path in ROOT.iterdir() if path.suffix in {".md", ".toml", ".txt"}),
    ROOT / "Makefile",
    ROOT / ".ci" / "run",
]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 6
MAX_BENCHMARK_LINES = 165
MAX_CODE_LINES = 13_500

FORBIDDEN_NAME = re.compile(r"utils?|common|helpers?|misc|v\d+|new|legacy|simple")

OPTIONS = {
    "StoreOptions": [
        "chunk_tokens",
        "l1_size_gb",
        "eviction_policy",
        "arena_dir",
        "disk_path",
        "disk_size_gb",
        "disk_threads",
        "async_load",
        "async_load_bytes",
        "load_when",
        "max_load_bytes_in_flight",
        "load_deadline_seconds",
        "close_deadline_seconds",
        "server_url",
        "server_key",
        "client_secret",
        "connect_deadline_seconds",
        "match_deadline_seconds",
        "job_deadline_seconds",
        "log_level",
    ],
    "KvCacheConfig": [
        "tokens_per_block",
        "max_tokens",
        "free_gpu_memory_fraction",
        "max_attention_window",
        "enable_block_reuse",
        "state_interval_tokens",
        "max_loading_share",
        "transfer_deadline_seconds",
    ],
    "KvCacheConnectorConfig": [
        "connector",
        "connector_module",
        "connector_scheduler_class",
        "connector_worker_class",
        "server_url",
        "options",
    ],
    "EngineOptions": [
        "kv_cache_config",
        "kv_connector_config",
        "tensor_parallel_size",
        "rank_timeout_seconds",
        "max_seq_len",
        "max_batch_size",
        "max_num_tokens",
        "enable_chunked_prefill",
        "dtype",
        "device",
    ],
    "IgnoredKvCacheOptions": [
        "enable_partial_reuse",
        "copy_on_partial_reuse",
        "use_kv_cache_manager_v2",
        "host_cache_size",
    ],
    "IgnoredEngineOptions": [
        "backend",
        "cuda_graph_config",
        "disable_overlap_scheduler",
        "trust_remote_code",
        "pipeline_parallel_size",
    ],
}

PUBLIC_NAMES = {
    "LLM",
    "KVFerryError",
    "KvCacheConfig",
    "KvCacheConnectorConfig",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StoreOptions",
    "__version__",
}

PUBLIC_CONNECTOR_NAMES = {
    "NO_BLOCK",
    "ConnectorClasses",
    "KvCacheConnectorConfig",
    "KvCacheConnectorManager",
    "KvCacheConnectorScheduler",
    "KvCacheConnectorWorker",
    "LlmArgs",
    "Preset",
    "Request",
    "RequestData",
    "SchedulerOutput",
    "presets",
    "register_preset",
    "resolve",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def count_code_lines(path: Path) -> int:
    source = path.read_text(encoding="utf-8")
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in silent]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - docstrings)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def argument_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in {"self", "cls"}]


def in_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_is_small_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE_LINES
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), "a module says what it does"
        assert "from __future__ import annotations" in text or len(ast.parse(text).body) == 1


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_are_small(path: Path) -> None:
    for function in functions(path):
        assert function.end_lineno is not None
        assert function.end_lineno - function.lineno < MAX_FUNCTION_LINES, function.name


# Signatures that someone else decided, and the engine's door, whose keywords are `config.EngineOptions`.
FOREIGN_SIGNATURES = {("engine/attention.py", "paged_attention"), ("engine/llm.py", "__init__")}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_take_few_arguments(path: Path) -> None:
    module = str(path.relative_to(ROOT / "src" / "kvferry"))
    for function in functions(path):
        if (module, function.name) not in FOREIGN_SIGNATURES:
            assert len(argument_names(function)) <= MAX_ARGUMENTS, function.name


def test_all_sources_together_fit_in_one_head() -> None:
    """Lines of code, which comments and docstrings are not, without what is shipped for testing."""
    served = [path for path in SOURCES if "testing" not in path.parts]
    assert sum(map(count_code_lines, served)) < MAX_CODE_LINES


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=name_of)
def test_a_benchmark_is_short(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") <= MAX_BENCHMARK_LINES


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [name_of(path) for path in SOURCES if FORBIDDEN_NAME.fullmatch(path.stem)] == []


def test_the_options_are_exactly_these() -> None:
    found = {name: [field.name for field in dataclasses.fields(getattr(config, name))] for name in OPTIONS}
    assert found == OPTIONS


def test_only_config_reads_the_environment_and_yaml() -> None:
    reads = re.compile(r"^\s*(import yaml|from yaml)|os\.environ|os\.getenv|\bgetenv\(", re.MULTILINE)
    served = [path for path in SOURCES if "testing" not in path.parts]
    readers = [name_of(path) for path in served if reads.search(path.read_text(encoding="utf-8"))]
    assert readers == ["src/kvferry/config.py"]


def test_no_pickle() -> None:
    pickles = re.compile(r"^\s*(import|from) (pickle|dill|cloudpickle|shelve|marshal)\b", re.MULTILINE)
    assert [name_of(path) for path in SOURCES if pickles.search(path.read_text(encoding="utf-8"))] == []


def test_public_names_are_exactly_these_and_all_exist() -> None:
    assert set(kvferry.__all__) == PUBLIC_NAMES
    assert set(connector.__all__) == PUBLIC_CONNECTOR_NAMES
    for module in (kvferry, connector):
        assert all(getattr(module, name) is not None for name in module.__all__)
    assert dir(kvferry) == sorted(kvferry.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kvferry.no_such_name


def test_a_missing_engine_says_what_to_install() -> None:
    code = """
import sys
sys.modules["torch"] = None
import kvferry
kvferry.KvCacheConfig()
try:
    kvferry.LLM
except ImportError as error:
    print(error)
"""
    assert "pip install kvferry[engine]" in in_python(code)


LOADED = "; import sys; print(' '.join(sys.modules))"
HEAVY = {"torch", "transformers", "matplotlib", "rich", "fastapi", "uvicorn", "pydantic"}


def test_importing_kvferry_loads_hardly_anything() -> None:
    loaded = set(in_python("import kvferry" + LOADED).split())
    assert not loaded & {*HEAVY, "numpy", "msgspec", "yaml", "zmq", "kvferry.config"}


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["serve", "--help"], ["config"]])
def test_light_commands_load_nothing_heavy(argv: list[str]) -> None:
    code = f"""
import sys
from kvferry.cli import main
try:
    main({argv!r})
except SystemExit:
    pass
print()
print(' '.join(sys.modules))
"""
    assert not set(in_python(code).splitlines()[-1].split()) & HEAVY


@pytest.mark.parametrize(
    "module",
    [
        "kvferry.connector",
        "kvferry.connector.persistent",
        "kvferry.store.store",
        "kvferry.server.client",
        "kvferry.offload.planner",
    ],
)
def test_what_must_not_need_torch_does_not_load_it(module: str) -> None:
    assert not set(in_python(f"import {module}" + LOADED).split()) & {"torch", "transformers"}


HOSTS = {"vllm"}
"""Engines that an adapter of ours needs, and that need not be installed here."""


def test_every_module_imports() -> None:
    for path in SOURCES:
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        try:
            import_module(".".join(parts).removesuffix(".__init__"))
        except ModuleNotFoundError as missing:
            if missing.name not in HOSTS or not ("integrations" in parts or path.stem == "vllm_worker"):
                raise


@pytest.mark.parametrize("path", TEXT_FILES, ids=name_of)
def test_no_path_of_somebody_s_machine(path: Path) -> None:
    folders = re.compile(r"(?<![\w.~])/(" + "|".join(["home", "ro" + "ot", "wo" + "rk", "Users", "mnt"]) + r")/\w")
    assert not folders.search(path.read_text(encoding="utf-8"))


def test_examples_and_benchmarks_compile() -> None:
    for folder in ("benchmarks", "examples"):
        for path in (ROOT / folder).glob("*.py"):
            compile(path.read_text(encoding="utf-8"), str(path), "exec")
