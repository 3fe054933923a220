"""Decides whether a hit is worth loading, from what passes and loads took until now. Pure: knows numbers and tiers.

A hit is loaded unless it is expected to take longer than to compute its tokens:

    load     a fixed cost + for each tier, (bytes from it + bytes from it that are in flight) / its speed, less the time
             since that was last known: engines hear of loads a pass or two after their end
    compute  (its tokens + tokens that other requests are still to compute) / the speed of prefill

Both are queues, so a storm of hits fills them in proportion to their speeds. The wait for other loads counts half, and
less where a hit loads much more quickly than it computes.

What is not known yet counts as no reason against: a tier's speed as infinite, that of prefill as zero. Speeds come from
large passes and large loads alone, so small models, whose hits save milliseconds, are never judged.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvferry.blocks import Geometry, Tier
from kvferry.config import StoreOptions
from kvferry.hit import needed_units
from kvferry.observability.metrics import Meter
from kvferry.offload.metadata import LoadEnd

GAUGES = frozenset(
    {"prefill_tokens_per_second", "load_bytes_in_flight", "tokens_to_compute"}
    | {f"load_bytes_per_second_{tier.name.lower()}" for tier in Tier}
)
"""What the meter has of here that is no counter."""

_LEAST_GAIN_SECONDS = 0.005
"""Differences below this are not worth a decision, and smaller than what the estimates are wrong by."""

_LEAST_WAIT_WEIGHT, _WAIT_WEIGHT = 0.125, 0.5
"""What a wait for other loads counts at least and at most. It takes nothing from others; computing takes the device.
While a hit is computed, in C seconds, C / L others arrive that load in L, and wait for C / 2 on average: a wait of
C * C / 2 L or less is better than that, which is to say that it counts 2 L / C. On an H200 that computed 13 to 20 of 64
hits, computing was what took longest, and it slows loads besides."""

_LOAD_SECONDS = 0.002
"""What a load costs whatever its size: to be ordered, begun and reported, each with a step of the engine's loop."""

_PROMPT_TOKENS = 32
"""A request that computes so many tokens in a pass computes its prompt: decode steps, also with drafts, are shorter."""

_LARGER = 1.1
"""Passes that are filled up with prompts differ by the tokens of those that generate."""

_EVIDENT_TOKENS, _EVIDENT_PASS_SECONDS = 64, 0.005
_EVIDENT_BYTES = 8_000_000
"""Smaller passes and loads say what it costs to begin one, or to wait for a core, not how fast they are."""

_OBSERVATIONS, _ENOUGH = 16, 3
_HALF_LIFE_SECONDS = 15.0

_BUSY_SECONDS = 0.5
"""A tier that is never idle is measured this often."""

_RETRY_SECONDS, _RETRY_DECISIONS = 30.0, 64
"""A tier whose hits are computed is tried again after so long or so many."""

_UNHEARD_SECONDS = 1.0
"""An engine that has not heard of a tier's loads for longer does not count on it that they have ended."""

_LOST_SECONDS = 30.0
"""A load that nobody reported by then does not count as in flight any more: its worker or its store has gone."""


class Speed:
    """A running estimate in units a second: the median of the last observations, by their size and, halved each 15 s,
    their age. `value` is None until there are three."""

    def __init__(self) -> None:
        self.value: float | None = None
        self._seen: deque[tuple[float, float, float]] = deque(maxlen=_OBSERVATIONS)

    def observe(self, amount: float, seconds: float, now: float) -> None:
        """`amount` units took `seconds`."""
        self._seen.append((amount / max(seconds, 1e-9), amount, now))
        if len(self._seen) < _ENOUGH:
            return
        # All weights fade alike, so between two observations the median does not move.
        weighted = sorted((speed, size * 0.5 ** ((now - at) / _HALF_LIFE_SECONDS)) for speed, size, at in self._seen)
        rest = sum(weight for _, weight in weighted) / 2
        for self.value, weight in weighted:
            rest -= weight
            if rest <= 0:
                break


@dataclass(frozen=True, slots=True)
class _Pass:
    began: float
    requests: frozenset[Hashable]
    num_prompt_tokens: int

    def leads_to(self, other: _Pass) -> bool:
        """Whether the engine did not idle between the two: a request is in both."""
        return not self.requests.isdisjoint(other.requests)


