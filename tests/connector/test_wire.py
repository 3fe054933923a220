"""What a connector's metadata may be made of, and that it comes out as it went in."""

from __future__ import annotations

import dataclasses
import enum
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.blocks import Slot
from kvferry.connector import wire
from kvferry.errors import ConnectorProtocolError
from kvferry.offload.metadata import CopyJob, PartCopy, PassMetadata, RequestJob
from kvferry.testing import ranks

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
    | st.binary().map(bytearray)
    | st.sampled_from([Path("a/b"), Path("/"), Path()])
)
HASHABLE = (
    st.none() | st.booleans() | st.integers() | st.text("ab") | st.binary() | st.tuples(st.integers(), st.text("a"))
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(HASHABLE, inner)
        | st.sets(HASHABLE)
        | st.frozensets(HASHABLE)
    )


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, set | frozenset):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    return bool(one == other)


@given(st.recursive(SCALARS, containers, max_leaves=30))
def test_builtins_come_out_as_they_went_in(value: Any) -> None:
    assert same(wire.decode(wire.encode(value)), value)


# Classes must be found by name in the process that decodes, so they stand for themselves in a module that imports.
@pytest.mark.parametrize(
    "value",
    [
        PassMetadata(
            loads=[
                RequestJob(3, CopyJob(1 << 62, [PartCopy(0, (Slot(4096, 64, 7), Slot(0, 64, 1 << 63)), 2, [5, -1])]))
            ],
            lost_loads=[9],
        ),
        ranks.Script((ranks.Act(saved=(1, 2), raises=frozenset({"get_finished"})), ranks.Act())),
        ranks.ScriptedRequest(1, [1, 2], "salt"),
        [ranks.Act(), {1: ranks.Act(failed=(3,))}, (None, Path("x"))],
        list(range(-3, 2000)),
        [1, True, 1.0, "1"],
    ],
)
def test_objects_come_out_equal_whatever_they_nest(value: Any) -> None:
    assert same(wire.decode(wire.encode(value)), value)


def test_a_dataclass_keeps_what_its_init_did_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass
    class Counter:
        start: int
        seen: int = dataclasses.field(init=False, default=0)

        def __post_init__(self) -> None:
            self.note = "made"

    Counter.__module__, Counter.__qualname__ = ranks.__name__, "Counter"
    monkeypatch.setattr(ranks, "Counter", Counter, raising=False)
    wire._find.cache_clear()
    value = Counter(3)
    value.seen, value.note = 5, "changed"
    assert vars(wire.decode(wire.encode(value))) == {"start": 3, "seen": 5, "note": "changed"}
    wire._find.cache_clear()


def test_enums_and_named_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    class Color(enum.IntEnum):
        RED = 3

    class Point(NamedTuple):
        x: int
        y: Any

    for cls in (Color, Point):
        cls.__module__, cls.__qualname__ = ranks.__name__, cls.__name__
        monkeypatch.setattr(ranks, cls.__name__, cls, raising=False)
    wire._find.cache_clear()
    out = wire.decode(wire.encode([Color.RED, Point(1, Color.RED)]))
    assert out == [Color.RED, Point(1, Color.RED)]
    assert type(out[0]) is Color
    assert type(out[1]) is Point
    wire._find.cache_clear()


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, threading.Lock()]}, r"dict\['a'\]\[1\] is a _thread.lock"),
        (ranks.Script((object(),)), r"Script.acts\[0\] is a builtins.object"),
        (lambda: None, "function is a builtins.function"),
        ([dataclasses.make_dataclass("Unknown", [])()], r"list\[0\] is a .*Unknown"),
    ],
)
def test_what_cannot_cross_is_named(value: object, where: str) -> None:
    with pytest.raises(ConnectorProtocolError, match=where):
        wire.encode(value)


def test_a_tensor_is_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ConnectorProtocolError, match=r"dict\['slots'\] is a torch.Tensor"):
        wire.encode({"slots": torch.zeros(2)})


def test_what_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ConnectorProtocolError, match="contains itself"):
        wire.encode(loop)


def test_a_class_that_this_process_lacks_is_an_error_of_the_connector() -> None:
    data = wire.encode(ranks.Act())
    with pytest.raises(ConnectorProtocolError, match=r"no class kvferry\.testing\.ranks:Axt"):
        wire.decode(data.replace(b":Act", b":Axt"))
    with pytest.raises(ConnectorProtocolError, match=r"cannot import kvferry\.testing\.ranky"):
        wire.decode(data.replace(b"ranks:Act", b"ranky:Act"))
