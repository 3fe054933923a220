"""The engine's loop: one thread that schedules, runs passes and hands out tokens. Knows no text and no model files.

Callers talk to it through `submit` and `abort`, from any thread; it answers through each sequence's listener, from its
own. Only the loop's thread touches the scheduler, the executor and the connector's manager.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import thread as _registered_before  # noqa: F401
from typing import Any

import torch

from kvferry.connector.manager import Finished, KvCacheConnectorManager, LocalCollective
from kvferry.engine.collective import acting_for
from kvferry.engine.executor import Executor
from kvferry.engine.outputs import FinishReason
from kvferry.engine.ranks import Ranks
from kvferry.engine.sampling import sample
from kvferry.engine.scheduler import Plan, Scheduler
from kvferry.engine.sequence import Batch, Sequence
from kvferry.errors import EngineDeadError

logger = logging.getLogger("kvferry.engine")

Listener = Callable[[Sequence], bool]
"""Told of each new token, in the loop's thread; true ends the sequence (a stop string was found)."""

_TRANSFER_POLL_SECONDS = 0.001
"""How often transfers are asked after when nothing is computed."""

_cores: weakref.WeakSet[EngineCore] = weakref.WeakSet()


def _shut_down_all() -> None:
    """The process ends, and finds engines running."""
    for core in list(_cores):
        core.shutdown()


# Connectors may copy in pools of threads, which concurrent.futures ends before anything that `atexit` calls, by this
# same means. What is registered last is called first.
getattr(threading, "_register_atexit", atexit.register)(_shut_down_all)


