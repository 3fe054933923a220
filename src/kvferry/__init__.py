"""kvferry keeps an LLM's KV cache alive outside the GPU and carries it back.

The names below are loaded when they are first used, so that `import kvferry` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvferry.config import KvCacheConfig, KvCacheConnectorConfig, StoreOptions
    from kvferry.engine.llm import LLM
    from kvferry.engine.outputs import RequestMetrics, RequestOutput
    from kvferry.engine.sampling import SamplingParams
    from kvferry.errors import KVFerryError

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "KVFerryError",
    "KvCacheConfig",
    "KvCacheConnectorConfig",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StoreOptions",
    "__version__",
]

_HOMES = {
    "KvCacheConfig": "kvferry.config",
    "KvCacheConnectorConfig": "kvferry.config",
    "KVFerryError": "kvferry.errors",
    "LLM": "kvferry.engine.llm",
    "RequestMetrics": "kvferry.engine.outputs",
    "RequestOutput": "kvferry.engine.outputs",
    "SamplingParams": "kvferry.engine.sampling",
    "StoreOptions": "kvferry.config",
}

_ENGINE_PACKAGES = ("accelerate", "gguf", "jinja2", "safetensors", "torch", "transformers")


def __getattr__(name: str) -> object:
    """Import a public name from its module (PEP 562). ImportError: the engine's packages are not installed."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value: object = getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _ENGINE_PACKAGES:
            raise
        message = f"kvferry.{name} needs the package {error.name}: pip install kvferry[engine]"
        raise ImportError(message, name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
