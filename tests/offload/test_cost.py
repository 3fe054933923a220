"""What is loaded and what is computed, by a clock that the test moves."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.blocks import Geometry, GroupKind, GroupSpec, Tier
from kvferry.config import StoreOptions
from kvferry.observability.metrics import Meter
from kvferry.offload.cost import GAUGES, CostModel, Hit, Passes, Speed, hits_within
from kvferry.offload.metadata import LoadEnd

MB = 1_000_000
TOKEN_BYTES = 10_000
MEMORY, DISK, REMOTE = Tier.MEMORY, Tier.DISK, Tier.REMOTE


class World:
    """An engine and its tiers at given speeds, and the cost model that learns them."""

    def __init__(self, prefill_speed: float, speeds: dict[Tier, float], **options: object) -> None:
        self.now = 0.0
        self.prefill_speed = prefill_speed
        self.speeds = speeds
        self.meter = Meter()
        self.cost = CostModel(StoreOptions(**options), self.meter, lambda: self.now)  # type: ignore[arg-type]
        self._next_job = 0

    def prefill(self, num_tokens: int = 1000) -> float:
        """A prompt and two decode steps; returns the prompt's seconds."""
        self.cost.plan({"prompt": num_tokens})
        self.now += (seconds := num_tokens / self.prefill_speed)
        for _ in range(2):
            self.cost.plan({"prompt": 1})
            self.now += 0.001
        return seconds

    def promise(self, hit: Hit) -> int:
        self._next_job += 1
        self.cost.promise(self._next_job, hit)
        return self._next_job

    def load(self, hit: Hit, *, ok: bool = True) -> float:
        """One load alone; returns its seconds."""
        job = self.promise(hit)
        self.cost.begin(job)
        seconds = sum(number / self.speeds[tier] for tier, number in hit.num_bytes.items())
        self.now += seconds
        self.cost.end([LoadEnd(job, seconds, ok)])
        return seconds

    def learn(self, *tiers: Tier) -> None:
        for _ in range(3):
            self.prefill()
            for tier in tiers:
                self.load(hit(1000, tier))

    def loads(self, *hits: Hit) -> Hit | None:
        return self.cost.choose(hits).hit

    def gauge(self, name: str) -> float:
        assert name in GAUGES
        return self.meter.snapshot().get(name, 0)


