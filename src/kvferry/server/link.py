"""One connection to a server: questions with a deadline, and their answers by number. Knows no store.

Messages leave in the order of `tell` and `ask`. Nothing is queued for a server that is not connected: `ask` fails at
once then, and what was told waits in here.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec
import zmq

from kvferry.config import StoreOptions
from kvferry.server import protocol
from kvferry.server.curve import protect_client
from kvferry.server.endpoint import Endpoint

_RECONNECT_MILLISECONDS: Final = 50
_MOST_UNSENT: Final = 10_000
_NO_DEADLINE: Final = 0.0


class Link:
    """A DEALER socket. One thread at a time, except for `tell`.

    unasked: takes what comes without having been asked for, and answers that come too late.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: Endpoint,
        routing_id: bytes,
        options: StoreOptions,
        unasked: Callable[[protocol.Answer], None] = lambda answer: None,
    ) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.routing_id = routing_id
        self.socket.immediate = True
        self.socket.linger = 0
        self.socket.reconnect_ivl = _RECONNECT_MILLISECONDS
        self._unasked = unasked
        self._numbers = itertools.count(protocol.UNNUMBERED + 1)
        self._unsent: deque[bytes] = deque(maxlen=_MOST_UNSENT)
        if options.server_key is not None:
            protect_client(self.socket, options.server_key, options.client_secret)
        self.socket.connect(endpoint.url)

    def await_connected(self, timeout_seconds: float) -> None:
        """Return when the server can be asked, or time is up."""
        self.socket.poll(timeout_seconds * 1000, zmq.POLLOUT)

    def tell(self, question: protocol.Question) -> None:
        """Say what needs no answer, with the next `flush` or `ask`."""
        self._unsent.append(protocol.encode((protocol.UNNUMBERED, _NO_DEADLINE, question)))

    def flush(self) -> bool:
        """Send what was told; false: the server takes nothing at the moment."""
        while self._unsent:
            if not self._send(self._unsent[0]):
                return False
            self._unsent.popleft()
        return True

    def ask(self, question: protocol.Question, timeout_seconds: float) -> protocol.Answer | None:
        """The answer, or None if there is none in time."""
        deadline = time.monotonic() + timeout_seconds
        number = next(self._numbers)
        if not (self.flush() and self._send(protocol.encode((number, deadline, question)))):
            return None
        while (remaining_seconds := deadline - time.monotonic()) > 0:
            received = self._receive(remaining_seconds)
            if received is None:
                return None
            if received[0] == number:
                return received[1]
            self._unasked(received[1])
        return None

    def listen(self, timeout_seconds: float = 0.0) -> None:
        """Send what was told and take in what has come; wait for something if nothing has."""
        self.flush()
        received = self._receive(timeout_seconds)
        while received is not None:
            self._unasked(received[1])
            received = self._receive(0.0)

    def forget(self) -> None:
        """Drop what was told and not sent: it was for a server that is gone."""
        self._unsent.clear()

    def close(self, linger_seconds: float = 0.0) -> None:
        """Wait at most so long for what was told to leave. Further calls are errors."""
        self.flush()
        self.socket.close(int(linger_seconds * 1000))

    def _send(self, message: bytes) -> bool:
        try:
            self.socket.send(message, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _receive(self, timeout_seconds: float) -> tuple[int, protocol.Answer] | None:
        """The next message's number and answer; None: nothing came in time."""
        self.socket.rcvtimeo = math.ceil(timeout_seconds * 1000)
        try:
            return protocol.decode_answer(self.socket.recv())
        except zmq.Again:
            return None
        except msgspec.MsgspecError as error:
            return protocol.UNNUMBERED, protocol.Refused(f"the server speaks another protocol: {error}")