class Passes:
    """Reads the time of passes over prompts off the times at which passes are planned.

    Where passes overlap, what comes after the planning of a pass is the one before it, and its own time comes an
    interval later. Of a pass with hardly fewer prompt tokens than its neighbours the longer of the two intervals is
    about its own either way.
    """

    def __init__(self) -> None:
        self._last: deque[_Pass] = deque(maxlen=4)

    def plan(self, scheduled: Mapping[Hashable, int], now: float) -> tuple[int, float] | None:
        """A pass is planned that computes these requests' tokens. Returns the prompt tokens and the seconds of an
        earlier one, if it can be told how long that took."""
        num_tokens = sum(number for number in scheduled.values() if number >= _PROMPT_TOKENS)
        self._last.append(_Pass(now, frozenset(scheduled), num_tokens))
        if len(self._last) < 3:
            return None
        *earlier, measured, after, last = self._last
        most_tokens = _LARGER * measured.num_prompt_tokens
        if measured.num_prompt_tokens < _EVIDENT_TOKENS or after.num_prompt_tokens > most_tokens:
            return None
        if earlier and earlier[0].leads_to(measured) and earlier[0].num_prompt_tokens > most_tokens:
            return None
        if not (measured.leads_to(after) and after.leads_to(last)):
            return None
        seconds = max(after.began - measured.began, last.began - after.began)
        return (measured.num_prompt_tokens, seconds) if seconds >= _EVIDENT_PASS_SECONDS else None


@dataclass(frozen=True, slots=True)
class Hit:
    """What could be loaded: the first `num_chunks` chunks, of which the engine lacks `num_tokens` tokens, and one
    rank's bytes of them by the tier where they lie."""

    num_chunks: int
    num_tokens: int
    num_bytes: Mapping[Tier, int]

    @property
    def farthest(self) -> Tier:
        return max((tier for tier, number in self.num_bytes.items() if number), default=Tier.MEMORY)


def hits_within(geometry: Geometry, tiers: Sequence[Tier], start: int, last: int) -> list[Hit]:
    """The hits that chunks on these tiers give to an engine that has `start` tokens and can use those up to `last`: of
    all of them, then of those before the first that lies too far."""
    first_chunk, hits = start // geometry.chunk_tokens, []
    for number in dict.fromkeys((len(tiers), num_within(tiers, Tier.DISK), num_within(tiers, Tier.MEMORY))):
        num_bytes = dict.fromkeys(Tier, 0)
        for group in geometry.groups:
            units = needed_units(group, geometry.chunk_tokens, first_chunk, number)
            of_group = tiers[units.start : units.stop]
            for tier in Tier:
                num_bytes[tier] += group.part_bytes * of_group.count(tier)
        hits.append(Hit(number, min(number * geometry.chunk_tokens, last) - start, num_bytes))
    return [hit for hit in hits if hit.num_tokens > 0]


def num_within(tiers: Sequence[Tier], farthest: Tier) -> int:
    """How many chunks from the first on lie no farther."""
    return next((index for index, tier in enumerate(tiers) if tier > farthest), len(tiers))


@dataclass(frozen=True, slots=True)
class Choice:
    """The hit to load, or None, and why, in a word; what was expected of the whole hit (infinite: not known)."""

    whole: Hit
    hit: Hit | None
    reason: str
    load_seconds: float
    compute_seconds: float

    def __str__(self) -> str:
        num_tokens = self.hit.num_tokens if self.hit is not None else 0
        expected = f"{1e3 * self.load_seconds:.1f} ms to load all, {1e3 * self.compute_seconds:.1f} ms to compute them"
        return f"loads {num_tokens} of {self.whole.num_tokens} tokens ({self.reason}): {expected}"


@dataclass(slots=True)
class _Flight:
    hit: Hit
    tier: Tier
    since: float
    has_begun: bool = False


@dataclass(slots=True)
class _Busy:
    """A time in which a tier's loads follow each other, and the bytes that ended in it."""

    since: float = math.inf
    num_bytes: int = 0
    has_failures: bool = False


@dataclass(slots=True)
class _Trials:
    """When a tier was last measured, or tried again to be, and how many of its hits were not loaded since."""

    last: float = -math.inf
    num_passed: int = 0


@dataclass(slots=True)
class _Link:
    """What is known of one tier."""

    speed: Speed = field(default_factory=Speed)
    known_until: float = -math.inf
    """The last of its loads that is known to have ended did so then."""
    busy: _Busy = field(default_factory=_Busy)
    trials: _Trials = field(default_factory=_Trials)


