"""A rank other than 0: a process that does in each iteration what rank 0 announces, and ends when rank 0 does.

`ranks` starts it. It schedules nothing, draws no token and knows no request beyond its share of a pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import threading
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch

from kvferry.connector import wire
from kvferry.connector.config import LlmArgs
from kvferry.connector.manager import KvCacheConnectorManager
from kvferry.engine.collective import FollowerCollective, enter_world, open_inherited
from kvferry.engine.executor import Executor
from kvferry.engine.groups import group_layers
from kvferry.engine.kv_pool import KvPool, free_bytes
from kvferry.engine.model import load_model
from kvferry.engine.rank import RankPlan, make_worker, part_of_kv
from kvferry.engine.sequence import Batch

logger = logging.getLogger("kvferry.engine")

PULSE_SECONDS = 0.25
"""How often a follower shows that it lives, and looks whether its leader does."""
_ORPHAN_SECONDS = 5.0
"""How long a follower whose leader is gone may take to end by itself."""


class Step(msgspec.Struct, frozen=True):
    """One iteration, announced by rank 0. An empty message instead means the end."""

    batch: Batch
    tells_connector: bool


@dataclasses.dataclass(frozen=True, slots=True)
class PoolPlan:
    """The message after the `RankPlan`, when all ranks have loaded. args: rank 0's, None without a connector."""

    num_blocks: int
    tokens_per_block: int
    args: LlmArgs | None


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
    """A follower's answer when it has loaded, when it has its pool, and when it is ready. failure: why it cannot go on.
    free_bytes: the memory that its device has left."""

    failure: str | None = None
    identity: str | None = None
    free_bytes: int = 0


class Follower:
    """One such rank, in its process's main thread."""

    def __init__(self, channel: Connection, plan: RankPlan) -> None:
        self._channel = channel
        self._plan = plan
        self._device = torch.device(plan.device)
        self._group = plan.make_group()
        self._manager: KvCacheConnectorManager | None = None

    def start(self) -> None:
        """Load, then make the pool and the connector's worker as rank 0 says; whatever fails is told to rank 0."""
        try:
            loaded = load_model(self._plan.model, self._plan.dtype, self._device, self._group)
            shape = part_of_kv(loaded, self._plan.num_ranks)
            self._answer(Started(identity=loaded.identity, free_bytes=free_bytes(self._device)))
            plan: PoolPlan = wire.decode(self._channel.recv_bytes())
            pool = KvPool(shape, group_layers(loaded.windows), plan.num_blocks, plan.tokens_per_block, self._device)
            self._answer(Started())
            self._group.join()
            self._executor = Executor(loaded.model, pool)
            self._executor.warm_up()
            if plan.args is not None:
                self._connect(dataclasses.replace(plan.args, rank=self._plan.rank), pool)
            self._answer(Started())
        except Exception as error:
            with contextlib.suppress(OSError):  # it may be rank 0 itself that is gone
                self._answer(Started(failure=f"{type(error).__name__}: {error}"))
            raise

    def _answer(self, answer: Started) -> None:
        self._channel.send_bytes(wire.encode(answer))

    def _connect(self, args: LlmArgs, pool: KvPool) -> None:
        collective = FollowerCollective(self._channel, self._plan.rank, self._plan.num_ranks)
        enter_world(collective)
        self._manager = KvCacheConnectorManager(args, make_worker(args, pool), None, collective)

    def run(self) -> None:
        """Iterate until rank 0 says that it is over. EOFError, OSError: rank 0 is gone."""
        decoder = msgspec.msgpack.Decoder(Step)
        while message := self._channel.recv_bytes():
            self._step(decoder.decode(message))

    def _step(self, step: Step) -> None:
        manager, stream = self._manager, self._executor.stream
        if manager is not None and step.tells_connector:
            manager.exchange_metadata(None)
            manager.start_pass(stream)
        if step.batch.slices:
            for piece in step.batch.slices:
                piece.draws = False  # rank 0 draws for all, so no logits are needed here
            self._executor.forward(step.batch, manager)
        if manager is not None:
            if step.tells_connector:
                manager.end_pass(stream)
            manager.collect()

    def close(self) -> None:
        if self._manager is not None:
            self._manager.shutdown()


def main(control: int, pulse: int, leader_pid: int) -> None:
    """Entry point of the process: the descriptors that it inherited, and who started it."""
    channel = open_inherited(control)
    plan: RankPlan = wire.decode(channel.recv_bytes())
    logging.basicConfig(format=f"%(levelname)s %(name)s, rank {plan.rank}: %(message)s")
    watch = threading.Thread(target=_show_life, args=(pulse, leader_pid, plan.runtime_dir), daemon=True)
    watch.start()
    if plan.max_threads:
        torch.set_num_threads(plan.max_threads)
    follower = Follower(channel, plan)
    try:
        follower.start()
        follower.run()
    except BaseException as error:
        # Without the leader, or without this rank, the engine is over; the leader may be past removing anything.
        _remove(plan.runtime_dir)
        if not isinstance(error, EOFError | ConnectionError):
            raise
        logger.info("another rank is gone: %s", error)
    finally:
        follower.close()


def _show_life(pulse: int, leader_pid: int, runtime_dir: str | None) -> None:
    """Write to the leader until it is gone; then let the main thread end, and end it if it hangs in a sum."""
    os.set_blocking(pulse, False)
    pause = threading.Event()
    while os.getppid() == leader_pid:
        with contextlib.suppress(OSError):  # the pipe is full where the leader is stopped, broken where it is gone
            os.write(pulse, b".")
        pause.wait(PULSE_SECONDS)
    pause.wait(_ORPHAN_SECONDS)
    _remove(runtime_dir)
    os._exit(1)


def _remove(runtime_dir: Any) -> None:
    if runtime_dir is not None:
        shutil.rmtree(runtime_dir, ignore_errors=True)
