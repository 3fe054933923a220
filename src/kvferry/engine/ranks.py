"""Starts the processes of the other ranks, watches over them and ends them. Lives in rank 0. Knows no scheduler.

A follower shows its life through a pipe. When one has died, or shows none for too long, all are killed: then whatever
rank 0 waits for, a message or a sum of tensors, raises, and `failure` says what happened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import msgspec
import torch

from kvferry.connector import wire
from kvferry.engine.collective import LeaderCollective, leave_world, open_pair
from kvferry.engine.follower import PULSE_SECONDS, PoolPlan, Started, Step
from kvferry.engine.rank import RankPlan, device_of_rank
from kvferry.engine.sequence import Batch
from kvferry.errors import EngineDeadError

logger = logging.getLogger("kvferry.engine")

_IMPORT_SECONDS = 300.0
"""How long a new process may take to import torch, before it shows life."""
_EXPLAIN_SECONDS = 2.0
"""How long an error waits for the watch to say that a rank's end was its cause."""
_CLOSE_SECONDS = 10.0
"""How long followers may take to end by themselves: their connectors finish writes."""
_START = (
    "import sys; sys.path[:] = sys.argv[4:]; from kvferry.engine.follower import main; main(*map(int, sys.argv[1:4]))"
)


@dataclasses.dataclass(slots=True)
class _Process:
    """silent_seconds: since it last showed life; below 0 it has not begun to."""

    rank: int
    popen: subprocess.Popen[bytes]
    channel: Connection
    pulse: int
    silent_seconds: float = -_IMPORT_SECONDS


