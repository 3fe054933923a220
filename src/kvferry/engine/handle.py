"""What a caller holds while a request runs: wait for it, stream it, give it up. Knows no scheduler and no tensor."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as AbstractSequence

from kvferry.engine.core import EngineCore
from kvferry.engine.outputs import CompletionOutput, FinishReason, RequestMetrics, RequestOutput
from kvferry.engine.sequence import Sequence, SequenceStatus
from kvferry.engine.text import Detokenizer
from kvferry.errors import EngineDeadError


class GenerationHandle:
    """One request under way.

    Iterating (`for` or `async for`) yields the output so far whenever it grew, and at last the finished one; a slow
    reader is not queued for, it sees fewer steps. EngineDeadError: the engine's loop died before the request ended.
    """

    def __init__(self, core: EngineCore, sequence: Sequence, prompt: str | None, text: Detokenizer | None) -> None:
        self._core = core
        self._sequence = sequence
        self._prompt = prompt
        self._prompt_tokens = tuple(sequence.tokens)
        self._text = text
        self._changed = threading.Condition()
        self._wakers: set[Callable[[], None]] = set()
        self._num_seen_tokens = 0
        self._output = self._snapshot()

    @property
    def request_id(self) -> int:
        return self._sequence.request_id

    @property
    def status(self) -> SequenceStatus:
        """Where the engine has it."""
        return self._sequence.status

    @property
    def output(self) -> RequestOutput:
        """The request so far."""
        with self._changed:
            return self._output

    def abort(self) -> None:
        """Generate no more. The request ends with ABORT unless it has ended already."""
        self._core.abort(self._sequence)

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end, at most `timeout` seconds. TimeoutError: it goes on."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._output.finished, timeout):
                raise TimeoutError(f"request {self.request_id} goes on after {timeout} s")
        return self._checked(self._output)

    def __iter__(self) -> Iterator[RequestOutput]:
        num_shown = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_more_than(num_shown))  # noqa: B023 - called at once
                output = self._output
            num_shown = len(output.token_ids)
            yield self._checked(output)
            if output.finished:
                return

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        async for _, output in follow([self]):
            yield output

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """`wake` is called in the engine's thread whenever the output grew or ended; it must not raise."""
        with self._changed:
            self._wakers.add(wake)
        try:
            yield
        finally:
            with self._changed:
                self._wakers.discard(wake)

    def more_than(self, num_tokens: int) -> RequestOutput | None:
        """The request so far if it has ended or has more than so many tokens. EngineDeadError: as iterating."""
        with self._changed:
            output = self._output if self._has_more_than(num_tokens) else None
        return self._checked(output) if output is not None else None

    def _has_more_than(self, num_tokens: int) -> bool:
        return self._output.finished or len(self._output.token_ids) > num_tokens

    def _checked(self, output: RequestOutput) -> RequestOutput:
        if output.finish_reason is FinishReason.ABORT and self._core.failure is not None:
            failure = self._core.failure
            raise EngineDeadError(f"the engine ended during request {self.request_id}: {failure}") from failure
        return output

    def on_progress(self, sequence: Sequence) -> bool:
        """The engine's listener: called in its loop's thread. True: a stop string was found."""
        stopped = False
        if self._text is not None:
            for token in sequence.output_tokens[self._num_seen_tokens :]:
                stopped = self._text.add(token) or stopped
        self._num_seen_tokens = sequence.num_output_tokens
        output = self._snapshot()
        with self._changed:
            self._output = output
            self._changed.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            wake()
        return stopped

    def _snapshot(self) -> RequestOutput:
        sequence, reason = self._sequence, self._sequence.finish_reason
        text = self._text.text(is_final=reason is not None) if self._text is not None else ""
        if self._text is not None and self._text.stopped and reason is FinishReason.LENGTH:
            reason = FinishReason.STOP
        return RequestOutput(
            request_id=sequence.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_tokens,
            metrics=_metrics(sequence),
            outputs=(CompletionOutput(text, tuple(sequence.output_tokens), reason),),
        )


async def follow(handles: AbstractSequence[GenerationHandle]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """The outputs of several requests as they grow, each with the place of its handle; ends when all have ended.

    EngineDeadError: as iterating one.
    """
    loop, grew = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed under its reader
            loop.call_soon_threadsafe(grew.set)

    num_shown = dict.fromkeys(range(len(handles)), 0)
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle.waking(wake))
        while num_shown:
            grew.clear()
            for index in list(num_shown):
                output = handles[index].more_than(num_shown[index])
                if output is None:
                    continue
                num_shown[index] = len(output.token_ids)
                if output.finished:
                    del num_shown[index]
                yield index, output
            if num_shown:
                await grew.wait()


def _metrics(sequence: Sequence) -> RequestMetrics:
    reused = sequence.num_pool_tokens + sequence.num_connector_matched_tokens
    return RequestMetrics(
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_pool_tokens=sequence.num_pool_tokens,
        num_connector_tokens=sequence.num_connector_matched_tokens,
        num_computed_tokens=sequence.num_prompt_tokens - reused,
        ttft_seconds=_since(sequence.arrived_at, sequence.first_token_at),
        duration_seconds=_since(sequence.arrived_at, sequence.finished_at),
    )


def _since(start: float, end: float | None) -> float | None:
    return None if end is None else end - start
