"""Several ranks of a connector's manager without an engine, and a connector whose every move a test dictates.

A `Team` is one manager a rank: over a fake collective, its ranks threads of this process that pass objects around, or
over the engine's real one, its ranks processes of their own. Both answer the same to the same script.
"""

from __future__ import annotations

import queue
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from kvferry.config import KvCacheConnectorConfig
from kvferry.connector import wire
from kvferry.connector.api import KvCacheConnectorScheduler, KvCacheConnectorWorker, Request, SchedulerOutput
from kvferry.connector.config import LlmArgs
from kvferry.connector.manager import Collective, Finished, KvCacheConnectorManager
from kvferry.engine.collective import FollowerCollective, LeaderCollective, open_inherited, open_pair
from kvferry.testing.fake_engine import TOKENS_PER_BLOCK, fake_llm_args

_NUM_LAYERS = 2
_START = (
    "import sys; sys.path[:] = sys.argv[4:]; from kvferry.testing.ranks import follow; follow(*map(int, sys.argv[1:4]))"
)


class Refusal(Exception):  # noqa: N818 - what the scripted connector raises is on purpose
    """A hook raised because its script says so."""


@dataclass(frozen=True, slots=True)
class Act:
    """What one rank's worker does in one iteration: the ids it reports, and the hooks that raise."""

    saved: tuple[int, ...] = ()
    loaded: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    raises: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Script:
    """One iteration's metadata: an act for each rank."""

    acts: tuple[Act, ...]


@dataclass(slots=True)
class Outcome:
    """What an iteration came to: the leader's answer, all errors so far, and each rank's calls with their ids."""

    finished: Finished
    num_errors: dict[str, int]
    calls: list[list[tuple[str, tuple[int, ...], tuple[int, ...]]]]


@dataclass(slots=True)
class ScriptedRequest:
    """A request as a connector sees it."""

    request_id: int
    tokens: list[int] = field(default_factory=lambda: list(range(4 * TOKENS_PER_BLOCK)))
    cache_salt: str | None = None
    lora_id: str | None = None
    num_connector_matched_tokens: int = 0

    def get_tokens(self, beam: int) -> Sequence[int]:
        return self.tokens


class ScriptedScheduler(KvCacheConnectorScheduler):
    """Answers what it was told to; `metadata` is what the next pass gets, an exception is raised instead."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self.match: tuple[int, bool] = (0, False)
        self.metadata: Any = None

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        return self.match

    def update_state_after_alloc(self, request: Request, block_ids: list[int]) -> None:
        pass

    def request_finished(self, request: Request, cache_block_ids: list[int]) -> bool:
        return True

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> object:
        if isinstance(self.metadata, Exception):
            raise self.metadata
        return self.metadata


class ScriptedWorker(KvCacheConnectorWorker):
    """Does what its rank's act of the metadata says, once, and notes its calls."""

    def __init__(self, llm_args: LlmArgs) -> None:
        super().__init__(llm_args)
        self._act = Act()
        self.calls: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

    def _note(self, hook: str, first: Sequence[int] = (), second: Sequence[int] = ()) -> None:
        self.calls.append((hook, tuple(first), tuple(second)))
        if hook in self._act.raises:
            raise Refusal(hook)

    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        """There is no pool."""

    def bind_connector_meta(self, metadata: object) -> None:
        assert isinstance(metadata, Script)
        self._act = metadata.acts[self._llm_args.rank]
        self._note("bind_connector_meta")

    def start_load_kv(self, stream: Any) -> None:
        self._note("start_load_kv")

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        self._note("wait_for_layer_load", [layer_idx])

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        self._note("save_kv_layer", [layer_idx])

    def wait_for_save(self, stream: Any) -> None:
        self._note("wait_for_save")

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        self._note("get_finished", finished_gen_req_ids, started_loading_req_ids)
        return list(self._act.saved), list(self._act.loaded)

    def take_failed_loads(self) -> list[int]:
        act, self._act = self._act, Act()
        return list(act.failed)


def _make_manager(collective: Collective) -> KvCacheConnectorManager:
    config = KvCacheConnectorConfig(
        connector_module=__name__,
        connector_scheduler_class=ScriptedScheduler.__name__,
        connector_worker_class=ScriptedWorker.__name__,
    )
    args = fake_llm_args(config, rank=collective.rank, tensor_parallel_size=collective.size)
    scheduler = ScriptedScheduler(args) if collective.rank == 0 else None
    return KvCacheConnectorManager(args, ScriptedWorker(args), scheduler, collective)


def _iterate(manager: KvCacheConnectorManager, *, with_pass: bool) -> Finished:
    if with_pass:
        manager.exchange_metadata(SchedulerOutput() if manager.scheduler is not None else None)
        manager.start_pass(None)
        for layer in range(_NUM_LAYERS):
            manager.before_layer(layer, None)
            manager.after_layer(layer, None)
        manager.end_pass(None)
    return manager.collect()


def _take_calls(manager: KvCacheConnectorManager) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    assert isinstance(manager.worker, ScriptedWorker)
    calls, manager.worker.calls = manager.worker.calls, []
    return calls