class EngineCore:
    """Runs until `shutdown`. If the loop dies, every sequence ends with ABORT and `failure` says why."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        manager: KvCacheConnectorManager | None,
        ranks: Ranks | None = None,
    ) -> None:
        self.failure: BaseException | None = None
        self._ranks = ranks
        self._scheduler = scheduler
        self._executor = executor
        self._manager = manager
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listeners: dict[int, Listener] = {}
        self._sequences: dict[int, Sequence] = {}
        self._generators: dict[int, torch.Generator] = {}
        self._pause_seconds = 0.0
        self._is_closed = False
        self._close_lock = threading.RLock()  # a collector's finalizer may shut down where the lock is held
        self._thread = threading.Thread(target=self._run, name="kvferry-engine", daemon=True)
        self._thread.start()
        _cores.add(self)
        if ranks is not None:
            ranks.on_failure(lambda: self._commands.put(self._raise_failure))

    # -- any thread --------------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence, listener: Listener) -> None:
        """Queue a sequence. EngineDeadError: the engine has ended."""
        with self._close_lock:
            self._check_alive()
            self._sequences[sequence.request_id] = sequence
            self._listeners[sequence.request_id] = listener
            self._commands.put(lambda: self._scheduler.add(sequence))

    def abort(self, sequence: Sequence) -> None:
        """Give a sequence up; its listener is told unless it ended already."""
        self._commands.put(lambda: self._end(sequence, FinishReason.ABORT))

    def call(self, function: Callable[[], None]) -> None:
        """Run a function in the loop's thread between two iterations, wait, and raise what it raised.
        EngineDeadError: the engine has ended."""
        done = threading.Event()
        raised: list[Exception] = []

        def run() -> None:
            try:
                function()
            except Exception as error:  # noqa: BLE001 - the caller's, who is told
                raised.append(error)
            done.set()

        with self._close_lock:
            self._check_alive()
            self._commands.put(run)
        while not done.wait(0.1):
            if not self._thread.is_alive():
                self._check_alive()
        if raised:
            raise raised[0]

    def _check_alive(self) -> None:
        """EngineDeadError: the engine has ended."""
        if self._is_closed or self.failure is not None:
            is_told = isinstance(self.failure, EngineDeadError)
            raise EngineDeadError(str(self.failure) if is_told else "the engine has ended") from self.failure

    def shutdown(self) -> None:
        """Abort what runs, tell the connector, end the thread. Further calls do nothing."""
        with self._close_lock:
            if not self._is_closed:
                self._is_closed = True
                self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- the loop's thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with acting_for(self._ranks.collective if self._ranks is not None else LocalCollective()):
            self._run_until_shutdown()

    def _run_until_shutdown(self) -> None:
        try:
            while self._take_commands():
                self.step()
        except BaseException as error:  # the thread boundary: whoever waits must be told
            failure = error if self._ranks is None else self._ranks.explain(error)
            with self._close_lock:
                self.failure = failure
            logger.exception("the engine's loop ended")
        finally:
            if self._ranks is not None:
                self._ranks.close(at_once=self.failure is not None)
            for sequence in list(self._sequences.values()):
                sequence.finish_reason = FinishReason.ABORT
                self._notify(sequence)
            if self._manager is not None:
                self._manager.shutdown()

    def _raise_failure(self) -> None:
        """A rank was lost while nothing ran."""
        assert self._ranks is not None
        assert self._ranks.failure is not None
        raise self._ranks.failure

    def _take_commands(self) -> bool:
        """Run what callers queued; waits while there is nothing to do, and a little while only transfers run. False:
        shut down."""
        while True:
            is_busy = self._scheduler.has_requests or self._scheduler.has_transfers
            try:
                command = self._commands.get(timeout=self._pause_seconds if is_busy else None)
            except queue.Empty:
                return True
            self._pause_seconds = 0.0
            if command is None:
                for sequence in list(self._sequences.values()):
                    self._end(sequence, FinishReason.ABORT)
                return False
            command()

    def step(self) -> None:
        """One iteration: plan, tell the connector, compute, ask what transfers ended, hand out tokens."""
        plan = self._scheduler.schedule()
        if plan.starved is not None:
            logger.error("request %d ends: late transfers hold the blocks it needs", plan.starved.request_id)
            self._end(plan.starved, FinishReason.ABORT)
        if self._ranks is not None:
            self._ranks.announce(plan.batch, plan.tell_connector)
        drawn = self._compute(plan)
        finished = self._manager.collect() if self._manager is not None else Finished()
        for sequence in self._scheduler.update(plan.batch, drawn, finished):
            if self._notify(sequence):
                self._end(sequence, FinishReason.STOP)
        has_idled = not plan.batch.slices and self._scheduler.has_transfers
        self._pause_seconds = _TRANSFER_POLL_SECONDS if has_idled else 0.0

    def _compute(self, plan: Plan) -> dict[int, int]:
        """Run the pass between the connector's hooks; returns each drawing sequence's next token."""
        manager, stream = self._manager, self._executor.stream
        if manager is not None and plan.tell_connector:
            manager.exchange_metadata(plan.output)
            manager.start_pass(stream)
        drawn: dict[int, int] = {}
        if plan.batch.slices:
            logits = self._executor.forward(plan.batch, manager)
            drawn = self._draw(plan.batch, logits)
        if manager is not None and plan.tell_connector:
            manager.end_pass(stream)
        return drawn

    def _draw(self, batch: Batch, logits: torch.Tensor) -> dict[int, int]:
        drawing = [self._sequences[piece.request_id] for piece in batch.slices if piece.draws]
        if all(sequence.params.temperature == 0 for sequence in drawing):
            tokens = logits.argmax(-1).tolist()
            return {sequence.request_id: token for sequence, token in zip(drawing, tokens, strict=True)}
        return {
            sequence.request_id: sample(row, sequence.params, self._generator(sequence, row.device))
            for sequence, row in zip(drawing, logits, strict=True)
        }

    def _generator(self, sequence: Sequence, device: Any) -> torch.Generator | None:
        if sequence.params.seed is None:
            return None
        if sequence.request_id not in self._generators:
            self._generators[sequence.request_id] = torch.Generator(device).manual_seed(sequence.params.seed)
        return self._generators[sequence.request_id]

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.request_id not in self._sequences:
            return
        self._scheduler.finish(sequence, reason)
        self._notify(sequence)

    def _notify(self, sequence: Sequence) -> bool:
        """Tell the listener; forget a sequence that has ended. True: the listener wants it to end."""
        now = time.perf_counter()
        if sequence.first_token_at is None and sequence.num_output_tokens:
            sequence.first_token_at = now
        if sequence.finish_reason is not None:
            sequence.finished_at = now
        wants_end = self._listeners[sequence.request_id](sequence)
        if sequence.finish_reason is not None:
            for table in (self._sequences, self._listeners, self._generators):
                table.pop(sequence.request_id, None)
            return False
        return wants_end
