"""What a store's server and its clients say to each other: msgpack of the structs below. Knows no socket.

A client's message is [number, deadline, question]: the deadline in seconds of CLOCK_MONOTONIC, which all processes of a
machine share; past it the question is not worth answering. The answer is [number, answer]. What has number 0 gets no
answer, and an answer with number 0 was not asked for. The first question is `Hello`; a server of another version
answers it with `Refused`, whatever else it has to say. Sessions end with their server: who still talks to the one
before is a `Stranger`.

Keys are sent as one run of bytes, and geometries, once registered, by their 32-byte root key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from kvferry.blocks import Geometry, Job, Tier
from kvferry.store.base import ArenaInfo, Match
from kvferry.store.keys import KEY_BYTES

VERSION: Final = 2
"""To be raised with every change of a struct below or of what they hold from `blocks`."""

UNNUMBERED: Final = 0
"""The number of a question that gets no answer, and of an answer that nobody asked for."""

QUESTIONS_LINK: Final = b"q"
ATTENDANCE_LINK: Final = b"a"
"""A client has two connections: one to ask, on which answers come that were not asked for, and one to show that it
lives. A routing id is one of these bytes and the client's id."""

MOST_MESSAGE_BYTES: Final = 8 << 20
MOST_KEYS: Final = MOST_MESSAGE_BYTES // KEY_BYTES // 2
"""Of one question: 33 million tokens in chunks of 256. What lies beyond is not asked for."""


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Tagged by its class's name."""


# -- questions -----------------------------------------------------------------------------------------------------


class Hello(_Message, frozen=True):
    """Who serves here? now: the client's clock, which must be the server's. pid_namespace and pid_start tell whether
    the server sees the same process under `pid`. name: for people."""

    version: int
    pid: int
    pid_start: int
    pid_namespace: int
    now: float
    name: str


class Bye(_Message, frozen=True):
    """The session's end: its leases return."""


class Beat(_Message, frozen=True):
    """The client lives."""


class Register(_Message, frozen=True):
    """`BlockStore.register`."""

    engine: str
    rank: int
    geometry: Geometry


class AskGeometry(_Message, frozen=True):
    """`BlockStore.geometry`."""

    engine: str


class AskMatch(_Message, frozen=True):
    """`BlockStore.match`."""

    root: bytes
    keys: bytes


class BeginLoad(_Message, frozen=True):
    """`BlockStore.begin_load`."""

    root: bytes
    keys: bytes
    first_chunk: int


class BeginStore(_Message, frozen=True):
    """`BlockStore.begin_store`."""

    root: bytes
    keys: bytes
    first_chunk: int


class JobDone(_Message, frozen=True):
    """`BlockStore.done`. Job ids of an earlier boot mean nothing to this one."""

    job_id: int
    rank: int
    ok: bool


class Cancel(_Message, frozen=True):
    """`BlockStore.cancel`."""

    job_id: int


class AskStats(_Message, frozen=True):
    """`BlockStore.stats`, and the server's own."""


class Check(_Message, frozen=True):
    """`BlockStore.check`."""


# -- answers -------------------------------------------------------------------------------------------------------


class Welcome(_Message, frozen=True):
    """The store's arena and, in it, its boot id: with another boot id all that was said before is void."""

    arena: ArenaInfo


class Done(_Message, frozen=True):
    """It is so."""


class Refused(_Message, frozen=True):
    """It cannot be, and why: a ConfigError's text where the question came from a user's settings."""

    reason: str


class Broken(_Message, frozen=True):
    """An InvariantError's text."""

    reason: str


class Stranger(_Message, frozen=True):
    """Say `Hello` first."""


class Agreed(_Message, frozen=True):
    """The geometry on which an engine's ranks agree."""

    geometry: Geometry | None


class Found(_Message, frozen=True):
    """`Match`, with a byte a tier."""

    num_chunks: int
    tiers: bytes

    @classmethod
    def of(cls, match: Match) -> Found:
        return cls(match.num_chunks, bytes(match.tiers))

    def match(self) -> Match:
        return Match(self.num_chunks, tuple(map(_TIERS.__getitem__, self.tiers)))


class Begun(_Message, frozen=True):
    """A job whose leases the session now has."""

    job: Job | None


class Polled(_Message, frozen=True):
    """`PollResult`; comes unasked."""

    ready: tuple[int, ...]
    failed: tuple[int, ...]


class Values(_Message, frozen=True):
    """Counters and gauges by name."""

    values: dict[str, float]


Question = (
    Hello
    | Bye
    | Beat
    | Register
    | AskGeometry
    | AskMatch
    | BeginLoad
    | BeginStore
    | JobDone
    | Cancel
    | AskStats
    | Check
)
Answer = Welcome | Done | Refused | Broken | Stranger | Agreed | Found | Begun | Polled | Values

encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(tuple[int, float, Question]).decode
decode_answer = msgspec.msgpack.Decoder(tuple[int, Answer]).decode

_TIERS = {tier.value: tier for tier in Tier}


def join_keys(keys: Sequence[bytes]) -> bytes:
    """Keys as they are sent."""
    return b"".join(keys[:MOST_KEYS])


def split_keys(joined: bytes) -> list[bytes]:
    """Keys as they were. ValueError: they are no whole keys, or too many."""
    if len(joined) % KEY_BYTES or len(joined) > MOST_KEYS * KEY_BYTES:
        raise ValueError(f"{len(joined)} bytes are no keys, or too many")
    return [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]
