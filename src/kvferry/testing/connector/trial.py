"""What a scenario works with: engines with the connector under test, and questions whose answers are checked."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kvferry.config import KvCacheConfig
from kvferry.engine.handle import GenerationHandle
from kvferry.engine.llm import LLM
from kvferry.engine.outputs import FinishReason, RequestOutput
from kvferry.engine.sampling import SamplingParams
from kvferry.errors import ConfigError, EngineDeadError, InvariantError, RequestError
from kvferry.testing.connector.faults import Fault
from kvferry.testing.connector.probe import ProbeScheduler, ProbeWorker
from kvferry.testing.connector.reference import Reference
from kvferry.testing.connector.session import Session
from kvferry.testing.models import VOCAB_SIZE

_REQUEST_SECONDS = 120.0
HANG_SECONDS = 30.0
"""A hook that has not returned by then is taken to hang."""
_POLL_SECONDS = 0.002
_FEWEST_TOKENS = 32


class NotOffered(Exception):  # noqa: N818 - nothing is wrong
    """The connector, or this machine, has not got what a scenario is about."""


class Stuck(Exception):  # noqa: N818 - its fault was noted before
    """The scenario cannot go on."""


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """How a connector is checked.

    model: a folder or hub name; default a tiny model with random weights, made for the check. device: torch's name.
    tokens_per_block, chunk_tokens: the engine's block, and the smallest run of tokens that the connector keeps; prompts
    are some three chunks long. expect_restart_hit: the connector claims to be persistent. deadline_seconds: for each
    asynchronous load and save.
    """

    model: str | None = None
    device: str = "cpu"
    tokens_per_block: int = 32
    chunk_tokens: int = 256
    expect_restart_hit: bool = False
    deadline_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.tokens_per_block < 2 or self.chunk_tokens % self.tokens_per_block:
            raise ConfigError(
                f"chunk_tokens={self.chunk_tokens} is not a multiple of tokens_per_block={self.tokens_per_block}, "
                "or a block is less than 2 tokens"
            )
        if not self.tokens_per_block <= self.chunk_tokens <= 512:
            raise ConfigError(f"chunk_tokens={self.chunk_tokens} is not between tokens_per_block and 512")


class Trial:
    """What the scenarios of one check share.

    chunk: whole chunks of the connector's, by which prompts are measured. nonce: makes salts unlike any other check's.
    num_hit_tokens: that the connector brought in this scenario. is_stuck: no further engine can be trusted to run.
    """

    def __init__(self, session: Session, options: CheckOptions, reference: Callable[[str], Reference]) -> None:
        self.session = session
        self.options = options
        self.block = options.tokens_per_block
        # Shorter prompts could not be aborted in time, nor be cut into parts.
        self.chunk = options.chunk_tokens * -(-_FEWEST_TOKENS // options.chunk_tokens)
        self.nonce = session.session_id[:8]
        self.is_stuck = False
        self.num_hit_tokens = 0
        self.reference = reference
        self._scenario = ""
        self._has_started = False

    @property
    def pool_tokens(self) -> int:
        """What an engine's pool holds: the longest prompt, and a little."""
        return 4 * self.chunk + 4 * self.block

    def begin(self, scenario: str) -> None:
        """Forget the scenario before."""
        self.session.begin()
        self._scenario = scenario
        self.num_hit_tokens = 0

    def prompt(self, num_tokens: int, seed: int = 0) -> list[int]:
        """Random tokens; prompts of one seed are prefixes of each other, and none is another scenario's."""
        rng = random.Random(f"{self._scenario} {seed}")
        return [rng.randrange(2, VOCAB_SIZE) for _ in range(num_tokens)]

    @contextmanager
    def engine(
        self, *, family: str = "llama", max_num_tokens: int = 8192, num_ranks: int = 1
    ) -> Iterator[CheckedEngine]:
        """An engine that runs the connector between probes; its end is checked as well."""
        reference = self.reference(family)
        reference.start()  # before it does, nobody knows whether there is such a model
        if num_ranks > 1:
            self.session.truth.save(self.session.folder)
        llm = self._start(reference.model, max_num_tokens, num_ranks)
        engine = CheckedEngine(self, llm, reference)
        try:
            yield engine
            engine.settle()
            llm.check()
        except EngineDeadError as error:
            self.session.found(Fault.REQUEST_LOST, str(error))
        except InvariantError as error:
            self.session.found(Fault.ENGINE, str(error))
        finally:
            self._end(llm)
            self.session.read_other_ranks()
            self._note_complaints(llm)

    def _start(self, model: str, max_num_tokens: int, num_ranks: int) -> LLM:
        device = self.options.device
        cache = KvCacheConfig(
            tokens_per_block=self.block,
            max_tokens=self.pool_tokens,
            transfer_deadline_seconds=self.options.deadline_seconds,
        )
        try:
            llm = LLM(
                model,
                kv_cache_config=cache,
                kv_connector_config=self.session.config_of(ProbeScheduler.__module__, ProbeScheduler, ProbeWorker),
                tensor_parallel_size=num_ranks,
                max_batch_size=4,
                max_num_tokens=max_num_tokens,
                dtype="float32",
                device=device if num_ranks == 1 or torch.cuda.device_count() >= num_ranks else "cpu",
            )
        except Exception as error:
            if isinstance(error, ConfigError) and not self._has_started:
                raise
            if isinstance(error, RequestError) or "layer groups" in str(error):
                raise NotOffered(str(error)) from error
            self.session.found(Fault.CANNOT_START, str(error) or repr(error))
            raise Stuck from error
        self._has_started = True
        return llm

    def _end(self, llm: LLM) -> None:
        """Shut down, unless a hook that hangs keeps the engine from it."""
        ending = threading.Thread(target=llm.shutdown, daemon=True)
        ending.start()
        ending.join(HANG_SECONDS)
        if ending.is_alive():
            self.is_stuck = True
            if (running := self.session.running_hook) is not None:
                self.session.found(Fault.HOOK_HANGS, f"{running[0]} did not return")
            else:
                self.session.found(Fault.REQUEST_LOST, "the engine did not end")

    def _note_complaints(self, llm: LLM) -> None:
        """What the engine complained of, unless its cause has a name."""
        assert llm.connector_manager is not None
        for hook in llm.connector_manager.num_errors.keys() - self.session.explained:
            if message := self.session.complaints.about(hook):
                self.session.found(Fault.COMPLAINT, message)


