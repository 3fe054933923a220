"""Connectors by short name. Knows where each preset's classes are said to live, and imports them when one is used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kvferry.config import KvCacheConnectorConfig
from kvferry.connector.api import KvCacheConnectorScheduler, KvCacheConnectorWorker
from kvferry.errors import ConfigError, ConnectorError, ConnectorImportError, UnknownPresetError


@dataclass(frozen=True, slots=True)
class Preset:
    """Where a connector's two classes live."""

    module: str
    scheduler_class: str
    worker_class: str


@dataclass(frozen=True, slots=True)
class ConnectorClasses:
    """A connector's two classes. They need not derive from the bases in `api`."""

    scheduler: type[Any]
    worker: type[Any]


_presets = {
    "kvferry": Preset("kvferry.offload.connector", "KVFerryConnectorScheduler", "KVFerryConnectorWorker"),
    "kvferry-server": Preset("kvferry.offload.connector", "KVFerryConnectorScheduler", "KVFerryConnectorWorker"),
    "persistent": Preset("kvferry.connector.persistent", "PersistentConnectorScheduler", "PersistentConnectorWorker"),
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

    UnknownPresetError: no preset of that name. ConnectorImportError: its module cannot be imported or lacks a class.
    """
    return load(_named(config))


def load(preset: Preset) -> ConnectorClasses:
    """Import a connector's module. ConnectorImportError: it cannot be imported or lacks a class."""
    classes = f"{preset.scheduler_class} and {preset.worker_class}"
    try:
        module = import_module(preset.module)
    except Exception as error:  # whatever a foreign module raises while it is imported is its own message
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
    return Preset(module, scheduler, worker)


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
