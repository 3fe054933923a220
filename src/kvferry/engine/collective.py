"""How ranks in processes of their own talk: messages from the leader and answers to it, over pairs of sockets.

Rank 0 leads. Nothing here has a deadline: whoever watches over the processes (`ranks`) ends those that died or stopped,
and a read from a process that has ended raises. Knows no engine and no tensor.

The functions at the end are for connectors that ask for their rank as TensorRT-LLM's do, of nobody in particular. The
answer is that of the engine that the thread acts for: it constructs it, or is its loop. For any other thread it is that
of the engine whose follower the process is, or that was started last.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from multiprocessing.connection import Connection
from typing import Any

from kvferry.connector import wire
from kvferry.connector.manager import Collective, LocalCollective
from kvferry.errors import ConnectorError


def open_pair() -> tuple[Connection, socket.socket]:
    """This process's end, and the end that a child process inherits."""
    ours, theirs = socket.socketpair()
    return Connection(ours.detach()), theirs


def open_inherited(descriptor: int) -> Connection:
    """A child's own end, by the descriptor that it inherited; its children do not inherit it."""
    os.set_inheritable(descriptor, False)
    return Connection(descriptor)


class LeaderCollective:
    """Rank 0 of 1 + len(channels) ranks; `channels[i]` leads to rank i + 1. OSError or EOFError: that rank is gone."""

    rank = 0

    def __init__(self, channels: Sequence[Connection]) -> None:
        self._channels = channels
        self.size = 1 + len(channels)

    def broadcast(self, value: Any) -> Any:
        data = wire.encode(value)
        for channel in self._channels:
            channel.send_bytes(data)
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value, *(wire.decode(channel.recv_bytes()) for channel in self._channels)]


class FollowerCollective:
    """Any other rank; `channel` leads to rank 0. OSError or EOFError: it is gone."""

    def __init__(self, channel: Connection, rank: int, size: int) -> None:
        self._channel = channel
        self.rank = rank
        self.size = size

    def broadcast(self, value: Any) -> Any:
        return wire.decode(self._channel.recv_bytes())

    def gather(self, value: Any) -> list[Any]:
        self._channel.send_bytes(wire.encode(value))
        return []


_last: Collective = LocalCollective()
_own: ContextVar[Collective | None] = ContextVar("collective", default=None)


def enter_world(collective: Collective) -> None:
    """Threads that act for no engine are this rank's from now on."""
    global _last  # noqa: PLW0603 - like MPI's, this world is the process's
    _last = collective


def leave_world(collective: Collective) -> None:
    """They are alone again, unless another world was entered since."""
    if _last is collective:
        enter_world(LocalCollective())


@contextlib.contextmanager
def acting_for(collective: Collective) -> Iterator[None]:
    """What this thread calls within is called by that rank."""
    token = _own.set(collective)
    try:
        yield
    finally:
        _own.reset(token)


def _world() -> Collective:
    return _own.get() or _last


def world_rank() -> int:
    """The caller's rank."""
    return _world().rank


def world_size() -> int:
    """How many ranks there are."""
    return _world().size


def broadcast(value: Any, root: int = 0) -> Any:
    """Rank 0's value, on every rank. All ranks must call it, between the same two hooks or in the same one.

    ConnectorProtocolError: it holds something that cannot cross processes (see `connector.wire`). ConnectorError: the
    root is another rank.
    """
    if root != 0:
        raise ConnectorError(f"only rank 0 can broadcast here, not rank {root}")
    return _world().broadcast(value)


def allgather(value: Any) -> list[Any]:
    """All ranks' values in the order of ranks, on every rank. Who must call it and errors: as `broadcast`."""
    world = _world()
    return list(world.broadcast(world.gather(value)))


def barrier() -> None:
    """Return when all ranks have called it."""
    allgather(None)
