"""One thread that runs jobs beside the forward passes, and waits for those that are not ready. Knows no copy.

submit        queued; the thread runs it when its turn comes
wait_for      kept aside until `is_ready` says yes or no, or its deadline comes, then run or given up
cancel        one that is still kept aside is given up
flush         wait until some have ended
wait_for_end  wait until any has ended
take_ended    what has ended since the last call, and how
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

_SHORTEST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.001, 0.01
_POLLS_PER_AGE = 8
"""Jobs that wait are looked at again after an eighth of the time that the youngest has waited, within these limits. A
look takes 65 microseconds of a core and of the interpreter, which passes need too."""


logger = logging.getLogger(__name__)


class Readiness(enum.Enum):
    """Whether a job can run."""

    READY = "ready"
    NOT_YET = "not yet"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Task:
    """A job in the background. `run(True)` does it, `run(False)` gives it up; the answer: whether it is done well, or
    None if somebody else goes on with it."""

    job_id: int
    run: Callable[[bool], bool | None]


@dataclass(frozen=True, slots=True)
class _Waiting:
    task: Task
    readiness: Callable[[], Readiness]
    since: float
    deadline: float


class Background:
    """Runs tasks in the order in which they can run. Thread-safe. The thread starts with the first task."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._runnable: deque[tuple[Task, bool]] = deque()
        self._waiting: dict[int, _Waiting] = {}
        self._open: set[int] = set()
        self._ended: dict[int, bool] = {}
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._end = threading.Condition(lock)
        self._closed = False
        self._thread: threading.Thread | None = None

    def submit(self, task: Task, *, wanted: bool = True) -> None:
        """Run a task when its turn comes, or give it up then."""
        with self._work:
            self._open.add(task.job_id)
            self._runnable.append((task, wanted))
            self._wake()

    def wait_for(self, task: Task, readiness: Callable[[], Readiness], timeout_seconds: float) -> None:
        """Run a task once it is ready; give it up if it never will be or is not within `timeout_seconds`."""
        with self._work:
            now = self._clock()
            self._open.add(task.job_id)
            self._waiting[task.job_id] = _Waiting(task, readiness, now, now + timeout_seconds)
            self._wake()

    def cancel(self, job_id: int) -> None:
        """Give up a task that is still being waited for. One that runs, runs to its end."""
        with self._work:
            waiting = self._waiting.pop(job_id, None)
            if waiting is not None:
                self._runnable.append((waiting.task, False))
                self._wake()

    def flush(self, job_ids: Collection[int]) -> None:
        """Return when these tasks have ended. Those that are unknown have."""
        with self._end:
            self._end.wait_for(lambda: self._open.isdisjoint(job_ids))

    @property
    def is_busy(self) -> bool:
        """Whether tasks have not ended."""
        return bool(self._open)

    def wait_for_end(self, seconds: float) -> None:
        """Return when there is something to take, or nothing left that could end, or after so long."""
        with self._end:
            self._end.wait_for(lambda: self._ended or not self._open, seconds)

    def take_ended(self) -> dict[int, bool]:
        """Job ids that ended since the last call, and whether well."""
        if not self._ended:
            return {}
        with self._work:
            ended, self._ended = self._ended, {}
        return ended

    def close(self) -> None:
        """Give up what is waited for, run the rest, end the thread."""
        with self._work:
            self._closed = True
            self._runnable.extend((waiting.task, False) for waiting in self._waiting.values())
            self._waiting.clear()
            self._work.notify()
        if self._thread is not None:
            self._thread.join()

    def _wake(self) -> None:
        assert not self._closed, "nothing is submitted after close"
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        self._work.notify()

    def _serve(self) -> None:
        while True:
            with self._work:
                while not self._runnable:
                    if self._closed:
                        return
                    self._work.wait(self._poll_seconds())
                    self._look()
                task, wanted = self._runnable.popleft()
            try:
                ok = task.run(wanted)
            except Exception:  # the thread boundary
                logger.exception("a job beside the passes broke off")
                ok = False
            with self._end:
                if ok is not None:
                    self._ended[task.job_id] = ok
                self._open.discard(task.job_id)
                self._end.notify_all()

    def _poll_seconds(self) -> float | None:
        """How long to sleep; None: nothing waits."""
        if not self._waiting:
            return None
        age = self._clock() - max(waiting.since for waiting in self._waiting.values())
        return min(max(age / _POLLS_PER_AGE, _SHORTEST_POLL_SECONDS), _LONGEST_POLL_SECONDS)

    def _look(self) -> None:
        """Move those that wait no longer."""
        now = self._clock()
        for job_id, waiting in list(self._waiting.items()):
            readiness = waiting.readiness()
            if readiness is Readiness.NOT_YET and now < waiting.deadline:
                continue
            del self._waiting[job_id]
            self._runnable.append((waiting.task, readiness is Readiness.READY))
