"""Makes the names that connectors import from `tensorrt_llm` resolve to kvferry's, so that they run without it.

`NAMES` says what there is; anything else is an error that lists what is there. Nothing is imported before it is asked
for. The finder stands last in `sys.meta_path`: where TensorRT-LLM itself is installed, it is found first and unchanged.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

ROOT = "tensorrt_llm"


def _own(module: str, *names: str) -> dict[str, str]:
    """Names that a module of kvferry has as they are."""
    return {name: f"kvferry.{module}:{name}" for name in names}


_RANKS = {
    "mpi_rank": "kvferry.engine.collective:world_rank",
    "mpi_world_size": "kvferry.engine.collective:world_size",
    "mpi_barrier": "kvferry.engine.collective:barrier",
    "mpi_broadcast": "kvferry.engine.collective:broadcast",
}
_ARGUMENTS = {
    "KvCacheConfig": "kvferry.integrations.trtllm_shapes:KvCacheConfig",
    "KvCacheConnectorConfig": "kvferry.config:KvCacheConnectorConfig",
    "TorchLlmArgs": "kvferry.connector.config:LlmArgs",
}
_SAMPLING = _own("engine.sampling", "SamplingParams")
_ENGINE = {**_own("integrations.trtllm_llm", "LLM"), **_SAMPLING}
_LOGGER = _own("integrations.trtllm_shapes", "logger")
_REQUEST = {"LlmRequest": "kvferry.engine.sequence:Sequence"}
_STATE = {"LlmRequestState": "kvferry.connector.api:RequestState"}
_CONNECTOR = {
    **_own("connector.api", "KvCacheConnectorScheduler", "KvCacheConnectorWorker", "RequestData", "SchedulerOutput"),
    **_REQUEST,
}
_LAYOUT = ("KvCacheBufferRef", "KvCacheLayerGroupLayout", "KvCacheLayout", "KvCacheRegion", "valid_page_slots")

NAMES: dict[str, dict[str, str]] = {
    "tensorrt_llm": {**_ENGINE, **_LOGGER, **_RANKS, "__version__": "kvferry.integrations.trtllm_shapes:VERSION"},
    "tensorrt_llm.llmapi": {**_ENGINE, **_own("engine.outputs", "CompletionOutput", "RequestOutput"), **_ARGUMENTS},
    "tensorrt_llm.llmapi.llm_args": _ARGUMENTS,
    "tensorrt_llm.sampling_params": _SAMPLING,
    "tensorrt_llm.logger": _LOGGER,
    "tensorrt_llm._utils": {**_RANKS, "mpi_allgather": "kvferry.engine.collective:allgather"},
    "tensorrt_llm.bindings": _STATE,
    "tensorrt_llm.bindings.executor": {"ExecutorConfig": _ARGUMENTS["TorchLlmArgs"]},
    "tensorrt_llm.bindings.internal": {},
    "tensorrt_llm.bindings.internal.batch_manager": _REQUEST,
    "tensorrt_llm.runtime": {},
    "tensorrt_llm.runtime.kv_cache_manager_v2": {"BAD_PAGE_INDEX": "kvferry.connector.api:NO_BLOCK"},
    "tensorrt_llm._torch": {},
    "tensorrt_llm._torch.pyexecutor": {},
    "tensorrt_llm._torch.pyexecutor.llm_request": {**_REQUEST, **_STATE},
    "tensorrt_llm._torch.pyexecutor.scheduler": _own("integrations.trtllm_shapes", "ScheduledRequests"),
    "tensorrt_llm._torch.pyexecutor.kv_cache_connector": _CONNECTOR,
    "tensorrt_llm._torch.pyexecutor.connectors": {},
    "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector": _CONNECTOR,
    "tensorrt_llm._torch.pyexecutor.connectors.kv_cache_layout": _own("connector.layout", *_LAYOUT),
    "tensorrt_llm._torch.pyexecutor.connectors.registry": _own("integrations.trtllm_shapes", "CONNECTOR_REGISTRY"),
}
"""Module to name to where we have it, as "module:attribute"."""


def install() -> bool:
    """Make `import tensorrt_llm` find our names. Further calls do nothing. False: TensorRT-LLM itself is there, or
    somebody else's stand-in; then nothing is changed."""
    if ROOT in sys.modules:
        return isinstance(sys.modules[ROOT], _Names)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        if importlib.util.find_spec(ROOT) is not None:
            return False
        sys.meta_path.append(_Finder())
    return True


class _Names(ModuleType):
    """A module of the table."""

    def __getattr__(self, name: str) -> object:
        """Find a name where we have it, once."""
        target = NAMES[self.__name__].get(name)
        if target is None:
            raise AttributeError(_what_is_there(self.__name__, name), name=name, obj=self)
        module, _, attribute = target.partition(":")
        value: object = getattr(import_module(module), attribute)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        """A module's own name comes before a submodule of that name, which the import system sets: see `logger`."""
        if not (isinstance(value, ModuleType) and name in NAMES[self.__name__]):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted([*self.__dict__, *_contents(self.__name__)])


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of the table, which are all packages; the last to be asked."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """ModuleNotFoundError: the package is ours, but has no such module. So says `from package import name` too."""
        if fullname in NAMES and (fullname == ROOT or _is_ours(fullname)):
            return ModuleSpec(fullname, self, origin="kvferry", is_package=True)
        if _is_ours(fullname):
            package, _, name = fullname.rpartition(".")
            raise ModuleNotFoundError(_what_is_there(package, name), name=package)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Names(spec.name, f"kvferry's part of TensorRT-LLM's `{spec.name}`.")

    def exec_module(self, module: ModuleType) -> None:
        """A module of the table has nothing to run."""


def _is_ours(name: str) -> bool:
    return isinstance(sys.modules.get(name.rpartition(".")[0]), _Names)


def _contents(package: str) -> list[str]:
    modules = [name.removeprefix(package + ".") for name in NAMES if name.startswith(package + ".")]
    return [*NAMES[package], *(name for name in modules if "." not in name)]


def _what_is_there(package: str, name: str) -> str:
    there = ", ".join(sorted(set(_contents(package))))
    return f"kvferry stands in for TensorRT-LLM here, and its {package} has no {name!r}; it has: {there}"
