"""What a store's server and its clients say to each other: msgpack of the structs below. Knows no socket.

A client's message is [number, question]; the answer is [number, answer]. A question with number 0 gets no answer.
The first question is `Hello`; a server of another version answers it with `Refused`, whatever else it has to say.
"""

from __future__ import annotations

import msgspec

from kvferry.blocks import Geometry
from kvferry.store.base import ArenaInfo

VERSION = 1
"""To be raised with every change of a struct below or of `blocks.Geometry`."""

UNANSWERED = 0
"""The number of a message that gets no answer."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Who serves here?"""

    version: int


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The store's arena and, in it, its boot id: with another boot id all that was said before is void."""

    arena: ArenaInfo


class Register(msgspec.Struct, frozen=True, tag=True):
    """`BlockStore.register`."""

    engine: str
    rank: int
    geometry: Geometry


class JobDone(msgspec.Struct, frozen=True, tag=True):
    """`BlockStore.done`. Job ids of an earlier boot mean nothing to this one."""

    job_id: int
    rank: int
    ok: bool


class Done(msgspec.Struct, frozen=True, tag=True):
    """It is so."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """It cannot be, and why: a ConfigError's text where the question came from a user's settings."""

    reason: str


Question = Hello | Register | JobDone
Answer = Welcome | Done | Refused

encode = msgspec.msgpack.Encoder().encode
decode_question = msgspec.msgpack.Decoder(tuple[int, Question]).decode
decode_answer = msgspec.msgpack.Decoder(tuple[int, Answer]).decode
