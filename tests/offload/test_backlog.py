"""What the planner counts as still to compute: random lives of requests against what an engine knows of them."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.config import StoreOptions
from kvferry.connector.api import RequestData, SchedulerOutput
from kvferry.offload.metadata import LoadEnd
from kvferry.offload.planner import Offer, Planner
from kvferry.store.store import Store

from .test_planner import BLOCK, CHUNK, GEOMETRY, OPTIONS, FakeRequest, Hand, prompt

STORED = 5 * CHUNK + 1


@dataclass
class Life(FakeRequest):
    """A request as an engine sees it.

    num_pool: tokens that its pool had. computed: tokens whose KV is there or, the engine thinks, is being loaded. end:
    of what it computes before it generates. told, told_blocks: what passes have told of it. job: its load beside the
    passes. heard: what the planner takes for `computed`, where it cannot know better.
    """

    offer: Offer = field(default_factory=Offer)
    num_pool: int = 0
    computed: int = 0
    end: int = 0
    told: int = 0
    told_blocks: int = 0
    is_loading: bool = False
    job: int | None = None
    heard: int | None = None

    @property
    def num_left(self) -> int:
        return max(0, self.end - (self.computed if self.heard is None else self.heard))


class Engine:
    """tells: what passes tell the planner of requests: all, as kvferry's engine does; only in some passes, as vLLM's
    adapter does; or nothing, as it does where nothing is saved."""

    def __init__(self, folder: str, seed: int, tells: str, *, is_async: bool) -> None:
        self.choose = random.Random(seed)
        self.tells = tells
        self.store = Store(StoreOptions(chunk_tokens=CHUNK, l1_size_gb=0.001, arena_dir=folder))
        self.store.register("engine", 0, GEOMETRY)
        Hand(self.store, Planner(self.store, GEOMETRY, BLOCK, OPTIONS)).keep(prompt(STORED))
        options = replace(OPTIONS, async_load="always" if is_async else "never")
        self.planner = Planner(self.store, GEOMETRY, BLOCK, options)
        self.waiting: dict[int, Life] = {}
        self.admitted: dict[int, Life] = {}
        self.num_requests = 0
        self.seen: Counter[str] = Counter()

    def live(self, num_steps: int) -> None:
        steps: list[Callable[[], None]] = [
            self.come,
            self.wait,
            self.allocate,
            self.end_load,
            self.preempt,
            self.finish,
        ]
        for _ in range(num_steps):
            self.choose.choice([*steps, *[self.allocate, self.compute] * 3])()
            self.check()
        for life in [*self.waiting.values(), *self.admitted.values()]:
            self.end(life)
            self.check()
        assert self.planner.meter.snapshot().get("tokens_to_compute", 0) == 0
        self.planner.close()
        assert self.store.stats()["leases"] == 0
        self.store.close()

    def check(self) -> None:
        left = {life.request_id: life.num_left for life in self.admitted.values() if life.num_left}
        assert self.planner._cost._to_compute == left
        assert self.planner.meter.snapshot().get("tokens_to_compute", 0) == sum(left.values())

    def pick(self, lives: Any) -> Life | None:
        """One of them, if there are any."""
        return self.choose.choice(found) if (found := list(lives)) else None

    def ready(self) -> list[Life]:
        return [life for life in self.admitted.values() if not life.is_loading]

    def come(self) -> None:
        self.num_requests += 1
        tail = prompt(self.choose.randrange(1, 40), seed=self.num_requests)
        self.match(Life(self.num_requests, prompt(self.choose.randrange(STORED)) + tail))

    def wait(self) -> None:
        if (life := self.pick(self.waiting.values())) is not None:
            self.match(life)

    def match(self, life: Life) -> None:
        life.num_pool = self.choose.choice([0, 0, self.choose.randrange((len(life.tokens) - 1) // BLOCK + 1) * BLOCK])
        life.num_connector_matched_tokens = 0
        life.offer = self.planner.match(life, life.num_pool, may_load=self.choose.random() < 0.8)
        self.waiting[life.request_id] = life

    def allocate(self) -> None:
        if (life := self.pick(self.waiting.values())) is None:
            return
        num_taken = life.offer.num_tokens if self.choose.random() < 0.8 else 0
        life.num_connector_matched_tokens, life.is_loading = num_taken, life.offer.is_async and num_taken > 0
        life.computed, life.end, life.heard = life.num_pool + num_taken, len(life.tokens), None
        life.told = life.told_blocks = 0
        life.block_ids = list(range(-(-life.end // BLOCK)))
        self.planner.allocated(life, [life.block_ids])
        self.admitted[life.request_id] = self.waiting.pop(life.request_id)

    def compute(self) -> None:
        """A pass over some of those that can run, further than their prompts' ends in the end."""
        output, scheduled, told = SchedulerOutput(), dict[Any, int](), list[Life]()
        scheduled["of no concern"] = 7
        for life in self.choose.sample(ready := self.ready(), self.choose.randrange(min(len(ready), 4) + 1)):
            number = min(self.choose.randrange(1, 50), len(life.tokens) - life.computed)
            scheduled[life.request_id] = number
            if self.tells == "all" or (self.tells == "some" and (not life.told or self.choose.random() < 0.5)):
                (output.cached_requests if life.told else output.new_requests).append(self.tell(life, number))
                told.append(life)
            life.computed, life.heard = life.computed + number, None
            if life.computed == len(life.tokens):
                life.tokens = [*life.tokens, 9]
            self.seen["decodes"] += life.computed > life.end
        metadata = self.planner.plan(output, None if self.tells == "all" else scheduled)
        for order in metadata.async_loads:
            self.admitted[order.request_id].job = order.job.job_id
        for order in (*metadata.loads, *metadata.stores):
            self.store.done(order.job.job_id, 0, ok=False)
        for order in metadata.loads:
            life = self.admitted[order.request_id]
            if self.choose.random() < 0.4:  # The next pass says so.
                life.computed, life.heard = life.num_pool, life.computed
                life.num_connector_matched_tokens = 0
                self.seen["failed within passes"] += 1

    def tell(self, life: Life, number: int) -> RequestData:
        matched = 0 if life.told else life.num_connector_matched_tokens
        life.block_ids += range(len(life.block_ids), -(-(life.computed + number) // BLOCK))
        tokens, blocks = life.tokens[life.told :], life.block_ids[life.told_blocks :]
        life.told, life.told_blocks = len(life.tokens), len(life.block_ids)
        return RequestData(life.request_id, tokens, blocks, life.computed - matched, number)

    def end_load(self) -> None:
        life = self.pick(life for life in self.admitted.values() if life.job is not None)
        if life is None or life.job is None:
            return
        ok = self.choose.random() < 0.6
        self.store.done(life.job, 0, ok)
        self.planner.loads_ended([LoadEnd(life.job, 0.1, ok)])
        life.is_loading, life.job = False, None
        if ok:
            self.seen["loaded"] += 1
            return
        self.seen["failed beside passes"] += 1
        life.heard = life.computed if self.tells == "all" else None  # Until its first pass says so.
        life.computed, life.num_connector_matched_tokens = life.num_pool, 0
        if self.tells != "all":
            self.planner.load_failed(life.request_id)

    def preempt(self) -> None:
        if (life := self.pick(self.ready())) is not None:
            self.match(self.admitted.pop(life.request_id))
            self.seen["preempted"] += 1

    def finish(self) -> None:
        """Wherever it is. Whose load is cancelled ends as soon as that has ended, or is matched anew."""
        life = self.pick([*self.waiting.values(), *self.admitted.values()])
        if life is None:
            return
        if life.is_loading and self.choose.random() < 0.5:
            self.planner.cancel_load(life.request_id, life.num_pool, life.computed)
            life.heard = life.end
            self.check()
            if life.job is not None and self.choose.random() < 0.5:
                self.store.done(life.job, 0, ok=False)
                life.job = None
                self.match(self.admitted.pop(life.request_id))
                self.seen["begun anew"] += 1
                return
        self.end(life)

    def end(self, life: Life) -> None:
        if life.job is not None:
            self.store.done(life.job, 0, ok=False)
        self.planner.finished(life.request_id)
        self.waiting.pop(life.request_id, None)
        self.admitted.pop(life.request_id, None)
        self.seen["ended with tokens left"] += life.num_left > 0


@pytest.mark.parametrize(("tells", "is_async"), [("all", False), ("all", True), ("some", True), ("none", True)])
def test_the_count_of_tokens_to_compute_is_exact_and_ends_at_zero(tells: str, is_async: bool) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=20, database=None)
    @given(st.integers(0, 2**32 - 1))
    def run(seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            engine = Engine(folder, seed, tells, is_async=is_async)
            engine.live(num_steps=300)
            seen.update(engine.seen)

    run()
    happened = {"decodes", "preempted", "ended with tokens left"}
    happened |= {"loaded", "failed beside passes", "begun anew"} if is_async else {"failed within passes"}
    assert happened == {name for name, number in seen.items() if number}
