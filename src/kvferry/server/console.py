"""What people ask a server: one question after the other, each with its answer or an error. Knows no terminal."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self, TypeVar

import zmq

from kvferry.config import StoreOptions
from kvferry.errors import ConfigError, InvariantError
from kvferry.server.endpoint import Endpoint
from kvferry.server.link import Link
from kvferry.server.protocol import (
    ATTENDANCE_LINK,
    VERSION,
    AskClients,
    AskModels,
    AskStats,
    AskUsage,
    Bring,
    Broken,
    Brought,
    Bye,
    Check,
    Clear,
    Client,
    Clients,
    Counted,
    Done,
    Keep,
    Model,
    Models,
    Question,
    Refused,
    Stranger,
    Unkeep,
    Used,
    Values,
    Welcome,
    join_keys,
)
from kvferry.server.sessions import greeting
from kvferry.store.base import Prefetch, Selection, Tally, Usage

CONNECT_SECONDS: Final = 0.8
_ANSWER_SECONDS: Final = 60.0
_LINGER_SECONDS: Final = 0.1

_Answer = TypeVar("_Answer")


class Console:
    """A connection to the server at `url`. A session is greeted anew if it was silent for long.

    ConfigError: no server answers there, it refuses, or the URL or a key is none. InvariantError: from `check`.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._url = url
        endpoint = Endpoint.parse(url)
        self._context = zmq.Context(io_threads=1)
        try:
            self._link = Link(self._context, endpoint, ATTENDANCE_LINK + secrets.token_bytes(16), options)
            self._link.await_connected(CONNECT_SECONDS)
            self._greet()
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        self._link.tell(Bye())
        self._link.close(_LINGER_SECONDS)
        self._context.term()

    def stats(self) -> dict[str, float]:
        """Counters and gauges by name."""
        return self._ask(AskStats(), Values).values

    def models(self) -> list[Model]:
        """The geometries of live engines."""
        return self._ask(AskModels(), Models).models

    def usage(self) -> list[Usage]:
        """What lies in memory."""
        return self._ask(AskUsage(), Used).usage

    def clients(self) -> list[Client]:
        """Who is connected, this one included."""
        return self._ask(AskClients(), Clients).clients

    def clear(self, selection: Selection) -> Tally:
        """See `Store.clear`."""
        return self._ask(Clear(selection), Counted).tally

    def keep(self, selection: Selection, ttl_seconds: float) -> Tally:
        """See `Store.keep`."""
        return self._ask(Keep(selection, ttl_seconds), Counted).tally

    def unkeep(self, selection: Selection) -> Tally:
        """See `Store.unkeep`."""
        return self._ask(Unkeep(selection), Counted).tally

    def prefetch(self, model: Model, keys: Sequence[bytes], salt: str | None) -> Prefetch:
        """See `Store.prefetch`."""
        return self._ask(Bring(model.root, join_keys(keys), salt), Brought).prefetch

    def check(self) -> None:
        """InvariantError: the store's books are wrong."""
        self._ask(Check(), Done)

    def _greet(self) -> None:
        answer = self._link.ask(greeting(VERSION, time.monotonic(), "kvferry command"), CONNECT_SECONDS)
        if isinstance(answer, Refused):
            raise ConfigError(f"the cache server at {self._url} refuses: {answer.reason}")
        if not isinstance(answer, Welcome):
            raise ConfigError(f"no cache server answers at {self._url}: start one with `kvferry server`")

    def _ask(self, question: Question, kind: type[_Answer]) -> _Answer:
        answer = self._link.ask(question, _ANSWER_SECONDS)
        if isinstance(answer, Stranger):
            self._greet()
            answer = self._link.ask(question, _ANSWER_SECONDS)
        if isinstance(answer, Broken):
            raise InvariantError(answer.reason)
        if isinstance(answer, Refused):
            raise ConfigError(answer.reason)
        if not isinstance(answer, kind):
            raise ConfigError(f"the cache server at {self._url} does not answer any more")
        return answer
