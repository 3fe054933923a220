"""The public API of KV cache connectors: two base classes, what they are handed, and presets by name."""

from __future__ import annotations

from kvferry.config import KvCacheConnectorConfig
from kvferry.connector.api import (
    NO_BLOCK,
    KvCacheConnectorScheduler,
    KvCacheConnectorWorker,
    Request,
    RequestData,
    SchedulerOutput,
)
from kvferry.connector.config import LlmArgs
from kvferry.connector.manager import KvCacheConnectorManager
from kvferry.connector.presets import ConnectorClasses, Preset, presets, register_preset, resolve

__all__ = [
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
]
