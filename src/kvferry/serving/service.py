"""Between the HTTP routes and the engine: bounds the queue, tokenises beside the event loop, and ends requests whose
client has gone. Knows no route and no shape of an answer.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from fastapi import Request

from kvferry.engine.handle import GenerationHandle
from kvferry.engine.llm import LLM
from kvferry.engine.sequence import SequenceStatus
from kvferry.errors import EngineDeadError
from kvferry.serving.metrics import ServingMetrics
from kvferry.serving.refusals import refusal
from kvferry.serving.schema import Body


class Service:
    """One engine's door.

    name: what clients call the model. max_queued: most requests that may wait; beyond it they are told to come again.
    Methods are called in the event loop's thread, where not said otherwise.
    """

    def __init__(self, llm: LLM, name: str, max_queued: int) -> None:
        self.llm = llm
        self.name = name
        self.metrics = ServingMetrics(self.count_states, llm.connector_manager)
        self._max_queued = max_queued
        self._handles: set[GenerationHandle] = set()
        self._num_coming = 0
        self._is_ending = False
        # One thread: a tokenizer is not safe in several, and requests keep their order.
        self._tokenizing = ThreadPoolExecutor(1, "kvferry-tokenizer")

    def check_alive(self) -> None:
        """EngineDeadError: nothing will be served any more."""
        if self.llm.failure is not None:
            raise EngineDeadError(f"the engine has ended: {self.llm.failure}") from self.llm.failure

    def check_name(self, name: str | None) -> None:
        """HTTPException: a client asks for another model. None stands for the one that is served."""
        if name not in (None, self.name):
            message = f"no model is called {name!r} here; there is {self.name!r}"
            raise refusal(404, message, "model", "model_not_found")

    def count_states(self) -> dict[str, int]:
        """Requests that run, and that wait to be tokenised, admitted or loaded. Any thread."""
        states = Counter(handle.status for handle in list(self._handles))
        num_waiting = self._num_coming + states[SequenceStatus.WAITING] + states[SequenceStatus.LOADING]
        return {"running": states[SequenceStatus.RUNNING], "waiting": num_waiting}

    async def submit(self, body: Body) -> list[GenerationHandle]:
        """Start what a body asks for. HTTPException: unsupported, or too much. RequestError: it cannot be served."""
        self.check_name(body.model)
        body.check_supported()
        self._make_room_for(body.num_requests)
        self._num_coming += body.num_requests
        try:
            loop = asyncio.get_running_loop()
            handles = await loop.run_in_executor(self._tokenizing, self._start, body)
            self._handles.update(handles)
            if self._is_ending:
                self.abort_all()
        finally:
            self._num_coming -= body.num_requests
        return handles

    def _make_room_for(self, number: int) -> None:
        if number > self._max_queued:
            raise refusal(400, f"{number} prompts are more than may ever wait here ({self._max_queued})", "prompt")
        if self.count_states()["waiting"] + number > self._max_queued:
            raise refusal(429, f"{self._max_queued} requests wait already", code="queue_full")

    def _start(self, body: Body) -> list[GenerationHandle]:
        """In the tokenizer's thread. All of them or none."""
        handles: list[GenerationHandle] = []
        try:
            for prompt, params in body.requests(self.llm):
                handles.append(self.llm.generate_async(prompt, params))
        except BaseException:
            for handle in handles:
                handle.abort()
            raise
        return handles

    def release(self, handles: Sequence[GenerationHandle]) -> None:
        """Nobody waits for these any more: those that go on end."""
        for handle in handles:
            handle.abort()
            self._handles.discard(handle)
            self.metrics.count(handle.output)

    def abort_all(self) -> None:
        """End all requests, also those that come later; their clients are told."""
        self._is_ending = True
        for handle in list(self._handles):
            handle.abort()

    def close(self) -> None:
        """Let the tokenizer's thread go."""
        self._tokenizing.shutdown()


class Exchange:
    """One client's question and answer. Requests to the engine that it starts end with it, and with the client."""

    def __init__(self, service: Service, request: Request) -> None:
        self.service = service
        self._request = request
        self._handles: list[GenerationHandle] = []
        self._watch: asyncio.Task[None] | None = None

    async def start(self, body: Body) -> list[GenerationHandle]:
        """As `Service.submit`."""
        self._handles = await self.service.submit(body)
        self._watch = asyncio.create_task(self._end_with_client())
        return self._handles

    async def _end_with_client(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        for handle in self._handles:
            handle.abort()

    def close(self) -> None:
        """The answer is sent, or will never be."""
        if self._watch is not None:
            self._watch.cancel()
        self.service.release(self._handles)


async def exchange(request: Request) -> AsyncIterator[Exchange]:
    """FastAPI's dependency: closed after the last byte of the answer, and also if there is never one."""
    opened = Exchange(request.app.state.service, request)
    try:
        yield opened
    finally:
        opened.close()