def hit(num_tokens: int, tier: Tier = MEMORY) -> Hit:
    return Hit(-(-num_tokens // 256), num_tokens, {tier: num_tokens * TOKEN_BYTES})


def test_what_is_not_known_is_no_reason_against_a_hit() -> None:
    world = World(1e5, {DISK: 1e6})
    whole = hit(10_000, DISK)
    assert world.loads(whole) is whole
    world.load(whole)
    world.load(whole)
    for _ in range(5):
        world.prefill()
        assert world.loads(whole) is whole
    world.load(whole)
    assert world.loads(whole) is None


def test_a_hit_is_loaded_where_that_is_quicker() -> None:
    world = World(10_000, {MEMORY: 1e9, DISK: 5e7})
    world.learn(MEMORY, DISK)
    assert world.gauge("prefill_tokens_per_second") == pytest.approx(10_000)
    assert world.gauge("load_bytes_per_second_memory") == pytest.approx(1e9)
    assert world.gauge("load_bytes_per_second_disk") == pytest.approx(5e7)
    assert world.loads(hit(5000, MEMORY)) is not None
    choice = world.cost.choose([hit(5000, DISK)])
    assert (choice.hit, choice.reason) == (None, "slower")
    assert choice.load_seconds == pytest.approx(1.002)
    assert choice.compute_seconds == pytest.approx(0.5)
    assert world.loads(hit(20, DISK)) is not None, "a difference of 4 ms is none"
    assert world.meter.snapshot()["hits_computed_slower"] == 1


def test_a_hit_is_cut_to_what_lies_nearer_where_that_wins() -> None:
    world = World(10_000, {MEMORY: 1e9, DISK: 5e7})
    world.learn(MEMORY, DISK)
    near = hit(2000)
    whole = Hit(20, 5000, {MEMORY: near.num_bytes[MEMORY], DISK: 3000 * TOKEN_BYTES})
    assert world.loads(whole, near) is near
    assert world.meter.snapshot()["hits_cut"] == 1
    world.speeds[DISK] = 1e9
    for _ in range(3):
        world.now += 30
        world.load(hit(1000, DISK))
    assert world.loads(whole, near) is whole


@pytest.mark.parametrize(("times_as_fast", "num_loads"), [(2, 3), (4, 7), (10, 39)])
def test_loads_in_flight_make_a_hit_wait(times_as_fast: int, num_loads: int) -> None:
    """1,000 tokens compute in 100 ms. Their wait for other loads counts half if they load in 50 or 25, and less if in
    10: what is computed would keep the device from so many that are there sooner."""
    world = World(10_000, {MEMORY: times_as_fast * 1e8})
    world.learn(MEMORY)
    jobs = [world.promise(taken) for _ in range(60) if (taken := world.loads(hit(1000))) is not None]
    assert len(jobs) == num_loads
    assert world.gauge("load_bytes_in_flight") == num_loads * 10 * MB
    world.cost.drop(jobs[0])
    assert world.loads(hit(1000)) is not None


STORM = {MEMORY: 14 * 10_000 * TOKEN_BYTES}
"""Loads 14 times as fast as 10,000 tokens a second compute."""


@pytest.mark.parametrize("limit_mb", [0, 8000])
@pytest.mark.parametrize(("times_as_fast", "num_computed"), [(2, 13), (4, 7), (14, 0)])
def test_a_storm_fills_both_queues_in_proportion_to_their_speeds(
    times_as_fast: int, num_computed: int, limit_mb: int
) -> None:
    """64 hits at once. A wait for loads counts as `weight` says, and is never the longer one by more than computing
    one."""
    speed = times_as_fast * 10_000
    world = World(10_000, {MEMORY: speed * TOKEN_BYTES}, max_load_bytes_in_flight=limit_mb * MB)
    world.learn(MEMORY)
    compute_seconds, load_seconds = 2048 / 10_000, 2048 / speed
    weight = min(0.5, 2 * (load_seconds + 0.002) / compute_seconds)
    loading = computing = 0.0
    for request in range(64):
        taken = world.loads(hit(2048))
        world.cost.expect(request, 0 if taken else 2048)
        if taken is not None:
            world.promise(taken)
            loading += load_seconds
        else:
            computing += compute_seconds
        assert weight * loading <= computing + compute_seconds + 0.005
    assert world.gauge("tokens_to_compute") == pytest.approx(computing * 10_000)
    num_loaded = 64 - num_computed
    assert (loading, computing) == pytest.approx((num_loaded * load_seconds, num_computed * compute_seconds))
    for request in range(64):
        world.cost.plan({request: 2000, "another": 2000})
        world.cost.plan({request: 100, "another": 2000})
    assert world.gauge("tokens_to_compute") == 0


def test_loads_within_passes_do_not_go_past_what_others_compute() -> None:
    """Nor does a request whose planner waits for its bytes, and with it the engine."""
    world = World(10_000, {DISK: 5e7}, async_load="never")
    world.learn(DISK)
    world.cost.expect("another", 100_000)
    assert world.loads(hit(2048, DISK)) is None


def test_what_others_compute_is_time_to_load_what_lies_far() -> None:
    """A hit is cut where its rest is quicker to compute, but not to the rest of a queue."""
    world = World(10_000, {MEMORY: 1e9, DISK: 5e7})
    world.learn(MEMORY, DISK)
    near = hit(2000)
    whole = Hit(20, 5000, {MEMORY: near.num_bytes[MEMORY], DISK: 3000 * TOKEN_BYTES})
    assert world.loads(whole, near) is near
    world.cost.expect("another", 7000)
    assert world.loads(whole, near) is whole
    for _ in range(2):
        world.promise(whole)
    assert world.loads(whole, near) is near
    world.cost.plan({"another": 6990})
    assert world.loads(hit(3000, DISK)) is None, "1.2 s are in flight"
    world.now += 0.7
    world.cost.plan({"another": 10})
    choice = world.cost.choose([hit(3000)])
    assert choice.compute_seconds == pytest.approx(0.301), "a pass that was planned 700 ms ago has ended"


def test_passes_that_are_quicker_than_expected_leave_no_queue_behind() -> None:
    world = World(10_000, {MEMORY: 1e9})
    world.learn(MEMORY)
    for request in range(100):  # One each, so none is measured.
        world.cost.expect(request, 1000)
        world.cost.plan({request: 1000})
        world.now += 0.05
    assert world.cost.choose([hit(1000)]).compute_seconds <= 0.2 + 0.1


class Storm:
    """Hits of 2,048 tokens at once in an engine that plans a pass when the one `depth` before it has ended, asks about
    no more requests than a pass has room for, and hears of loads what its workers knew at the pass before. slowed: the
    share of its speed that the tier has while the engine computes."""

    def __init__(self, world: World, depth: int, pass_tokens: int, slowed: float = 1.0) -> None:
        self._world, self._depth, self._pass_tokens, self._slowed = world, depth, pass_tokens, slowed
        self._loading: deque[tuple[int, float]] = deque()
        """Jobs and when they began, in order; of the first of them `_left_bytes` are left."""
        self._left_bytes = float(hit(2048).num_bytes[MEMORY])
        self._ended: deque[tuple[float, LoadEnd]] = deque()
        self._computes_until = 0.0

    def seconds(self, num_hits: int) -> float:
        world, started = self._world, self._world.now
        pass_ends, heard_until, left = [started] * self._depth, started, dict[int, int]()
        waiting = deque(range(num_hits))
        while waiting or left:
            self._hear(heard_until)
            self._load_until(max(world.now, pass_ends[-self._depth]))
            heard_until, scheduled = world.now, dict[int, int]()
            while (room := self._pass_tokens - sum(scheduled.values())) and (left.keys() - scheduled or waiting):
                request = next((of for of in left if of not in scheduled), None)
                if request is not None:
                    scheduled[request] = min(room, left[request])
                    continue
                request, taken = waiting.popleft(), world.loads(hit(2048))
                world.cost.expect(request, 0 if taken else 2048)
                if taken is None:
                    left[request] = 2048
                    continue
                world.cost.begin(job := world.promise(taken))
                self._loading.append((job, world.now))
            world.cost.plan(scheduled)
            left = {of: rest for of, number in left.items() if (rest := number - scheduled.get(of, 0))}
            self._computes_until = max(world.now, pass_ends[-1]) + sum(scheduled.values()) / world.prefill_speed
            pass_ends.append(self._computes_until)
        while self._loading or world.now < self._computes_until:
            self._load_until(max(world.now + 0.001, self._computes_until))
        self._hear(world.now)
        return world.now - started

    def _load_until(self, until: float) -> None:
        world = self._world
        while self._loading:
            computes = world.now < self._computes_until
            end = min(until, self._computes_until) if computes else until
            speed = world.speeds[MEMORY] * (self._slowed if computes else 1.0)
            seconds = min(self._left_bytes / speed, end - world.now)
            if seconds <= 0:
                break
            world.now += seconds
            self._left_bytes -= seconds * speed
            if self._left_bytes < 1:
                job, began = self._loading.popleft()
                self._ended.append((world.now, LoadEnd(job, world.now - began, ok=True)))
                self._left_bytes = float(hit(2048).num_bytes[MEMORY])
        world.now = max(world.now, until)

    def _hear(self, until: float) -> None:
        while self._ended and self._ended[0][0] <= until:
            self._world.cost.end([self._ended.popleft()[1]])


@pytest.mark.parametrize("num_hits", [64, 200])
@pytest.mark.parametrize("pass_tokens", [2048, 8192])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_storm_ends_nearly_as_soon_as_both_queues_can(depth: int, pass_tokens: int, num_hits: int) -> None:
    world = World(10_000, STORM)
    world.learn(MEMORY)
    seconds = Storm(world, depth, pass_tokens).seconds(num_hits)
    assert world.gauge("tokens_to_compute") == world.gauge("load_bytes_in_flight") == 0
    compute_seconds, load_seconds = 2048 / 10_000, 2048 / 140_000
    at_best = num_hits / (1 / compute_seconds + 1 / load_seconds)
    assert seconds <= at_best + 1.5 * compute_seconds


@pytest.mark.parametrize("slowed", [0.7, 0.5])
@pytest.mark.parametrize("times_as_fast", [2, 4, 8])
def test_where_computing_slows_loads_a_storm_takes_hardly_longer_than_to_load_all(
    times_as_fast: int, slowed: float
) -> None:
    """Nor do later ones, which know how slow loads were."""
    world = World(42_000, {MEMORY: times_as_fast * 42_000 * TOKEN_BYTES})
    world.learn(MEMORY)
    for _ in range(6):
        assert Storm(world, 2, 8192, slowed).seconds(64) <= 1.25 * 64 * 2048 / (times_as_fast * 42_000)
        world.now += 1.0
        world.prefill(8192)


def test_beyond_the_limit_a_storm_computes_what_is_not_known_to_win() -> None:
    world = World(1000, {MEMORY: 1e9}, max_load_bytes_in_flight=25 * MB)
    large = hit(10_000)
    assert world.loads(large) is large, "one may always load"
    for _ in range(2):
        world.promise(hit(1000))
    choice = world.cost.choose([hit(1000)])
    assert (choice.hit, choice.reason) == (None, "in_flight")
    assert world.meter.snapshot()["hits_computed_in_flight"] == 1
    world.learn(MEMORY)
    assert world.loads(hit(1000)) is not None, "a second of computing is worth 30 ms of waiting"
    world.prefill_speed = 1e6
    world.now += 300
    world.promise(hit(2000))
    world.promise(hit(2000))
    for _ in range(6):
        world.prefill(100_000)
    assert world.loads(hit(1000)) is None


def test_whoever_asks_for_it_always_loads() -> None:
    world = World(1e6, {DISK: 1e6}, load_when="always", max_load_bytes_in_flight=0)
    world.learn(DISK)
    for _ in range(100):
        world.promise(hit(1000, DISK))
        assert world.loads(hit(1000, DISK), hit(1)) is not None


@pytest.mark.parametrize("seconds_between", [0.01, 1.0])
def test_a_tier_that_was_slow_is_tried_again_and_trusted_again(seconds_between: float) -> None:
    world = World(10_000, {DISK: 1e6})
    world.learn(DISK)
    world.speeds[DISK] = 1e9
    asked = hit(1000, DISK)
    computed = [0]
    for _ in range(2000):
        world.now += seconds_between
        if (taken := world.loads(asked)) is None:
            computed[-1] += 1
        else:
            world.load(taken)
            computed.append(0)
    first, *later = computed
    assert first == (29 if seconds_between == 1.0 else 63)
    assert max(later) <= first + 1
    assert not any(later[-100:])
    assert world.meter.snapshot()["hits_retried"] <= 8


def test_loads_that_failed_count_where_they_were_slower() -> None:
    world = World(10_000, {DISK: 1e9})
    world.learn(DISK)
    for seconds in (1e-3, 10.0):
        for _ in range(4):
            job = world.promise(hit(1000, DISK))
            world.cost.begin(job)
            world.cost.end([LoadEnd(job, seconds, ok=False)])
        expected = 1e9 if seconds < 1 else 1e6
        assert world.gauge("load_bytes_per_second_disk") == pytest.approx(expected)


def test_small_loads_and_passes_say_nothing() -> None:
    world = World(10_000, {DISK: 1.0})
    for _ in range(5):
        world.load(hit(50, DISK))
        world.prefill(40)
    assert world.gauge("load_bytes_per_second_disk") == 0
    assert world.gauge("prefill_tokens_per_second") == 0


def test_loads_side_by_side_share_their_tier() -> None:
    """Four begin at once and end together, three times; the last time one is told of late, by two ranks."""
    world = World(10_000, {})
    for number in range(3):
        jobs = [world.promise(hit(1000)) for _ in range(4)]
        for job in jobs:
            world.cost.begin(job)
        world.now += 0.1
        ends = [LoadEnd(job, 0.1 - 0.001 * index, ok=True) for index, job in enumerate(jobs)]
        world.cost.end([*ends[:3], LoadEnd(jobs[0], 0.05, ok=True)])
        assert world.gauge("load_bytes_in_flight") == 10 * MB
        world.now += number
        world.cost.end([ends[3], ends[3]])
        world.cost.end([ends[3]])
    assert world.gauge("load_bytes_in_flight") == 0
    assert world.gauge("load_bytes_per_second_memory") == pytest.approx(4e8, rel=0.35)


def test_a_tier_that_is_never_idle_is_measured_too() -> None:
    world = World(10_000, {})
    jobs = []
    for _ in range(40):
        jobs.append(world.promise(hit(1000)))
        world.cost.begin(jobs[-1])
        world.now += 0.05
        if len(jobs) == 2:
            world.cost.end([LoadEnd(jobs.pop(0), 0.1, ok=True)])
    assert world.gauge("load_bytes_per_second_memory") == pytest.approx(10 * MB / 0.05, rel=0.2)


def test_what_was_promised_first_and_begins_last_is_the_last_to_begin() -> None:
    world = World(10_000, {MEMORY: 1e9}, max_load_bytes_in_flight=MB)
    world.learn(MEMORY)
    late, soon = world.promise(hit(1000)), world.promise(hit(1000))
    world.cost.begin(soon)
    world.now += 20
    world.cost.begin(late)
    for _ in range(2):
        assert world.cost._first_begun(MEMORY) == pytest.approx(world.now - 20)
        world.cost.choose([hit(1000)])
    world.now += 15
    world.cost.choose([hit(1000)])
    assert world.gauge("load_bytes_in_flight") == 10 * MB, "of the other nobody reports any more"


def test_what_has_not_begun_has_not_ended_unheard() -> None:
    world = World(10_000, {MEMORY: 1e9})
    world.learn(MEMORY)
    world.cost.begin(world.promise(hit(1000)))
    world.now += 0.5
    for _ in range(40):
        world.promise(hit(1000))
    assert world.cost.choose([hit(10_000)]).load_seconds == pytest.approx(0.002 + 0.4 + 0.1)


def test_a_tier_that_stands_still_is_not_waited_for() -> None:
    world = World(10_000, {MEMORY: 1e9})
    world.learn(MEMORY)
    num_taken = 0
    for _ in range(1000):
        world.now += 0.01
        if (taken := world.loads(hit(1000))) is not None:
            world.cost.begin(world.promise(taken))
            num_taken += 1
    of_a_second, waited_for, tried_again = 100, 39, 1000 // 64
    assert num_taken <= of_a_second + waited_for + tried_again + 2


def test_a_load_that_nobody_ever_reports_is_forgotten() -> None:
    world = World(10_000, {MEMORY: 1e9}, max_load_bytes_in_flight=MB)
    world.cost.begin(world.promise(hit(1000)))
    world.promise(hit(1000))
    assert world.loads(hit(1000)) is None
    world.now += 31
    assert world.loads(hit(1000)) is not None
    assert world.gauge("load_bytes_in_flight") == 0
    world.learn(MEMORY)
    assert world.gauge("load_bytes_per_second_memory") == pytest.approx(1e9)


def test_a_pass_counts_only_if_the_engine_did_not_idle() -> None:
    passes = Passes()
    assert [passes.plan({"a": 500}, 0.0), passes.plan({"a": 1}, 1.0), passes.plan({"b": 1}, 50.0)] == [None] * 3
    passes = Passes()
    assert [passes.plan({"a": 500}, 0.0), passes.plan({"b": 1}, 50.0), passes.plan({"b": 1}, 50.1)] == [None] * 3


@pytest.mark.parametrize("depth", [1, 2])
def test_passes_that_are_filled_up_with_prompts_are_measured(depth: int) -> None:
    """Each has a little less room for prompts than the one before it, as more requests generate."""
    passes, ends, measured = Passes(), [0.0] * depth, []
    for number in range(12):
        scheduled = dict.fromkeys(range(4 * number), 1) | dict.fromkeys(
            range(4 * number, 4 * number + 4), 2048 - number
        )
        measured.append(passes.plan(scheduled, ends[-depth]))
        ends.append(ends[-1] + sum(scheduled.values()) / 1e4)
    speeds = [tokens / seconds for tokens, seconds in filter(None, measured)]
    assert len(speeds) >= 8
    assert speeds == pytest.approx([1e4] * len(speeds), rel=0.02)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_time_of_passes_is_read_right_also_where_they_overlap(depth: int) -> None:
    """An engine that plans a pass when the one `depth` before it has ended."""
    choose = random.Random(depth)
    passes, ends, right = Passes(), [0.0] * depth, 0
    sizes = [choose.choice([1, 1, 200, 1000, 4000]) for _ in range(300)]
    for size in sizes:
        measured = passes.plan({"going on": 1, "prompt": size}, ends[-depth])
        if measured is not None:
            num_tokens, seconds = measured
            assert seconds == pytest.approx(0.002 + num_tokens / 1e4)
            right += 1
        ends.append(ends[-1] + 0.002 + (size if size > 1 else 0) / 1e4)
    assert right > 50


def test_hits_of_several_groups_and_tiers() -> None:
    groups = (
        GroupSpec(GroupKind.FULL, (0,), 100),
        GroupSpec(GroupKind.WINDOW, (1,), 10, window_tokens=16),
        GroupSpec(GroupKind.STATE, (2,), 1),
    )
    geometry = Geometry("weights", "layout", 16, 1, groups)
    hits = hits_within(geometry, (MEMORY, MEMORY, DISK, REMOTE), start=16, last=60)
    assert [(of.num_chunks, of.num_tokens) for of in hits] == [(4, 44), (3, 32), (2, 16)]
    assert [dict(of.num_bytes) for of in hits] == [
        {MEMORY: 100, DISK: 100, REMOTE: 111},
        {MEMORY: 100, DISK: 111, REMOTE: 0},
        {MEMORY: 111, DISK: 0, REMOTE: 0},
    ]
    assert [of.farthest for of in hits] == [REMOTE, DISK, MEMORY]
    assert [of.num_chunks for of in hits_within(geometry, (MEMORY, DISK), start=16, last=32)] == [2]


@given(st.lists(st.tuples(st.floats(1, 1e12), st.floats(1e-6, 1e3), st.floats(0, 1e5)), max_size=40))
def test_an_estimate_is_one_of_the_last_observations(seen: list[tuple[float, float, float]]) -> None:
    speed, now = Speed(), 0.0
    for amount, seconds, gap in seen:
        now += gap
        speed.observe(amount, seconds, now)
    if len(seen) < 3:
        assert speed.value is None
    else:
        assert speed.value in [amount / seconds for amount, seconds, _ in seen[-16:]]


SPEEDS = st.floats(5, 10).map(lambda power: 10**power)
SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@given(
    st.floats(2, 5).map(lambda power: 10**power),
    st.fixed_dictionaries(dict.fromkeys(Tier, SPEEDS)),
    st.lists(st.tuples(st.integers(100, 20_000), SHARES, st.floats(0, 10)), max_size=100),
    st.booleans(),
)
def test_what_is_known_costs_at_most_5_ms_more_than_plain(
    prefill_speed: float, speeds: dict[Tier, float], asked: list[tuple[int, list[float], float]], mixed: bool
) -> None:
    """Nor more than to load all, where hits do not lie on several tiers. What is not known is asked three times each,
    and again twice a minute or each 64th time."""
    world = World(prefill_speed, speeds)
    num_retried = 0
    for num_tokens, shares, gap in asked:
        world.now += gap
        memory, near = (round(share * num_tokens) if mixed else round(share) * num_tokens for share in shares)
        on_tier = dict(zip(Tier, (memory, near - memory, num_tokens - near), strict=True))
        hits = [
            Hit(0, total, {of: on_tier[of] * TOKEN_BYTES for of in Tier if of <= tier})
            for tier in reversed(Tier)
            if (total := sum(on_tier[of] for of in Tier if of <= tier))
        ]
        is_known = world.gauge("prefill_tokens_per_second") and all(
            world.gauge(f"load_bytes_per_second_{tier.name.lower()}") for tier in Tier if on_tier[tier]
        )
        choice = world.cost.choose(hits)
        num_retried += choice.reason == "retried"
        seconds = world.load(choice.hit) if choice.hit is not None else 0.0
        plain = num_tokens / prefill_speed
        spent = seconds + (num_tokens - (choice.hit.num_tokens if choice.hit is not None else 0)) / prefill_speed
        if is_known and choice.reason != "retried":
            assert spent <= plain + 0.00501
            if not mixed:
                loaded = sum(on_tier[tier] * TOKEN_BYTES / speeds[tier] for tier in Tier)
                assert spent <= loaded + 0.00501
        world.prefill()
    assert num_retried <= 3 * (1 + world.now / 30 + len(asked) / 64)
