"""Makes a blocking `ByteStore` a tier: threads, a bounded queue, deadlines and breakers.

Knows names and views; not what they hold, nor who waits for them. Reading and writing fail apart: a full disk stops
taking writes and still answers reads.

A breaker opens after `_FAILURES_TO_OPEN` failures in a row. While it is open nobody waits for the backend: reads are
answered as absent, writes are refused. A thread retries in the background, after a delay that doubles until an
operation of a caller succeeds, and then closes it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from kvferry.blocks import Tier
from kvferry.observability.log import OnceLog
from kvferry.observability.metrics import Meter
from kvferry.store.base import ByteStore, PartName

_FAILURES_TO_OPEN: Final = 3
_FIRST_DELAY_SECONDS: Final = 0.5
_LONGEST_DELAY_SECONDS: Final = 60.0
_PROBE_NAME: Final[PartName] = b"kvferry probe"

OnDone = Callable[[bool], None]
"""Told once, in a tier's thread or the caller's, whether it worked."""


@dataclass(slots=True)
class _Task:
    name: PartName
    view: memoryview
    on_done: OnDone
    deadline: float


class _Breaker:
    """Failures in a row of one kind of operation. Callers serialise."""

    def __init__(self, what: str, log: OnceLog, logger: logging.Logger) -> None:
        self.what = what
        self.is_open = False
        self.probe_name = _PROBE_NAME
        self.probe_bytes = 1
        self.retry_at = 0.0
        self._log = log
        self._logger = logger
        self._num_failures = 0
        self._delay_seconds = _FIRST_DELAY_SECONDS

    def failed(self, now: float, reason: str) -> None:
        self._log.warn(self.what, "%s fails: %s; it stops after %d in a row", self.what, reason, _FAILURES_TO_OPEN)
        self._num_failures += 1
        if self._num_failures >= _FAILURES_TO_OPEN:
            self.is_open = True
            self.retry_at = now + self._delay_seconds
            self._delay_seconds = min(2 * self._delay_seconds, _LONGEST_DELAY_SECONDS)

    def succeeded(self) -> None:
        self._num_failures = 0
        self._delay_seconds = _FIRST_DELAY_SECONDS

    def close(self) -> None:
        """A probe worked. The delay stays, so that a backend that only ever answers probes is asked less and less."""
        self.is_open = False
        self._num_failures = 0
        self._log.forget(self.what)
        self._logger.info("%s works again", self.what)


class ByteTier:
    """Asynchronous access to a `ByteStore`, which it owns. Thread-safe.

    clock: seconds, monotonic. `max_queued_bytes`: most bytes of writes that wait or run; a write beyond is refused.
    Set by whoever owns the memory that queued writes hold up.
    """

    def __init__(
        self,
        store: ByteStore,
        tier: Tier,
        *,
        num_threads: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tier = tier
        self._store = store
        self.max_queued_bytes = 1 << 30
        self._clock = clock
        self._meter = Meter()
        self._logger = logging.getLogger(__name__)
        log = OnceLog(self._logger)
        name = tier.name.lower()
        self._reads = _Breaker(f"reading from {name}", log, self._logger)
        self._writes = _Breaker(f"writing to {name}", log, self._logger)
        self._forgotten: set[PartName] = set()
        self._gets: deque[_Task] = deque()
        self._puts: deque[_Task] = deque()
        self._deletes: deque[Sequence[PartName]] = deque()
        self._num_deletes = 0
        self._queued_bytes = 0
        self._num_putting = 0
        self._most_putting = max(1, num_threads - 1)
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        """Only workers wait for this, so that whoever is notified can do the work."""
        self._changed = threading.Condition(self._lock)
        """For the probe and for closing: a breaker opened, a write ended."""
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"kvferry-{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]
        self._threads.append(threading.Thread(target=self._probe, name=f"kvferry-{name}-probe", daemon=True))
        for thread in self._threads:
            thread.start()

    def contains(self, names: Sequence[PartName]) -> list[bool]:
        """Whether a get of each name may succeed. Asked on the path of every request: backends answer from memory."""
        with self._lock:
            if self._closed or self._reads.is_open:
                return [False] * len(names)
        try:
            held = self._store.contains(names)
        except OSError as error:
            self._failed(self._reads, error, None)
            return [False] * len(names)
        forgotten = self._forgotten
        return [has and name not in forgotten for has, name in zip(held, names, strict=True)] if forgotten else held

    def get(self, name: PartName, view: memoryview, on_done: OnDone, *, timeout_seconds: float) -> None:
        """Fill `view`; a get that has not begun by the time-out is not begun. A name that fails is forgotten."""
        with self._lock:
            if not (self._closed or self._reads.is_open):
                self._gets.append(_Task(name, view, on_done, self._clock() + timeout_seconds))
                self._work.notify()
                return
        self.forget([name])
        on_done(False)

    def put(self, name: PartName, view: memoryview, on_done: OnDone) -> bool:
        """Write `view`, which must not change until `on_done`. False: refused, and `on_done` is not called."""
        num_bytes = len(view)
        with self._lock:
            room = not self._queued_bytes or self._queued_bytes + num_bytes <= self.max_queued_bytes
            if self._closed or self._writes.is_open or not room:
                self._meter.add("refused_writes")
                return False
            self._queued_bytes += num_bytes
            self._puts.append(_Task(name, view, on_done, 0.0))
            self._work.notify()
            return True

    def forget(self, names: Sequence[PartName]) -> None:
        """Answer these names as absent until they are put again or reading has recovered."""
        with self._lock:
            self._forgotten.update(names)

    def touch(self, names: Sequence[PartName]) -> None:
        """See `ByteStore.touch`."""
        with contextlib.suppress(OSError):
            self._store.touch(names)

    def delete(self, names: Sequence[PartName]) -> None:
        """Answer these names as absent, and delete them when a thread has nothing better to do. What is put under one
        of them meanwhile is lost."""
        with self._lock:
            self._forgotten.update(names)
            self._deletes.append(names)
            self._num_deletes += 1
            self._work.notify()

    def overdue(self, names: Sequence[PartName]) -> None:
        """A caller gave up waiting for these names: that is a failure to read, and they are forgotten."""
        self.forget(names)
        self._failed(self._reads, "no answer before the deadline", None)

    def stats(self) -> dict[str, float]:
        """Counters and gauges, named after the tier."""
        with self._lock:
            gauges = {
                "queued_write_bytes": self._queued_bytes,
                "queued_reads": len(self._gets),
                "queued_deletes": self._num_deletes,
                "reading_off": float(self._reads.is_open),
                "writing_off": float(self._writes.is_open),
                "forgotten_parts": len(self._forgotten),
            }
        prefix = self.tier.name.lower()
        return {f"{prefix}_{name}": value for name, value in {**self._meter.snapshot(), **gauges}.items()}

    def close(self, deadline_seconds: float) -> None:
        """Finish queued writes and deletes within the deadline, give up the rest and all reads, close the backend."""
        with self._lock:
            gets, self._gets = self._gets, deque()
            self._closed = True
            self._work.notify_all()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._puts or self._num_putting), deadline_seconds)
            puts, self._puts = self._puts, deque()
            self._work.notify_all()
        for task in (*gets, *puts):
            task.on_done(False)
        if puts:
            self._meter.add("unfinished_writes", len(puts))
        for thread in self._threads:
            thread.join(deadline_seconds)
        self._store.close()

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._work.wait_for(self._has_work)
                if self._gets:
                    work = partial(self._run_get, self._gets.popleft())
                elif self._may_put():
                    work = partial(self._run_put, self._puts.popleft())
                    self._num_putting += 1
                elif self._deletes:
                    work = partial(self._run_delete, self._deletes.popleft())
                else:
                    return
            work()

    def _has_work(self) -> bool:
        return bool(self._gets or self._may_put() or self._deletes) or (self._closed and not self._puts)

    def _may_put(self) -> bool:
        return bool(self._puts) and self._num_putting < self._most_putting

    def _run_get(self, task: _Task) -> None:
        ok = False
        if self._clock() >= task.deadline:
            self._failed(self._reads, "no thread was free before the deadline", None)
        else:
            try:
                ok = self._store.get_into(task.name, task.view)
            except Exception as error:  # noqa: BLE001 a thread's boundary: counted and logged
                self._failed(self._reads, error, task)
            else:
                with self._lock:
                    self._reads.succeeded()
        if ok:
            self._meter.add("read_bytes", len(task.view))
        else:
            self._meter.add("failed_reads")
            self.forget([task.name])
        self._complete(task, ok)

    def _run_put(self, task: _Task) -> None:
        ok = False
        try:
            if not self._writes.is_open:
                self._store.put(task.name, task.view)
                ok = True
        except Exception as error:  # noqa: BLE001 a thread's boundary: counted and logged
            self._failed(self._writes, error, task)
        with self._lock:
            if ok:
                self._writes.succeeded()
                self._forgotten.discard(task.name)
            self._num_putting -= 1
            self._queued_bytes -= len(task.view)
            self._work.notify_all()
            self._changed.notify_all()
        self._meter.add("written_bytes" if ok else "failed_writes", len(task.view) if ok else 1)
        self._complete(task, ok)

    def _run_delete(self, names: Sequence[PartName]) -> None:
        try:
            self._store.delete(names)
        except Exception as error:  # noqa: BLE001 a thread's boundary: counted and logged
            self._failed(self._writes, error, None)
            self._meter.add("failed_deletes", len(names))
            names = ()
        with self._lock:
            self._forgotten.difference_update(names)
            self._num_deletes -= 1

    def _complete(self, task: _Task, ok: bool) -> None:
        try:
            task.on_done(ok)
        except Exception:
            self._logger.exception("a caller's completion failed")
            self._meter.add("failed_completions")

    def _failed(self, breaker: _Breaker, reason: object, task: _Task | None) -> None:
        with self._lock:
            if task is not None:
                breaker.probe_bytes = len(task.view)
                breaker.probe_name = _PROBE_NAME if breaker is self._writes else task.name
            breaker.failed(self._clock(), str(reason))  # An exception would keep its frames, and so the view.
            self._changed.notify_all()

    def _probe(self) -> None:
        """Retry what failed, at its size: a disk that is full for a chunk may have room for a byte."""
        while True:
            with self._lock:
                due = [breaker for breaker in (self._reads, self._writes) if breaker.is_open]
                if self._closed:
                    return
                if not due:
                    self._changed.wait()
                    continue
                breaker = min(due, key=lambda breaker: breaker.retry_at)
                delay = breaker.retry_at - self._clock()
                if delay > 0:
                    self._changed.wait(delay)
                    continue
            try:
                scratch = memoryview(bytearray(breaker.probe_bytes))
                if breaker is self._writes:
                    self._store.put(breaker.probe_name, scratch)
                    self._store.delete([breaker.probe_name])
                else:
                    self._store.get_into(breaker.probe_name, scratch)
            except Exception as error:  # noqa: BLE001 a thread's boundary: counted and logged
                self._failed(breaker, error, None)
                continue
            with self._lock:
                breaker.close()
                if breaker is self._reads:
                    self._forgotten.clear()
