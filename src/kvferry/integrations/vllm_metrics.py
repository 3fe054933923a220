"""kvferry's counts in vLLM's own log and in its /metrics. Knows no request. Imports vLLM.

=============================  ===========================================================================
vllm:kvferry_hit_tokens        loaded instead of computed, by the tier on which they were found
vllm:kvferry_loaded_bytes      and
vllm:kvferry_saved_bytes       of all ranks, begun
vllm:kvferry_failed_loads      requests whose load failed, and which computed those tokens
vllm:kvferry_load_seconds      from the blocks' allocation until the request could go on
vllm:kvferry_hits_computed     hits that were not loaded, by the reason: slower, or too much in flight
vllm:kvferry_hits_cut          hits of which only what lay nearer was loaded
vllm:kvferry_hits_retried      hits that were loaded to see how fast their tier is now
vllm:kvferry_prefill_speed     estimated tokens a second
vllm:kvferry_load_speed        estimated bytes a second of one rank, by tier
vllm:kvferry_in_flight_bytes   of one rank, of loads that are promised or under way
vllm:kvferry_backlog_tokens    still to compute of the prompts of requests that have their blocks
=============================  ===========================================================================
"""

from __future__ import annotations

from functools import partial
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvferry.offload.cost import GAUGES

TIERS = ("memory", "disk", "remote")
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_COUNTERS = {
    "loaded_bytes": "Bytes of all ranks that kvferry began to load.",
    "saved_bytes": "Bytes of all ranks that kvferry began to save.",
    "failed_loads": "Requests whose load failed, so that their tokens were computed.",
    "hits_cut": "Hits of which only what lay nearer was loaded, as the rest was quicker to compute.",
    "hits_retried": "Hits that were loaded to see how fast their tier is now.",
}
_REASONS = ("slower", "in_flight")
_GAUGES = {
    "prefill_tokens_per_second": ("prefill_speed", "Estimated tokens a second of prefill."),
    "load_bytes_in_flight": ("in_flight_bytes", "One rank's bytes of loads that are promised or under way."),
    "tokens_to_compute": ("backlog_tokens", "Prompt tokens still to compute, of requests that have their blocks."),
}


class FerryStats(KVConnectorStats):
    """What happened since the last time. data: counts and gauges by name, and "load_seconds", a value a load."""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> FerryStats:
        for name, value in other.data.items():
            self.data[name] = self.data[name] + value if name in self.data and name not in GAUGES else value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log, once an interval."""
        counts = {name: value for name, value in self.data.items() if name not in {"load_seconds", *GAUGES}}
        seconds = self.data.get("load_seconds", [])
        return counts | ({"loads": len(seconds), "mean_load_ms": 1e3 * sum(seconds) / len(seconds)} if seconds else {})


class FerryPromMetrics(KVConnectorPromMetrics):
    """The same as metrics, one of each an engine."""

    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], engines: dict[int, list[Any]]
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, engines)
        counter, histogram = metric_types[Counter], metric_types[Histogram]
        hits = counter(
            name="vllm:kvferry_hit_tokens",
            documentation="Tokens that were loaded instead of computed.",
            labelnames=[*labelnames, "tier"],
        )
        computed = counter(
            name="vllm:kvferry_hits_computed",
            documentation="Hits that were not loaded, as their tokens were quicker to compute.",
            labelnames=[*labelnames, "reason"],
        )
        self._counters: dict[tuple[int, str], Any] = {}
        for engine, values in engines.items():
            self._counters |= {(engine, f"load_tokens_{tier}"): hits.labels(*values, tier) for tier in TIERS}
            self._counters |= {(engine, f"hits_computed_{why}"): computed.labels(*values, why) for why in _REASONS}
        for name, text in _COUNTERS.items():
            metric = counter(name=f"vllm:kvferry_{name}", documentation=text, labelnames=labelnames)
            self._counters |= {(engine, name): metric.labels(*values) for engine, values in engines.items()}
        self._add_gauges(metric_types[Gauge], labelnames, engines)
        seconds = histogram(
            name="vllm:kvferry_load_seconds",
            documentation="From the allocation of a request's blocks until it could go on.",
            labelnames=labelnames,
            buckets=_BUCKETS,
        )
        self._seconds = {engine: seconds.labels(*values) for engine, values in engines.items()}

    def _add_gauges(self, gauge: Any, labelnames: list[str], engines: dict[int, list[Any]]) -> None:
        gauge = partial(gauge, multiprocess_mode="mostrecent")
        text = "Estimated bytes a second that one rank loads."
        load = gauge(name="vllm:kvferry_load_speed", documentation=text, labelnames=[*labelnames, "tier"])
        self._gauges: dict[tuple[int, str], Any] = {}
        for engine, values in engines.items():
            self._gauges |= {(engine, f"load_bytes_per_second_{tier}"): load.labels(*values, tier) for tier in TIERS}
        for name, (shown, text) in _GAUGES.items():
            metric = gauge(name=f"vllm:kvferry_{shown}", documentation=text, labelnames=labelnames)
            self._gauges |= {(engine, name): metric.labels(*values) for engine, values in engines.items()}

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            if name == "load_seconds":
                for seconds in value:
                    self._seconds[engine_idx].observe(seconds)
            elif (engine_idx, name) in self._gauges:
                self._gauges[engine_idx, name].set(value)
            elif (engine_idx, name) in self._counters:
                self._counters[engine_idx, name].inc(value)