class Ranks:
    """Ranks 1 and up of one engine. `runtime_dir` is a private folder for all its processes, removed at the end.

    timeout_seconds: a follower that shows no life for so long is taken for lost.
    """

    def __init__(self, plan: RankPlan, timeout_seconds: float) -> None:
        self.failure: EngineDeadError | None = None
        self._timeout_seconds = timeout_seconds
        self._on_failure: Callable[[], None] = lambda: None
        self._is_closing = False
        self._has_failed = threading.Event()
        self._folder = tempfile.TemporaryDirectory(prefix="kvferry-ranks-")
        self.runtime_dir = self._folder.name
        self.plan = dataclasses.replace(plan, runtime_dir=self.runtime_dir)
        self.group = self.plan.make_group()
        self._processes: list[_Process] = []
        try:
            for rank in range(1, plan.num_ranks):
                self._processes.append(self._spawn(rank))
        except BaseException:
            self.close()
            raise
        self.collective = LeaderCollective([process.channel for process in self._processes])
        self._watch = threading.Thread(target=self._watch_over, name="kvferry-ranks", daemon=True)
        self._watch.start()

    def _spawn(self, rank: int) -> _Process:
        channel, control = open_pair()
        pulse, life = os.pipe()
        arguments = [str(control.fileno()), str(life), str(os.getpid()), *sys.path]
        try:
            popen = subprocess.Popen(
                [sys.executable, "-c", _START, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=(control.fileno(), life),
                start_new_session=True,  # an interrupt from the keyboard is for the leader alone
            )
        except BaseException:
            channel.close()
            os.close(pulse)
            raise
        finally:
            control.close()
            os.close(life)
        process = _Process(rank, popen, channel, pulse)
        first = torch.device(self.plan.device)
        device = device_of_rank(first, rank, self.plan.num_ranks)
        threads = max(1, torch.get_num_threads() // self.plan.num_ranks) if first.type == "cpu" else 0
        plan = dataclasses.replace(self.plan, rank=rank, device=device, max_threads=threads)
        channel.send_bytes(wire.encode(plan))
        return process

    # -- the engine --------------------------------------------------------------------------------------------------

    def await_started(self) -> list[Started]:
        """Every follower's answer. EngineDeadError: one of them failed or ended."""
        with self.explained():
            answers = [wire.decode(process.channel.recv_bytes()) for process in self._processes]
        for process, answer in zip(self._processes, answers, strict=True):
            if answer.failure is not None:
                raise EngineDeadError(f"rank {process.rank} cannot start: {answer.failure}")
        return answers

    def make_pools(self, plan: PoolPlan) -> None:
        """Let the followers make their pools, and join them; then rank 0 must warm up as they do. Errors as
        `await_started`."""
        with self.explained():
            self._send(wire.encode(plan))
            self.await_started()
            self.group.join()

    def announce(self, batch: Batch, tells_connector: bool) -> None:
        """Begin an iteration on every rank. OSError: one has ended."""
        self._send(msgspec.msgpack.encode(Step(batch, tells_connector)))

    def _send(self, message: bytes) -> None:
        for process in self._processes:
            process.channel.send_bytes(message)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """EngineDeadError in place of what a lost rank made raise within."""
        try:
            yield
        except (EOFError, ConnectionError) as error:
            cause = self.explain(error)
            if cause is error:
                raise
            raise cause from error

    def explain(self, error: BaseException) -> BaseException:
        """The failure that caused an error of the engine, if it was one of the ranks; else the error."""
        self._has_failed.wait(_EXPLAIN_SECONDS)
        return self.failure or error

    def on_failure(self, call: Callable[[], None]) -> None:
        """What to call, in the watch's thread, when a rank is lost."""
        self._on_failure = call
        if self._has_failed.is_set():
            call()

    # -- watch and end -----------------------------------------------------------------------------------------------

    def _watch_over(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process in self._processes:
                selector.register(process.pulse, selectors.EVENT_READ, process)
            last = time.monotonic()
            while not self._is_closing:
                for key, _ in selector.select(PULSE_SECONDS):
                    key.data.silent_seconds = 0.0
                    if not os.read(key.fd, 4096):
                        selector.unregister(key.fd)
                now = time.monotonic()
                # Time in which this process itself did not run is not held against the others.
                elapsed, last = min(now - last, 2 * PULSE_SECONDS), now
                if not self._is_closing and (lost := self._find_lost(elapsed)) is not None:
                    self._fail(lost)
                    return

    def _find_lost(self, elapsed_seconds: float) -> str | None:
        for process in self._processes:
            process.silent_seconds += elapsed_seconds
        if any(process.popen.poll() is not None for process in self._processes):
            # One that was killed takes others with it: their connections to it break.
            time.sleep(0.1)
            ended = [process for process in self._processes if process.popen.poll() is not None]
            process = min(ended, key=lambda process: process.popen.returncode)
            return f"rank {process.rank} {_describe(process.popen.returncode)}"
        for process in self._processes:
            if process.silent_seconds > self._timeout_seconds:
                return f"rank {process.rank} showed no life for {self._timeout_seconds:g} s and was killed"
        return None

    def _fail(self, what: str) -> None:
        self.failure = EngineDeadError(f"the engine has ended: {what}")
        logger.error("%s", self.failure)
        self._kill()
        self._has_failed.set()
        self.group.abort()
        self._on_failure()

    def _kill(self) -> None:
        for process in self._processes:
            process.popen.kill()
        for process in self._processes:
            process.popen.wait()

    def close(self, *, at_once: bool = False) -> None:
        """End the followers, by force if need be, and remove what they left. Further calls do nothing."""
        if self._is_closing:
            return
        self._is_closing = True
        if not at_once and self.failure is None:
            self._ask_to_end()
        self._kill()
        if hasattr(self, "_watch"):
            self._watch.join()
            leave_world(self.collective)
        for process in self._processes:
            process.channel.close()
            os.close(process.pulse)
        self.group.leave()
        self._folder.cleanup()

    def _ask_to_end(self) -> None:
        deadline = time.monotonic() + _CLOSE_SECONDS
        try:
            self._send(b"")
            for process in self._processes:
                process.popen.wait(max(0.0, deadline - time.monotonic()))
        except (OSError, subprocess.TimeoutExpired) as error:
            logger.warning("not all ranks ended by themselves: %r", error)


def _describe(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    try:
        return f"was ended by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was ended by signal {-returncode}"
