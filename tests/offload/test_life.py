"""Random engine lives: requests that share prefixes come, run, are aborted; leases lapse, copies fail, engines restart.

`FakeEngine.step` proves the KV of every pass; here it is proved after each step that the store's books are right, and
whenever the engine is idle that nothing is leased.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvferry.config import KvCacheConfig, KvCacheConnectorConfig
from kvferry.engine.sequence import Sequence
from kvferry.offload.connector import KVFerryConnectorScheduler, KVFerryConnectorWorker
from kvferry.testing.fake_engine import FakeEngine, fake_llm_args
from kvferry.transfer.copy import CopyEngine
from kvferry.transfer.plan import Direction

NUM_BLOCKS = 40
MAX_TOKENS = 120
"""Of a request, so that one alone always fits the pool."""


class EngineLife(RuleBasedStateMachine):
    """One folder on disk, and one engine at a time."""

    engine: FakeEngine

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="kvferry-life-")
        self.sequences: list[Sequence] = []
        self.now_offset = 0.0

    @initialize(
        reuse=st.booleans(),
        max_num_tokens=st.sampled_from([7, 16, 64]),
        l1_size_gb=st.sampled_from([0.00004, 0.0002]),
        policy=st.sampled_from(["lru", "s3fifo"]),
        has_disk=st.booleans(),
        async_load=st.sampled_from(["auto", "always", "never"]),
        windows=st.sampled_from([(), (24, None, 24), (10, 10, 10), (None, 40, 16)]),
    )
    def begin(
        self,
        reuse: bool,
        max_num_tokens: int,
        l1_size_gb: float,
        policy: str,
        has_disk: bool,
        async_load: str,
        windows: tuple[int | None, ...],
    ) -> None:
        self.options: dict[str, Any] = {
            "chunk_tokens": 16,
            "l1_size_gb": l1_size_gb,
            "eviction_policy": policy,
            "arena_dir": str(Path(self.folder.name) / "arena"),
            "async_load": async_load,
        }
        if has_disk:
            self.options |= {"disk_path": str(Path(self.folder.name) / "disk"), "disk_size_gb": 0.0002}
        self.changes = {
            "max_num_tokens": max_num_tokens,
            "sliding_windows": windows,
            "kv_cache_config": KvCacheConfig(tokens_per_block=4, enable_block_reuse=reuse),
        }
        self.open()

    def open(self) -> None:
        args = fake_llm_args(KvCacheConnectorConfig(connector="kvferry", options=self.options), **self.changes)
        self.engine = FakeEngine(args, KVFerryConnectorWorker(args), KVFerryConnectorScheduler, NUM_BLOCKS)
        self.store: Any = self.engine.manager.scheduler._store  # type: ignore[union-attr]
        clock = self.store._clock
        self.store._clock = lambda: clock() + self.now_offset
        self.sequences = []

    @rule(
        prefix=st.integers(0, 2),
        num_shared=st.integers(0, 80),
        tail=st.lists(st.integers(0, 1), max_size=20),
        max_tokens=st.integers(1, 20),
        salt=st.sampled_from([None, None, "a"]),
    )
    def add(self, prefix: int, num_shared: int, tail: list[int], max_tokens: int, salt: str | None) -> None:
        prompt = [(prefix * 1000 + i) for i in range(num_shared)] + tail
        self.sequences.append(self.engine.add(prompt or [1], max_tokens, salt))

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step()

    @rule()
    def run_all(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if not self.engine.scheduler.has_requests:
                self.engine.settle()
                return
            self.engine.step()
        raise AssertionError("the engine never came to an end")

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(self.sequences)))

    @rule()
    def next_pass_comes_after_its_leases(self) -> None:
        def jump() -> None:
            self.engine.before_pass = lambda: None
            self.now_offset += 1000.0
            self.store.poll()

        self.engine.before_pass = jump

    @rule(failing=st.sampled_from(Direction))
    def copies_of_a_pass_fail(self, failing: Direction) -> None:
        submit = CopyEngine.submit

        def broken(copier: CopyEngine, direction: Direction, *arguments: Any) -> Any:
            if direction is failing:
                raise OSError("the bus is on fire")
            return submit(copier, direction, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CopyEngine, "submit", broken)
            self.engine.step()

    @rule()
    def restart(self) -> None:
        self.engine.shutdown()
        self.open()

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "engine"):
            self.store.check()
            if not (self.engine.scheduler.has_requests or self.engine.scheduler.has_transfers):
                self.now_offset += 1.0
                self.store.poll()  # The store looks now and then whether slots are still being written to.
                stats = self.store.stats()
                assert stats["leases"] == stats["slots_withdrawn"] == 0

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.shutdown()
            assert not list(Path(self.folder.name).rglob("*.arena"))
        self.folder.cleanup()


def test_random_lives(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", "kvferry.offload")
    run_state_machine_as_test(
        EngineLife,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
