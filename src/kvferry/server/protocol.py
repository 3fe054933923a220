"""What a store's server and its clients say to each other: msgpack of the structs below. Knows no socket.

A client's message is [number, deadline, question]: the deadline in seconds of CLOCK_MONOTONIC, which all processes of a
machine share; past it the question is not worth answering. The answer is [number, answer]. What has number 0 gets no
answer, and an answer with number 0 was not asked for. The first question is `Hello`; a server of another version
answers it with `Refused`, whatever else it has to say. Sessions end with their server: who still talks to the one
before is a `Stranger`.

Keys are sent as one run of bytes, and geometries, once registered, by their 32-byte root key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from types import GenericAlias
from typing import Any, Final

import msgspec

from kvferry.blocks import Geometry, Job, Tier
from kvferry.store.base import ArenaInfo, Match, Prefetch, Selection, Tally, Usage
from kvferry.store.keys import KEY_BYTES

VERSION: Final = 4
"""To be raised with every change of a struct below or of what they hold from `blocks`."""

UNNUMBERED: Final = 0
"""The number of a question that gets no answer, and of an answer that nobody asked for."""

QUESTIONS_LINK: Final = b"q"
ATTENDANCE_LINK: Final = b"a"
"""A client has two connections: one to ask, on which answers come that were not asked for, and one to show that it
lives. A routing id is one of these bytes and the client's id."""

MOST_MESSAGE_BYTES: Final = 2 << 20
MOST_KEYS: Final = MOST_MESSAGE_BYTES // KEY_BYTES // 2
"""Of one question: 8 million tokens in chunks of 256. What lies beyond is not asked for."""


class Question(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Each subclass is one, tagged by its name."""


class Answer(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Each subclass is one, tagged by its name."""


# -- questions -----------------------------------------------------------------------------------------------------


class Hello(Question, frozen=True):
    """Who serves here? now: the client's clock, which must be the server's. pid_namespace and pid_start tell whether
    the server sees the same process under `pid`. name: for people, the model's."""

    version: int
    pid: int
    pid_start: int
    pid_namespace: int
    now: float
    name: str


class Bye(Question, frozen=True):
    """The session's end: its leases return."""


class Beat(Question, frozen=True):
    """The client lives."""


class Register(Question, frozen=True):
    """`BlockStore.register`."""

    engine: str
    rank: int
    geometry: Geometry


class AskGeometry(Question, frozen=True):
    """`BlockStore.geometry`."""

    engine: str


class AskMatch(Question, frozen=True):
    """`BlockStore.match`."""

    root: bytes
    keys: bytes


class AskPlaces(Question, frozen=True):
    """`BlockStore.locate`."""

    root: bytes
    keys: bytes


class BeginLoad(Question, frozen=True):
    """`BlockStore.begin_load`."""

    root: bytes
    keys: bytes
    first_chunk: int
    salt: str | None = None


class BeginStore(Question, frozen=True):
    """`BlockStore.begin_store`."""

    root: bytes
    keys: bytes
    first_chunk: int
    salt: str | None = None


class JobDone(Question, frozen=True):
    """`BlockStore.done`. Job ids of an earlier boot mean nothing to this one."""

    job_id: int
    rank: int
    ok: bool


class Cancel(Question, frozen=True):
    """`BlockStore.cancel`."""

    job_id: int


class AskStats(Question, frozen=True):
    """`BlockStore.stats`, and the server's own."""


class Check(Question, frozen=True):
    """`BlockStore.check`."""


# -- questions of people -------------------------------------------------------------------------------------------


class AskModels(Question, frozen=True):
    """Which geometries do live engines have?"""


class AskUsage(Question, frozen=True):
    """`ManagedStore.usage`."""


class AskClients(Question, frozen=True):
    """Who is connected?"""


class Clear(Question, frozen=True):
    """`ManagedStore.clear`."""

    selection: Selection


class Keep(Question, frozen=True):
    """`ManagedStore.keep`."""

    selection: Selection
    ttl_seconds: float


class Unkeep(Question, frozen=True):
    """`ManagedStore.unkeep`."""

    selection: Selection


class Bring(Question, frozen=True):
    """`ManagedStore.prefetch`."""

    root: bytes
    keys: bytes
    salt: str | None


# -- answers -------------------------------------------------------------------------------------------------------


class Welcome(Answer, frozen=True):
    """The store's arena and, in it, its boot id: with another boot id all that was said before is void."""

    arena: ArenaInfo


class Done(Answer, frozen=True):
    """It is so."""


class Refused(Answer, frozen=True):
    """It cannot be, and why: a ConfigError's text where the question came from a user's settings."""

    reason: str


class Broken(Answer, frozen=True):
    """An InvariantError's text."""

    reason: str


class Stranger(Answer, frozen=True):
    """Say `Hello` first."""


class Agreed(Answer, frozen=True):
    """The geometry on which an engine's ranks agree."""

    geometry: Geometry | None


class Found(Answer, frozen=True):
    """What a prompt can go on from."""

    match: Match


class Places(Answer, frozen=True):
    """Of each chunk its tier, or None."""

    tiers: Sequence[Tier | None]


class Begun(Answer, frozen=True):
    """A job whose leases the session now has."""

    job: Job | None


class Polled(Answer, frozen=True):
    """`PollResult`; comes unasked."""

    ready: tuple[int, ...]
    failed: tuple[int, ...]


class Values(Answer, frozen=True):
    """Counters and gauges by name."""

    values: dict[str, float]


class Model(msgspec.Struct, frozen=True):
    """A geometry of live engines, its root key, and what their users call the model."""

    name: str
    root: bytes
    geometry: Geometry


class Models(Answer, frozen=True):
    """The geometries of live engines."""

    models: list[Model]


class Used(Answer, frozen=True):
    """What lies in memory."""

    usage: list[Usage]


class Client(msgspec.Struct, frozen=True):
    """A session. ranks: what it has registered, as ENGINE/RANK; none: it asks."""

    name: str
    pid: int
    ranks: list[str]
    silent_seconds: float


class Clients(Answer, frozen=True):
    """Live sessions."""

    clients: list[Client]


class Counted(Answer, frozen=True):
    """How much a command concerned."""

    tally: Tally


class Brought(Answer, frozen=True):
    """How far a prefetch is."""

    prefetch: Prefetch


encode = msgspec.msgpack.Encoder().encode


def _decoder(*fields: Any) -> Any:
    return msgspec.msgpack.Decoder(GenericAlias(tuple, fields)).decode


decode_question: Callable[[bytes], tuple[int, float, Question]]
decode_question = _decoder(int, float, reduce(or_, Question.__subclasses__()))
decode_answer: Callable[[bytes], tuple[int, Answer]]
decode_answer = _decoder(int, reduce(or_, Answer.__subclasses__()))
"""Number, deadline and question, or number and answer. MsgspecError: the bytes are none."""


def join_keys(keys: Sequence[bytes]) -> bytes:
    """Keys as they are sent."""
    return b"".join(keys[:MOST_KEYS])


def split_keys(joined: bytes) -> list[bytes]:
    """Keys as they were. ValueError: they are no whole keys, or too many."""
    if len(joined) % KEY_BYTES or len(joined) > MOST_KEYS * KEY_BYTES:
        raise ValueError(f"{len(joined)} bytes are no keys, or too many")
    return [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]
