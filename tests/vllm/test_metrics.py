"""kvferry's counts as vLLM hands them on: from the scheduler's half, over an interval, to Prometheus."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvferry.integrations.vllm_messages import FerryWorkerMetadata
from kvferry.integrations.vllm_metrics import FerryPromMetrics, FerryStats
from kvferry.offload.metadata import LoadEnd


def test_what_is_counted_adds_up_and_what_is_now_does_not() -> None:
    first = {"loaded_bytes": 5, "load_tokens_disk": 256, "prefill_tokens_per_second": 9e3, "load_seconds": [0.1]}
    second = {
        "loaded_bytes": 6,
        "hits_computed_slower": 2,
        "hits_cut": 1,
        "prefill_tokens_per_second": 8e3,
        "load_bytes_per_second_memory": 2e10,
        "load_bytes_in_flight": 7,
        "tokens_to_compute": 9,
        "load_seconds": [0.3],
        "requests_not_followed": 1,
    }
    stats = FerryStats(dict(first)).aggregate(FerryStats(second))
    assert stats.reduce() == {
        "loaded_bytes": 11,
        "load_tokens_disk": 256,
        "hits_computed_slower": 2,
        "hits_cut": 1,
        "requests_not_followed": 1,
        "loads": 2,
        "mean_load_ms": 200,
    }
    registry = CollectorRegistry()
    types = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace())
    metrics = FerryPromMetrics(config, types, ["model", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
    for _ in range(2):
        metrics.observe(stats.data, engine_idx=1)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"vllm:kvferry_{name}", {"model": "m", "engine": "1", **labels})

    assert value("loaded_bytes_total") == 22
    assert value("hit_tokens_total", tier="disk") == 512
    assert value("hits_computed_total", reason="slower") == 4
    assert value("hits_computed_total", reason="in_flight") == 0
    assert value("hits_cut_total") == 2
    assert value("prefill_speed") == 8e3
    assert value("load_speed", tier="memory") == 2e10
    assert value("in_flight_bytes") == 7
    assert value("backlog_tokens") == 9
    assert value("load_seconds_count") == 4


def test_what_all_workers_say_of_loads_arrives() -> None:
    ends = [LoadEnd(1, 0.1, ok=True), LoadEnd(1, 0.2, ok=False)]
    told = FerryWorkerMetadata(set(), ends[:1]).aggregate(FerryWorkerMetadata({"a"}, ends[1:]))
    assert told == FerryWorkerMetadata({"a"}, ends)
