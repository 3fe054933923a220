"""Carries a connector's plain objects from rank 0 to ranks in other processes, without pickle.

What comes out is equal to what went in and of the same types, whatever the annotations say. What may go in: None,
bool, int, float, str, bytes, bytearray, Path, list, tuple, set, frozenset, dict, and enums, named tuples, dataclasses
and msgspec Structs that their module offers under their own name. A dataclass is rebuilt from its state: its `__init__`
does not run. Knows no rank and no socket.

On the wire a scalar is itself in msgpack, and anything else an array: a tag, then what the tag needs.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any

import msgspec

from kvferry.errors import ConnectorProtocolError

_INT64 = 1 << 63
_SCALARS = {type(None), bool, float, str, bytes}
_CONTAINERS: dict[str, Callable[[Iterable[Any]], Any]] = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}


def encode(value: object) -> bytes:
    """ConnectorProtocolError: the value holds something that cannot cross; the message says what and where."""
    try:
        return msgspec.msgpack.encode(_flatten(value, type(value).__name__))
    except RecursionError as error:
        raise ConnectorProtocolError(f"a {type(value).__name__} that contains itself cannot cross processes") from error


def decode(data: bytes) -> Any:
    """What `encode` was given. ConnectorProtocolError: a class that it names is not to be had in this process."""
    return _rebuild(msgspec.msgpack.decode(data))


def _flatten(value: Any, where: str) -> Any:
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is int:
        return value if -_INT64 <= value < _INT64 else ["int", str(value)]
    if kind.__name__ in _CONTAINERS and kind is _CONTAINERS[kind.__name__]:
        return [kind.__name__, _flatten_all(value, where)]
    if kind is dict:
        return [
            "dict",
            _flatten_all(value, where),
            [_flatten(item, f"{where}[{key!r}]") for key, item in value.items()],
        ]
    if kind is bytearray:
        return ["bytearray", bytes(value)]
    if isinstance(value, PurePath):
        return ["path", str(value)]
    if isinstance(value, enum.Enum):
        return ["enum", _name_of(kind, where), value.name]
    state = _state_of(value, where)
    return [
        "object",
        _name_of(kind, where),
        list(state),
        [_flatten(item, f"{where}.{name}") for name, item in state.items()],
    ]


def _flatten_all(items: Iterable[Any], where: str) -> list[Any]:
    """Lists of block and token ids are long, so they are looked at in C."""
    listed = list(items)
    if set(map(type, listed)) == {int} and min(listed) >= -_INT64 and max(listed) < _INT64:
        return listed
    return [_flatten(item, f"{where}[{index}]") for index, item in enumerate(listed)]


def _state_of(value: Any, where: str) -> dict[str, Any]:
    kind = type(value)
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return dict(zip(kind._fields, value, strict=True))
    if isinstance(value, msgspec.Struct):
        return {name: getattr(value, name) for name in kind.__struct_fields__}
    if dataclasses.is_dataclass(kind):
        slots = {
            field.name: getattr(value, field.name) for field in dataclasses.fields(kind) if hasattr(value, field.name)
        }
        return slots | getattr(value, "__dict__", {})
    raise ConnectorProtocolError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}, which cannot cross processes: only builtins, dataclasses "
        "and msgspec Structs can"
    )


def _name_of(kind: type, where: str) -> str:
    name = f"{kind.__module__}:{kind.__qualname__}"
    if _find(name) is not kind:
        raise ConnectorProtocolError(f"{where} is a {name}, which other processes cannot find by that name")
    return name


@cache
def _find(name: str) -> Any:
    """The class of that name, or None."""
    module, _, qualified = name.partition(":")
    try:
        found: Any = import_module(module)
    except Exception as error:  # whatever a foreign module raises while it is imported
        raise ConnectorProtocolError(f"cannot import {module}, which is to hold {qualified}: {error!r}") from error
    for part in qualified.split("."):
        found = getattr(found, part, None)
    return found


def _rebuild(value: Any) -> Any:
    if type(value) is not list:
        return value
    tag, *rest = value
    if tag in _CONTAINERS:
        return _CONTAINERS[tag](map(_rebuild, rest[0]))
    if tag == "dict":
        return dict(zip(map(_rebuild, rest[0]), map(_rebuild, rest[1]), strict=True))
    if tag == "object":
        return _rebuild_object(_class(rest[0]), dict(zip(rest[1], map(_rebuild, rest[2]), strict=True)))
    if tag == "enum":
        return _class(rest[0])[rest[1]]
    return {"int": int, "bytearray": bytearray, "path": Path}[tag](rest[0])


def _class(name: str) -> Any:
    found = _find(name)
    if not isinstance(found, type):
        raise ConnectorProtocolError(f"this process has no class {name}")
    return found


def _rebuild_object(kind: Any, state: dict[str, Any]) -> Any:
    if issubclass(kind, tuple | msgspec.Struct):
        return kind(**state)
    made = object.__new__(kind)
    for name, item in state.items():
        object.__setattr__(made, name, item)
    return made