class CheckedEngine:
    """An engine under check: what it answers is compared with the reference."""

    def __init__(self, trial: Trial, llm: LLM, reference: Reference) -> None:
        self._trial = trial
        self._session = trial.session
        self._llm = llm
        self._reference = reference
        self._num_floods = 0

    def submit(self, prompt: list[int], num_tokens: int = 4, salt: str | None = None) -> GenerationHandle:
        """Start a request; from now on the truth has its prompt."""
        self._reference.tokens(prompt, min(num_tokens, 4))
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, cache_salt=salt)
        return self._llm.generate_async(prompt, params)

    def result(self, handle: GenerationHandle) -> RequestOutput:
        """Wait for a request and compare its tokens. Stuck: it does not end."""
        output = self._wait(handle)
        if output.metrics.num_prompt_tokens < self._trial.pool_tokens:
            self._trial.num_hit_tokens += output.metrics.num_connector_tokens
        if output.finish_reason is FinishReason.ABORT:
            self._session.found(Fault.REQUEST_LOST, f"request {output.request_id} was ended without its tokens")
            return output
        wanted = self._reference.tokens(list(output.prompt_token_ids), len(output.token_ids))
        if output.token_ids != wanted:
            at = next(index for index, token in enumerate(output.token_ids) if token != wanted[index])
            self._session.found(
                Fault.WRONG_TOKENS,
                f"request {output.request_id} differs from token {at} on; the connector had matched "
                f"{output.metrics.num_connector_tokens} of {output.metrics.num_prompt_tokens} prompt tokens",
            )
        return output

    def _wait(self, handle: GenerationHandle) -> RequestOutput:
        deadline = time.monotonic() + _REQUEST_SECONDS
        while True:
            try:
                return handle.result(_POLL_SECONDS * 50)
            except TimeoutError:
                now, running = time.monotonic(), self._session.running_hook
                if running is not None and now - running[1] > HANG_SECONDS:
                    self._session.found(Fault.HOOK_HANGS, f"{running[0]} has not returned for {HANG_SECONDS:g} s")
                    raise Stuck from None
                if now > deadline:
                    seen = f"request {handle.request_id} has not ended after {_REQUEST_SECONDS:g} s"
                    self._session.found(Fault.REQUEST_LOST, seen)
                    raise Stuck from None

    def ask(self, prompt: list[int], num_tokens: int = 4, salt: str | None = None) -> RequestOutput:
        """One request, to its end."""
        return self.result(self.submit(prompt, num_tokens, salt))

    def ask_again(self, prompt: list[int], num_tokens: int = 4, salt: str | None = None) -> RequestOutput:
        """A request whose prompt was saved and has left the pool: the connector is to find some of it."""
        self.evict()
        output = self.ask(prompt, num_tokens, salt)
        if not output.metrics.num_connector_tokens:
            self._session.found(
                Fault.NO_HIT, f"a prompt of {len(prompt)} tokens came again: nothing was saved, or nothing found"
            )
        return output

    def evict(self) -> None:
        """Drive everything out of the pool: a prompt that needs all its blocks, and that this engine never had."""
        self.settle()
        self._num_floods += 1
        self.ask(self._trial.prompt(self._trial.pool_tokens, seed=-self._num_floods), num_tokens=1)

    def settle(self) -> None:
        """Wait for asynchronous loads and saves. Stuck: they do not end, which the probes say when the engine does."""
        assert self._llm.connector_manager is not None
        deadline = time.monotonic() + self._trial.options.deadline_seconds + 1
        while self._llm.connector_manager.num_in_flight:
            if time.monotonic() > deadline:
                raise Stuck
            time.sleep(_POLL_SECONDS)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Wait until something holds, or for so long."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
