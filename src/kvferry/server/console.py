"""What people ask a server: one question after the other, each with its answer or an error. Knows no terminal."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Final, Self, TypeVar

import zmq

from kvferry.config import StoreOptions
from kvferry.errors import ConfigError, InvariantError
from kvferry.server import protocol
from kvferry.server.endpoint import Endpoint
from kvferry.server.link import Link
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
            self._link = Link(self._context, endpoint, protocol.ATTENDANCE_LINK + secrets.token_bytes(16), options)
            self._link.await_connected(CONNECT_SECONDS)
            self._greet()
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._link.tell(protocol.Bye())
        self._link.close(_LINGER_SECONDS)
        self._context.term()

    def stats(self) -> dict[str, float]:
        """Counters and gauges by name."""
        return self._ask(protocol.AskStats(), protocol.Values).values

    def models(self) -> list[protocol.Model]:
        """The geometries of live engines."""
        return self._ask(protocol.AskModels(), protocol.Models).models

    def usage(self) -> list[Usage]:
        """What lies in memory."""
        return self._ask(protocol.AskUsage(), protocol.Used).usage

    def clients(self) -> list[protocol.Client]:
        """Who is connected, this one included."""
        return self._ask(protocol.AskClients(), protocol.Clients).clients

    def clear(self, selection: Selection) -> Tally:
        """See `ManagedStore.clear`."""
        return self._ask(protocol.Clear(selection), protocol.Counted).tally

    def keep(self, selection: Selection, ttl_seconds: float) -> Tally:
        """See `ManagedStore.keep`."""
        return self._ask(protocol.Keep(selection, ttl_seconds), protocol.Counted).tally

    def unkeep(self, selection: Selection) -> Tally:
        """See `ManagedStore.unkeep`."""
        return self._ask(protocol.Unkeep(selection), protocol.Counted).tally

    def prefetch(self, model: protocol.Model, keys: Sequence[bytes], salt: str | None) -> Prefetch:
        """See `ManagedStore.prefetch`."""
        return self._ask(protocol.Bring(model.root, protocol.join_keys(keys), salt), protocol.Brought).prefetch

    def check(self) -> None:
        """InvariantError: the store's books are wrong."""
        self._ask(protocol.Check(), protocol.Done)

    def _greet(self) -> None:
        answer = self._link.ask(greeting(protocol.VERSION, time.monotonic(), "kvferry command"), CONNECT_SECONDS)
        if isinstance(answer, protocol.Refused):
            raise ConfigError(f"the cache server at {self._url} refuses: {answer.reason}")
        if not isinstance(answer, protocol.Welcome):
            raise ConfigError(f"no cache server answers at {self._url}: start one with `kvferry server`")

    def _ask(self, question: protocol.Question, kind: type[_Answer]) -> _Answer:
        answer = self._link.ask(question, _ANSWER_SECONDS)
        if isinstance(answer, protocol.Stranger):
            self._greet()
            answer = self._link.ask(question, _ANSWER_SECONDS)
        if isinstance(answer, protocol.Broken):
            raise InvariantError(answer.reason)
        if isinstance(answer, protocol.Refused):
            raise ConfigError(answer.reason)
        if not isinstance(answer, kind):
            raise ConfigError(f"the cache server at {self._url} does not answer any more")
        return answer
