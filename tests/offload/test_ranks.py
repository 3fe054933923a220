"""The connector's worker on several ranks, each with its part of the pool: a chunk is there once all have saved it.

Ranks above 0 use the store over its socket and map the arena themselves, in this process or in one of their own.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import pytest
import torch

from kvferry.config import KvCacheConfig, KvCacheConnectorConfig
from kvferry.connector.api import RequestData, SchedulerOutput
from kvferry.connector.config import LlmArgs
from kvferry.offload.connector import KVFerryConnectorScheduler, KVFerryConnectorWorker
from kvferry.offload.metadata import PassMetadata

from .test_planner import FakeRequest, prompt

BLOCK, CHUNK, NUM_HEADS = 4, 16, 4
SAVED_IDS, LOADED_IDS = list(range(12)), list(range(12, 24))


def make_args(folder: str, num_ranks: int, rank: int, async_load: str = "never") -> LlmArgs:
    options = {"chunk_tokens": CHUNK, "l1_size_gb": 0.002, "arena_dir": f"{folder}/arena", "async_load": async_load}
    return LlmArgs(
        engine_id=f"ranks of {folder}",
        model="fake",
        model_identity="fake weights",
        kv_dtype="float32",
        num_layers=2,
        num_kv_heads=NUM_HEADS,
        head_dim=4,
        max_batch_size=8,
        max_num_tokens=64,
        kv_cache_config=KvCacheConfig(tokens_per_block=BLOCK),
        kv_connector_config=KvCacheConnectorConfig(connector="kvferry", options=options),
        tensor_parallel_size=num_ranks,
        rank=rank,
        runtime_dir=f"{folder}/run",
    )


class Order(NamedTuple):
    """One iteration of a rank: the metadata of its pass, if there is one, and what `get_finished` is offered."""

    metadata: PassMetadata | None = None
    finished: tuple[int, ...] = ()
    started: tuple[int, ...] = ()


class Report(NamedTuple):
    """What a rank says of an iteration. num_equal: how many blocks hold what was loaded from where it was saved."""

    saved: list[int]
    loaded: list[int]
    failed: list[int]
    num_equal: int


class Rank:
    """One rank, in the process that it is made in."""

    def __init__(self, args: LlmArgs) -> None:
        generator = torch.Generator().manual_seed(args.rank)
        heads = NUM_HEADS // args.tensor_parallel_size
        self.pool = torch.rand(32, 2, 2, heads * BLOCK * 4, generator=generator)
        self.worker = KVFerryConnectorWorker(args)
        self.worker.register_kv_caches(self.pool)

    def run(self, order: Order) -> Report:
        if order.metadata is not None:
            self.worker.bind_connector_meta(order.metadata)
            self.worker.start_load_kv(None)
            self.worker.wait_for_layer_load(0, None)
            self.worker.wait_for_save(None)
        saved, loaded = self.worker.get_finished([*order.finished], [*order.started])
        equal = [torch.equal(self.pool[a], self.pool[b]) for a, b in zip(SAVED_IDS, LOADED_IDS, strict=True)]
        return Report(saved, loaded, self.worker.take_failed_loads(), sum(equal))

    def close(self) -> None:
        self.worker.shutdown()


def _send(stream: IO[bytes], value: Any) -> None:
    message = msgspec.msgpack.encode(value)
    stream.write(struct.pack("<I", len(message)) + message)
    stream.flush()


def _receive(stream: IO[bytes], kind: Any) -> Any:
    length = stream.read(4)
    return msgspec.msgpack.decode(stream.read(*struct.unpack("<I", length)), type=kind) if length else None


def serve_rank(folder: str, num_ranks: int, rank: int, async_load: str) -> None:
    """A rank in a process of its own: orders come on standard input until it ends."""
    served = Rank(make_args(folder, num_ranks, rank, async_load))
    _send(sys.stdout.buffer, "registered")
    while (order := _receive(sys.stdin.buffer, Order)) is not None:
        _send(sys.stdout.buffer, served.run(order))
    served.close()


class RemoteRank:
    """A rank in a process of its own, seen from here."""

    def __init__(self, args: LlmArgs, folder: str, async_load: str) -> None:
        call = f"serve_rank({folder!r}, {args.tensor_parallel_size}, {args.rank}, {async_load!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve_rank; {call}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )

    def await_registered(self) -> None:
        assert self.process.stdout is not None
        assert _receive(self.process.stdout, str) == "registered"

    def run(self, order: Order) -> Report:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        _send(self.process.stdin, order)
        return Report(*_receive(self.process.stdout, Report))

    def close(self) -> None:
        self.process.communicate(timeout=30)
        assert self.process.returncode == 0


class Ranks:
    """A scheduler half and its ranks, driven by hand."""

    def __init__(self, folder: Path, num_ranks: int, *, remote: bool = False, async_load: str = "never") -> None:
        (folder / "run").mkdir(mode=0o700)
        self.folder = folder
        args = [make_args(str(folder), num_ranks, rank, async_load) for rank in range(num_ranks)]
        others = [RemoteRank(one, str(folder), async_load) for one in args[1:]] if remote else []
        self.ranks: list[Rank | RemoteRank] = [Rank(args[0])]
        for other in others:
            other.await_registered()
        self.ranks += others or [Rank(one) for one in args[1:]]
        self.scheduler = KVFerryConnectorScheduler(args[0])
        self.scheduler.wait_for_initialization()
        self.store: Any = self.scheduler._store

    def match(self, request: FakeRequest) -> tuple[int, bool]:
        return self.scheduler.get_num_new_matched_tokens(request, 0)

    def first_pass(self, request: FakeRequest, num_scheduled: int) -> PassMetadata:
        data = RequestData(request.request_id, request.tokens, request.block_ids, 0, num_scheduled)
        return self.scheduler.build_connector_meta(SchedulerOutput(new_requests=[data]))

    def save(self, ranks: slice) -> PassMetadata:
        """Request 1 computes 48 tokens; only these ranks hear of it."""
        request = FakeRequest(1, prompt(48), block_ids=SAVED_IDS)
        assert self.match(request) == (0, False)
        self.scheduler.update_state_after_alloc(request, SAVED_IDS)
        metadata = self.first_pass(request, 48)
        self.end_save(metadata, ranks)
        return metadata

    def end_save(self, metadata: PassMetadata, ranks: slice) -> None:
        for rank in self.ranks[ranks]:
            report = rank.run(Order(metadata, finished=(1,)))
            while 1 not in report.saved:
                report = rank.run(Order())

    def close(self) -> None:
        for rank in reversed(self.ranks):
            rank.close()
        self.scheduler.shutdown()
        assert not list(self.folder.rglob("*.arena"))
        assert not list((self.folder / "run").iterdir())


@pytest.fixture(params=[(1, False), (2, False), (4, False), (2, True)], ids=str)
def ranks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ranks]:
    num_ranks, remote = request.param
    ranks = Ranks(tmp_path, num_ranks, remote=remote, async_load="always")
    yield ranks
    ranks.close()


def wait_until_committed(ranks: Ranks, num_chunks: int) -> None:
    """What another process says arrives when it arrives."""
    while ranks.store.stats().get("entries_committed", 0) < num_chunks:
        ranks.store.poll(0.001)


def test_committed_once_every_rank_has_saved_and_loaded_back_on_each(ranks: Ranks) -> None:
    last = len(ranks.ranks) - 1
    metadata = ranks.save(slice(0, last))
    assert ranks.store.stats()["entries_committed"] == 0
    ranks.end_save(metadata, slice(last, None))
    wait_until_committed(ranks, 3)

    request = FakeRequest(2, prompt(48), block_ids=LOADED_IDS)
    request.num_connector_matched_tokens, is_async = ranks.match(request)
    assert (request.num_connector_matched_tokens, is_async) == (44, True)
    ranks.scheduler.update_state_after_alloc(request, LOADED_IDS)
    load = ranks.scheduler.build_connector_meta(SchedulerOutput())
    for rank in ranks.ranks:
        report = rank.run(Order(load, started=(2,)))
        while 2 not in report.loaded:
            report = rank.run(Order())
        assert report.failed == []
        assert report.num_equal == 11
    while ranks.store.stats()["leases"]:
        ranks.store.poll(0.001)
    ranks.store.check()


def test_what_one_rank_did_not_save_is_not_there(ranks: Ranks) -> None:
    metadata = ranks.save(slice(0, -1))
    (order,) = metadata.stores
    ranks.ranks[-1].run(Order(PassMetadata(stores=[order], lost_loads=[1])))  # its load failed, so it keeps nothing
    while ranks.store.stats()["leases"]:
        ranks.store.poll(0.001)
    assert ranks.match(FakeRequest(2, prompt(48))) == (0, False)
    ranks.store.check()


def test_nothing_is_offered_before_all_ranks_have_registered(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    leader = Rank(make_args(str(tmp_path), 2, 0))
    scheduler = KVFerryConnectorScheduler(make_args(str(tmp_path), 2, 0))
    scheduler.wait_for_initialization()
    assert scheduler.get_num_new_matched_tokens(FakeRequest(1, prompt(48)), 0) == (0, False)
    leader.close()
    scheduler.shutdown()
