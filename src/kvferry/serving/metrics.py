"""What the server counts, in Prometheus' text format. Connectors that have `stats()` are read as they are.

Knows the connector's two halves only as objects that may have `stats()`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, UntypedMetricFamily

from kvferry.connector.manager import KvCacheConnectorManager
from kvferry.engine.outputs import FinishReason, RequestOutput
from kvferry.observability.log import OnceLog

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class ServingMetrics:
    """Counts requests as they end, and reads the rest when it is asked.

    states: gives how many requests run and how many wait. manager: of the connector, if there is one.
    """

    def __init__(self, states: Callable[[], dict[str, int]], manager: KvCacheConnectorManager | None) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("kvferry_requests", "Requests by how they ended", ["outcome"], registry=registry)
        self._prompt_tokens = Counter("kvferry_prompt_tokens", "Tokens of served prompts", registry=registry)
        self._generated_tokens = Counter("kvferry_generated_tokens", "Tokens generated", registry=registry)
        self._cached_tokens = Counter(
            "kvferry_cached_tokens", "Prompt tokens whose KV was not computed", ["source"], registry=registry
        )
        self._ttft = Histogram(
            "kvferry_time_to_first_token_seconds", "From submission", registry=registry, buckets=_SECONDS
        )
        self._duration = Histogram("kvferry_request_seconds", "From submission", registry=registry, buckets=_SECONDS)
        for outcome in [reason.value for reason in FinishReason] + ["refused"]:
            self._requests.labels(outcome)
        for source in ("pool", "connector"):
            self._cached_tokens.labels(source)
        self._states = states
        self._manager = manager
        self._log = OnceLog(logging.getLogger("kvferry.serving"))
        registry.register(self)

    def count(self, output: RequestOutput) -> None:
        """A request ended, or whoever wanted it has gone."""
        metrics = output.metrics
        self._requests.labels((output.finish_reason or FinishReason.ABORT).value).inc()
        if metrics.ttft_seconds is not None:
            self._prompt_tokens.inc(metrics.num_prompt_tokens)
            self._cached_tokens.labels("pool").inc(metrics.num_pool_tokens)
            self._cached_tokens.labels("connector").inc(metrics.num_connector_tokens)
            self._ttft.observe(metrics.ttft_seconds)
        if metrics.duration_seconds is not None:
            self._duration.observe(metrics.duration_seconds)
        self._generated_tokens.inc(len(output.token_ids))

    def count_refused(self) -> None:
        """A body was refused before anything ran."""
        self._requests.labels("refused").inc()

    def render(self) -> bytes:
        """All of it as text."""
        return generate_latest(self._registry)

    def describe(self) -> Iterator[Metric]:
        """For the registry: nothing is known of `collect` before it is asked."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """For the registry: numbers that others keep, read at the moment of asking. Thread-safe."""
        now = GaugeMetricFamily("kvferry_requests_now", "Requests that run and that wait", labels=["state"])
        for state, number in self._states().items():
            now.add_metric([state], number)
        yield now
        if self._manager is None:
            return
        errors = CounterMetricFamily("kvferry_connector_errors", "Errors of the connector", labels=["hook"])
        for hook, number in dict(self._manager.num_errors).items():
            errors.add_metric([hook], number)
        yield errors
        for half in (self._manager.scheduler, self._manager.worker):
            for name, value in sorted(self._stats(half).items()):
                # A connector does not say which of its numbers only grow.
                safe = re.sub(r"\W", "_", f"kvferry_connector_{name}", flags=re.ASCII)
                yield UntypedMetricFamily(safe, "See the connector", value)

    def _stats(self, half: object) -> dict[str, float]:
        try:
            stats: Callable[[], Mapping[str, float]] = getattr(half, "stats", dict)
            return {str(name): float(value) for name, value in stats().items()}
        except Exception as error:  # noqa: BLE001 - a foreign hook
            name = type(half).__qualname__
            self._log.warn(name, "the stats of %s cannot be read: %r", name, error)
            return {}
