"""Connectors by short name. Knows where each preset's classes are said to live, and imports them when one is used."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from kvferry.config import KvCacheConnectorConfig, has_variable
from kvferry.connector.api import KvCacheConnectorScheduler, KvCacheConnectorWorker
from kvferry.errors import ConfigError, ConnectorError, ConnectorImportError, UnknownPresetError

TRTLLM_NAMES = "kvferry.integrations.trtllm_namespace"
"""Connectors for TensorRT-LLM import `tensorrt_llm`: the module whose `install()` makes that resolve to ours."""


class ServerUrl(enum.Enum):
    """Whether a connector talks to a server."""

    NONE = "none"
    NEEDED = "needed"
    OPTIONAL = "optional"


@dataclass(frozen=True, slots=True)
class Preset:
    """Where a connector's two classes live.

    package: what pip installs to have it; None where there is nothing to say about that.
    needs: a module by name, whose `install()` is called before the connector's module is imported.
    server_url: whether the configuration must name a server, unless the environment does so in `server_variable`.
    """

    module: str
    scheduler_class: str
    worker_class: str
    package: str | None = None
    needs: str | None = None
    server_url: ServerUrl = ServerUrl.NONE
    server_variable: str | None = None


@dataclass(frozen=True, slots=True)
class ConnectorClasses:
    """A connector's two classes. They need not derive from the bases in `api`."""

    scheduler: type[Any]
    worker: type[Any]


_KVFERRY = Preset("kvferry.offload.connector", "KVFerryConnectorScheduler", "KVFerryConnectorWorker")

_presets = {
    "kvferry": _KVFERRY,
    "kvferry-server": replace(_KVFERRY, server_url=ServerUrl.OPTIONAL),
    "persistent": Preset("kvferry.connector.persistent", "PersistentConnectorScheduler", "PersistentConnectorWorker"),
    "lmcache": Preset(
        "lmcache.integration.tensorrt_llm.tensorrt_adapter",
        "LMCacheKvConnectorScheduler",
        "LMCacheKvConnectorWorker",
        package="lmcache",
        needs=TRTLLM_NAMES,
    ),
    "lmcache-mp": Preset(
        "lmcache.integration.tensorrt_llm.tensorrt_mp_adapter",
        "LMCacheMPKvConnectorScheduler",
        "LMCacheMPKvConnectorWorker",
        package="lmcache",
        needs=TRTLLM_NAMES,
        server_url=ServerUrl.NEEDED,
        server_variable="LMCACHE_SERVER_URL",
    ),
    "kvbm": Preset(
        "kvbm.trtllm_integration.connector",
        "DynamoKVBMConnectorLeader",
        "DynamoKVBMConnectorWorker",
        package="kvbm",
        needs=TRTLLM_NAMES,
    ),
}


def presets() -> dict[str, Preset]:
    """All presets by name, in alphabetical order."""
    return dict(sorted(_presets.items()))


def register_preset(name: str, preset: Preset) -> None:
    """Give a connector a short name. ConfigError: the name already means another connector."""
    if _presets.setdefault(name, preset) != preset:
        raise ConfigError(f"the preset {name!r} already means {_presets[name]}")


def resolve(config: KvCacheConnectorConfig) -> ConnectorClasses:
    """The classes that a configuration names.

    UnknownPresetError: no preset of that name. ConfigError: it needs a server's URL and none is given, or takes none.
    ConnectorImportError: its module cannot be imported or lacks a class.
    """
    preset = _named(config)
    if config.server_url is not None and preset.server_url is ServerUrl.NONE:
        raise ConfigError(f"the connector preset {config.connector!r} talks to no server: server_url is not for it")
    if config.server_url is None and preset.server_url is ServerUrl.NEEDED:
        variable = preset.server_variable
        if variable is None or not has_variable(variable):
            instead = f" or the environment variable {variable}" if variable is not None else ""
            raise ConfigError(f"the connector preset {config.connector!r} needs server_url{instead}")
    return load(preset)


def load(preset: Preset) -> ConnectorClasses:
    """Import a connector's module. ConnectorImportError: it cannot be imported or lacks a class."""
    classes = f"{preset.scheduler_class} and {preset.worker_class}"
    try:
        if preset.needs is not None:
            import_module(preset.needs).install()
        module = import_module(preset.module)
    except Exception as error:  # whatever a foreign module raises while it is imported is its own message
        if preset.package and isinstance(error, ModuleNotFoundError) and preset.module.startswith(str(error.name)):
            message = f"{preset.package} is not installed: pip install {preset.package}"
            raise ConnectorImportError(message, name=preset.module) from error
        reason = f"{type(error).__name__}: {error}"
        message = f"cannot import the connector module {preset.module!r} (for {classes}): {reason}"
        raise ConnectorImportError(message, name=preset.module) from error
    found = {name: getattr(module, name, None) for name in (preset.scheduler_class, preset.worker_class)}
    for name, value in found.items():
        if not isinstance(value, type):
            message = f"the connector module {preset.module!r} has no class {name!r}"
            raise ConnectorImportError(message, name=preset.module, path=getattr(module, "__file__", None))
    return ConnectorClasses(found[preset.scheduler_class], found[preset.worker_class])  # type: ignore[arg-type]


def _named(config: KvCacheConnectorConfig) -> Preset:
    if config.connector is not None:
        preset = _presets.get(config.connector)
        if preset is None:
            raise UnknownPresetError(f"no connector preset {config.connector!r}; known: {', '.join(presets())}")
        return preset
    module, scheduler, worker = (
        config.connector_module,
        config.connector_scheduler_class,
        config.connector_worker_class,
    )
    assert module and scheduler and worker, "KvCacheConnectorConfig refuses anything else"
    return Preset(module, scheduler, worker, needs=TRTLLM_NAMES, server_url=ServerUrl.OPTIONAL)


def check_forms(classes: ConnectorClasses, num_layer_groups: int) -> None:
    """ConnectorError: the model has several layer groups and a class has only the flat forms of the API.

    A block id means another block in each group, so one list cannot serve them.
    """
    if num_layer_groups == 1:
        return
    wanted = {
        classes.scheduler: ("update_state_after_alloc_by_layer_group", "request_finished_by_layer_group"),
        classes.worker: ("register_kv_cache_layout",),
    }
    bases = (KvCacheConnectorScheduler, KvCacheConnectorWorker)
    for cls, hooks in wanted.items():
        own = {name for base in cls.__mro__ if base not in bases for name in vars(base)}
        if missing := [hook for hook in hooks if hook not in own]:
            needed = " and ".join(missing)
            raise ConnectorError(f"{cls.__qualname__} lacks {needed}: this model has {num_layer_groups} layer groups")
