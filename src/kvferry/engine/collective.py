"""How ranks in processes of their own talk: messages from the leader and answers to it, over pairs of sockets.

Rank 0 leads. Nothing here has a deadline: whoever watches over the processes (`ranks`) ends those that died or stopped,
and a read from a process that has ended raises. Knows no engine and no tensor.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from kvferry.connector import wire


class Channel(Protocol):
    """A two-way stream of messages. OSError or EOFError: the other side is gone."""

    def send_bytes(self, data: bytes) -> None: ...

    def recv_bytes(self) -> bytes: ...


def open_pair() -> tuple[Connection, socket.socket]:
    """This process's end, and the end that a child process inherits."""
    ours, theirs = socket.socketpair()
    return Connection(ours.detach()), theirs


def open_inherited(descriptor: int) -> Connection:
    """A child's own end, by the descriptor that it inherited; its children do not inherit it."""
    os.set_inheritable(descriptor, False)
    return Connection(descriptor)


class LeaderCollective:
    """Rank 0 of 1 + len(channels) ranks; `channels[i]` leads to rank i + 1."""

    rank = 0

    def __init__(self, channels: Sequence[Channel]) -> None:
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
    """Any other rank; `channel` leads to rank 0."""

    def __init__(self, channel: Channel, rank: int, size: int) -> None:
        self._channel = channel
        self.rank = rank
        self.size = size

    def broadcast(self, value: Any) -> Any:
        return wire.decode(self._channel.recv_bytes())

    def gather(self, value: Any) -> list[Any]:
        self._channel.send_bytes(wire.encode(value))
        return []
