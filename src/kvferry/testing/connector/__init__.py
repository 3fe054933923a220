"""Checks any KV cache connector: its whole life on the embedded engine, with a tiny model, on any machine.

    from kvferry import KvCacheConnectorConfig
    from kvferry.testing.connector import check_connector

    def test_my_connector(tmp_path):
        config = KvCacheConnectorConfig(
            connector_module="my_connector",
            connector_scheduler_class="MyScheduler",
            connector_worker_class="MyWorker",
            options={"folder": str(tmp_path)},
        )
        report = check_connector(config)
        assert report.passed, report

Or a test for each scenario: parametrize over `SCENARIOS` and pass `[scenario]`. The same from a shell: `kvferry check`.

The engine runs two probes in the connector's place, which pass every call on and watch the pool. So the kit compares
tokens and, block by block, the bytes that are loaded, with those of an engine without a connector; sees what is written
where and when; and names what it finds (`Fault`), each with what the API's contract says.
"""

from __future__ import annotations

from kvferry.testing.connector.check import check_connector
from kvferry.testing.connector.faults import Fault
from kvferry.testing.connector.report import Finding, Report, Result, ScenarioReport
from kvferry.testing.connector.scenarios import SCENARIOS
from kvferry.testing.connector.trial import CheckOptions

__all__ = ["SCENARIOS", "CheckOptions", "Fault", "Finding", "Report", "Result", "ScenarioReport", "check_connector"]