class CostModel:
    """One engine's estimates, its loads that are promised or in flight, and the prompt tokens that its requests are
    still to compute. Counts and gauges go to `meter`."""

    def __init__(self, options: StoreOptions, meter: Meter, clock: Callable[[], float]) -> None:
        self._options = options
        self._meter = meter
        self._clock = clock
        self._passes = Passes()
        self._prefill = Speed()
        self._to_compute: dict[Hashable, int] = {}
        """By request, what of its prompt is in no pass yet: none of them has 0."""
        self._num_to_compute = 0
        self._pass_seconds = 0.0
        """How long the pass planned last should take, for the prompts in it."""
        self._planned_until = -math.inf
        """When it should have ended."""
        self._links = {tier: _Link() for tier in Tier}
        self._flights: dict[int, _Flight] = {}
        """By job id, in the order of `since`."""
        self._in_flight: Counter[Tier] = Counter()
        self._begun: Counter[Tier] = Counter()
        """Bytes of flights, and of those that have begun."""

    # -- decisions ---------------------------------------------------------------------------------------------------

    def choose(self, hits: Sequence[Hit]) -> Choice:
        """What to load of the first of `hits`: it, one of the others, which are shorter and come from nearer tiers, or
        nothing."""
        whole = hits[0]
        if self._options.load_when == "always":
            return Choice(whole, whole, "always", self._load_seconds(whole), self._compute_seconds(whole))
        self._drop_lost()
        best, best_gain = whole, self._gain_seconds(whole)
        for hit in hits[1:]:
            if (gain := self._gain_seconds(hit)) > best_gain + _LEAST_GAIN_SECONDS:
                best, best_gain = hit, gain
        if not self._has_room(best):
            return self._explain(whole, None, "in_flight")
        taken = best if best_gain >= -_LEAST_GAIN_SECONDS else None
        if taken is not whole and self._is_due(whole.farthest):
            return self._explain(whole, whole, "retried")
        return self._explain(whole, taken, "slower" if taken is None else "loaded" if taken is whole else "cut")

    def _explain(self, whole: Hit, taken: Hit | None, reason: str) -> Choice:
        if reason != "loaded":
            self._meter.add(f"hits_{reason}" if taken is not None else f"hits_computed_{reason}")
        return Choice(whole, taken, reason, self._load_seconds(whole), self._compute_seconds(whole))

    def _gain_seconds(self, hit: Hit) -> float:
        """What is loaded before the others have computed is there before its request's turn: no gain to be quicker."""
        compute, queue = self._compute_seconds(hit), self._queue_seconds()
        share = self._load_seconds(hit, 0.0) / max(compute - queue, _LOAD_SECONDS)
        wait_weight = min(max(_LEAST_WAIT_WEIGHT, 2 * share), _WAIT_WEIGHT)
        return compute - max(self._load_seconds(hit, wait_weight), queue)

    def _compute_seconds(self, hit: Hit) -> float:
        return self._queue_seconds() + hit.num_tokens / self._prefill.value if self._prefill.value else math.inf

    def _queue_seconds(self) -> float:
        """How long others are still to compute: in passes that are planned but may not have ended, and after those.
        0 if all loads are part of passes, as those begin when their request's turn has come."""
        if not self._prefill.value or self._options.async_load == "never":
            return 0.0
        return self._num_to_compute / self._prefill.value + max(0.0, self._planned_until - self._clock())

    def _load_seconds(self, hit: Hit, wait_weight: float = 1.0) -> float:
        """At least so long, as tiers of which nothing is known count as free."""
        seconds = _LOAD_SECONDS
        for tier, number in hit.num_bytes.items():
            if number and (speed := self._links[tier].speed.value):
                wait = self._in_flight[tier] / speed - min(self._begun[tier] / speed, self._unheard_seconds(tier))
                seconds += number / speed + wait_weight * wait
        return seconds

    def _unheard_seconds(self, tier: Tier) -> float:
        """How long a tier has been loading since it was known how much it had to."""
        unheard = self._clock() - max(self._links[tier].known_until, self._first_begun(tier))
        return min(max(0.0, unheard), _UNHEARD_SECONDS)

    def _has_room(self, hit: Hit) -> bool:
        """Whether a load may join those in flight: beyond the limit only if it is known to win. One may always load."""
        total = self._in_flight.total()
        if not total or total + sum(hit.num_bytes.values()) <= self._options.max_load_bytes_in_flight:
            return True
        is_known = all(self._links[tier].speed.value for tier, number in hit.num_bytes.items() if number)
        return is_known and math.isfinite(gain := self._gain_seconds(hit)) and gain > 0

    def _is_due(self, tier: Tier) -> bool:
        """Whether a hit that should rather not come from this tier does, to see how fast the tier is now."""
        trials = self._links[tier].trials
        trials.num_passed += 1
        if trials.num_passed < _RETRY_DECISIONS and self._clock() - trials.last < _RETRY_SECONDS:
            return False
        self._links[tier].trials = _Trials(self._clock())
        return True

    # -- tokens to compute -------------------------------------------------------------------------------------------

    def expect(self, request: Hashable, num_tokens: int) -> None:
        """So many tokens of a request's prompt are still to compute, whatever was said of it before. Not positive: none
        are, or it has ended."""
        num_tokens = max(0, num_tokens)
        self._num_to_compute += num_tokens - self._to_compute.pop(request, 0)
        if num_tokens:
            self._to_compute[request] = num_tokens
        self._meter.set("tokens_to_compute", self._num_to_compute)

    # -- evidence ----------------------------------------------------------------------------------------------------

    def plan(self, scheduled: Mapping[Hashable, int]) -> None:
        """A pass is planned: tokens by request, under the names that `expect` has for them."""
        now, before = self._clock(), self._num_to_compute
        for request in self._to_compute.keys() & scheduled.keys():
            self.expect(request, self._to_compute[request] - scheduled[request])
        # Engines plan one pass ahead at most, so of those before only the last can be under way.
        begins = max(now, min(self._planned_until, now + self._pass_seconds))
        self._pass_seconds = (before - self._num_to_compute) / (self._prefill.value or math.inf)
        self._planned_until = begins + self._pass_seconds
        if (measured := self._passes.plan(scheduled, now)) is not None:
            self._prefill.observe(*measured, now)
            self._meter.set("prefill_tokens_per_second", self._prefill.value or 0.0)

    def promise(self, job_id: int, hit: Hit) -> None:
        """A load is leased. It counts as in flight until `drop` or its end."""
        self._flights[job_id] = _Flight(hit, hit.farthest, self._clock())
        self._in_flight.update(hit.num_bytes)
        self._meter.set("load_bytes_in_flight", self._in_flight.total())

    def begin(self, job_id: int) -> None:
        """The movers were told of a load beside the passes."""
        if (flight := self._flights.pop(job_id, None)) is not None:
            flight.since, flight.has_begun = self._clock(), True
            self._flights[job_id] = flight
            self._begun.update(flight.hit.num_bytes)
            busy = self._links[flight.tier].busy
            busy.since = min(busy.since, flight.since)

    def drop(self, job_id: int) -> None:
        """A load never began, or nobody knows how long it took."""
        if (flight := self._land(job_id)) is not None and flight.has_begun:
            self._links[flight.tier].busy = _Busy(self._first_begun(flight.tier))

    def end(self, ends: Iterable[LoadEnd]) -> None:
        """Loads beside the passes ended, perhaps told of by several ranks."""
        latest = {end.job_id: end for end in sorted(ends, key=lambda end: end.seconds)}
        known = [(self._flights[job_id], end) for job_id, end in latest.items() if job_id in self._flights]
        for flight, end in sorted(known, key=lambda pair: pair[0].since + pair[1].seconds):
            self._land(end.job_id)
            if flight.has_begun:
                self._measure(flight, end)

    def _measure(self, flight: _Flight, end: LoadEnd) -> None:
        """Loads of one tier share its speed, so it is measured over all that follow each other without a gap."""
        tier, now = flight.tier, flight.since + end.seconds
        link, busy, first_begun = self._links[tier], self._links[tier].busy, self._first_begun(tier)
        link.known_until = max(link.known_until, now)
        busy.num_bytes += flight.hit.num_bytes[tier]
        busy.has_failures |= not end.ok
        if first_begun >= now or now - busy.since >= _BUSY_SECONDS:
            self._observe(tier, busy.num_bytes, now - busy.since, ok=not busy.has_failures)
            link.busy = _Busy(max(now, first_begun))

    def waited(self, hit: Hit, seconds: float, *, ok: bool) -> None:
        """The planner itself waited for lower tiers."""
        self._observe(hit.farthest, hit.num_bytes[hit.farthest], seconds, ok=ok)

    def _observe(self, tier: Tier, num_bytes: int, seconds: float, *, ok: bool) -> None:
        """A load that failed was no faster than this: that counts only where it says that the tier is slower."""
        speed = self._links[tier].speed
        if num_bytes < _EVIDENT_BYTES or not (ok or speed.value is None or num_bytes < seconds * speed.value):
            return
        speed.observe(num_bytes, seconds, self._clock())
        self._links[tier].trials = _Trials(self._clock())
        self._meter.set(f"load_bytes_per_second_{tier.name.lower()}", speed.value or 0.0)

    # -- loads in flight ---------------------------------------------------------------------------------------------

    def _land(self, job_id: int) -> _Flight | None:
        flight = self._flights.pop(job_id, None)
        if flight is not None:
            self._in_flight.subtract(flight.hit.num_bytes)
            self._begun.subtract(flight.hit.num_bytes if flight.has_begun else {})
            self._meter.set("load_bytes_in_flight", self._in_flight.total())
        return flight

    def _first_begun(self, tier: Tier) -> float:
        """When the first of the tier's loads under way began; infinite if there is none."""
        return next((of.since for of in self._flights.values() if of.has_begun and of.tier is tier), math.inf)

    def _drop_lost(self) -> None:
        since = self._clock() - _LOST_SECONDS
        while self._flights and self._flights[first := next(iter(self._flights))].since < since:
            self.drop(first)
