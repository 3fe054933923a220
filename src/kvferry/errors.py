"""Every exception that kvferry raises on purpose. Imports nothing of kvferry.

    KVFerryError
    ├── ConfigError (ValueError)            an option is unknown, contradictory or out of range
    ├── RequestError (ValueError)           a prompt, sampling value or model cannot be served
    ├── ConnectorError                      a connector cannot be used
    │   ├── UnknownPresetError (ValueError)     no preset of that name
    │   ├── ConnectorImportError (ImportError)  module or class of a connector is missing
    │   └── ConnectorProtocolError              a connector broke the API's contract
    ├── StoreError                          the store cannot do what was asked
    │   ├── ArenaError                          shared memory cannot be made, mapped or trusted
    │   └── InvariantError                      `check()` found state that must be impossible
    └── EngineDeadError                     the engine's loop ended; its requests cannot finish

Raised to users while they set something up or submit a request. Once a request runs, a broken store or connector is
a counted and logged miss instead: nothing below the engine raises into it.
"""

from __future__ import annotations


class KVFerryError(Exception):
    """The root of the tree."""


class ConfigError(KVFerryError, ValueError):
    """An option is unknown, contradictory or out of range."""


class RequestError(KVFerryError, ValueError):
    """A prompt, a sampling value or a model cannot be served; the message names the limit."""


class ConnectorError(KVFerryError):
    """A connector cannot be used."""


class UnknownPresetError(ConnectorError, ValueError):
    """No connector preset has that name; the message lists those that exist."""


class ConnectorImportError(ConnectorError, ImportError):
    """A connector's module or class is missing; the message names both and the import's own error."""


class ConnectorProtocolError(ConnectorError):
    """A connector answered or reported something that the API forbids."""


class StoreError(KVFerryError):
    """The store cannot do what was asked."""


class ArenaError(StoreError):
    """Shared memory cannot be made, mapped or trusted."""


class InvariantError(StoreError):
    """`check()` found state that must be impossible."""


class EngineDeadError(KVFerryError):
    """The engine's loop ended; its requests cannot finish."""