class Team(ABC):
    """All ranks, moved together. `begin` makes new managers, as often as one likes."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.begin()

    @abstractmethod
    def begin(self) -> None:
        """Start from nothing."""

    @abstractmethod
    def _move(self, with_pass: bool) -> tuple[Finished, list[list[tuple[str, tuple[int, ...], tuple[int, ...]]]]]: ...

    @abstractmethod
    def close(self) -> None: ...

    manager: KvCacheConnectorManager

    @property
    def scheduler(self) -> ScriptedScheduler:
        assert isinstance(self.manager.scheduler, ScriptedScheduler)
        return self.manager.scheduler

    def load(self, request_id: int, *, is_async: bool) -> bool:
        """Match one block of a request and take it; false if the match was refused."""
        self.scheduler.match = (TOKENS_PER_BLOCK, is_async)
        request = ScriptedRequest(request_id)
        return self.manager.allocated(request, [[0, 1, 2, 3]], self.manager.match(request, 0))

    def save(self, request_id: int) -> None:
        """A request ends and its blocks are to be kept."""
        assert self.manager.request_finished(ScriptedRequest(request_id), [[0, 1, 2, 3]])

    def iterate(self, *acts: Act, metadata: Any = None, with_pass: bool = True) -> Outcome:
        """One iteration in which rank r does `acts[r]`, or nothing; `metadata` replaces the script."""
        idle = (Act(),) * (self.num_ranks - len(acts))
        self.scheduler.metadata = metadata if metadata is not None else Script((*acts, *idle))
        finished, calls = self._move(with_pass)
        return Outcome(finished, dict(self.manager.num_errors), calls)


class FakeCollective:
    """One rank's share of a collective whose ranks are threads: values pass as they are, through queues."""

    def __init__(self, rank: int, inboxes: Sequence[queue.SimpleQueue[Any]]) -> None:
        self.rank = rank
        self.size = len(inboxes)
        self._inboxes = inboxes

    def broadcast(self, value: Any) -> Any:
        if self.rank > 0:
            return self._inboxes[self.rank].get(timeout=60)
        for inbox in self._inboxes[1:]:
            inbox.put(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        if self.rank > 0:
            self._inboxes[0].put((self.rank, value))
            return []
        others = dict(self._inboxes[0].get(timeout=60) for _ in range(self.size - 1))
        return [value, *(others[rank] for rank in range(1, self.size))]


class ThreadTeam(Team):
    """1 or more ranks in this process."""

    def __init__(self, num_ranks: int) -> None:
        self._threads = ThreadPoolExecutor(max(1, num_ranks - 1))
        super().__init__(num_ranks)

    def begin(self) -> None:
        inboxes: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(self.num_ranks)]
        self.manager, *self._followers = (
            _make_manager(FakeCollective(rank, inboxes)) for rank in range(self.num_ranks)
        )

    def _move(self, with_pass: bool) -> tuple[Finished, list[list[tuple[str, tuple[int, ...], tuple[int, ...]]]]]:
        moving = [self._threads.submit(_iterate, follower, with_pass=with_pass) for follower in self._followers]
        finished = _iterate(self.manager, with_pass=with_pass)
        for move in moving:
            assert move.result(60) == Finished()
        return finished, [_take_calls(manager) for manager in (self.manager, *self._followers)]

    def close(self) -> None:
        self._threads.shutdown()


class ProcessTeam(Team):
    """2 or more ranks, each but the first a process of its own. Each move begins with one byte on its channel."""

    def __init__(self, num_ranks: int) -> None:
        self._channels, self._processes = [], []
        for rank in range(1, num_ranks):
            channel, theirs = open_pair()
            numbers = [str(number) for number in (theirs.fileno(), rank, num_ranks)]
            command = [sys.executable, "-c", _START, *numbers, *sys.path]
            self._processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
            self._channels.append(channel)
            theirs.close()
        super().__init__(num_ranks)

    def begin(self) -> None:
        self._tell(b"begin")
        self.manager = _make_manager(LeaderCollective(self._channels))

    def _tell(self, message: bytes) -> None:
        for channel in self._channels:
            channel.send_bytes(message)

    def _move(self, with_pass: bool) -> tuple[Finished, list[list[tuple[str, tuple[int, ...], tuple[int, ...]]]]]:
        self._tell(b"pass" if with_pass else b"collect")
        finished = _iterate(self.manager, with_pass=with_pass)
        return finished, [_take_calls(self.manager), *(wire.decode(channel.recv_bytes()) for channel in self._channels)]

    def close(self) -> None:
        for channel, process in zip(self._channels, self._processes, strict=True):
            channel.close()
            process.wait(60)


def follow(descriptor: int, rank: int, num_ranks: int) -> None:
    """A rank's process of a `ProcessTeam`, until the leader closes its end."""
    channel = open_inherited(descriptor)
    manager = None
    while True:
        try:
            message = channel.recv_bytes()
        except EOFError:
            return
        if message == b"begin":
            manager = _make_manager(FollowerCollective(channel, rank, num_ranks))
            continue
        assert manager is not None
        _iterate(manager, with_pass=message == b"pass")
        channel.send_bytes(wire.encode(_take_calls(manager)))
