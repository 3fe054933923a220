"""The outcome of a check, as objects, as text and as JSON. Knows no engine."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass

import msgspec

from kvferry.observability.columns import aligned
from kvferry.testing.connector.faults import Fault


class Result(enum.StrEnum):
    """What became of a scenario."""

    OK = "ok"
    WARNING = "warn"
    """It passed, with something worth a look."""
    FAIL = "FAIL"
    NOT_OFFERED = "not offered"
    """The connector does not do such a thing, and need not; or there is not the hardware for it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: `seen` is its first occasion of `count`."""

    fault: Fault
    seen: str
    count: int = 1

    def __str__(self) -> str:
        return self.seen if self.count == 1 else f"{self.seen} (and {self.count - 1} more)"


@dataclass(frozen=True, slots=True)
class ScenarioReport:
    """One scenario. note: what it came to where there is nothing to complain of."""

    scenario: str
    result: Result
    findings: tuple[Finding, ...] = ()
    note: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """What `check_connector` found; as text, a table of all scenarios and the contract of each fault in it."""

    connector: str
    scenarios: tuple[ScenarioReport, ...]

    @property
    def passed(self) -> bool:
        """Whether no scenario failed."""
        return all(scenario.result is not Result.FAIL for scenario in self.scenarios)

    @property
    def faults(self) -> frozenset[str]:
        """Names of all faults found, warnings too."""
        return frozenset(finding.fault.label for scenario in self.scenarios for finding in scenario.findings)

    def __str__(self) -> str:
        lines = [f"connector {self.connector}", "", aligned(("scenario", "result", "fault", "seen"), self._rows())]
        contracts = {finding.fault for scenario in self.scenarios for finding in scenario.findings}
        if contracts:
            rows = [(fault.label, fault.contract) for fault in Fault if fault in contracts]
            lines += ["", aligned(("fault", "what the contract says"), rows)]
        failed = sum(scenario.result is Result.FAIL for scenario in self.scenarios)
        lines += ["", f"{failed} of {len(self.scenarios)} scenarios failed" if failed else "no scenario failed"]
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for scenario in self.scenarios:
            found = [(finding.fault.label, str(finding)) for finding in scenario.findings] or [("", scenario.note)]
            rows.append((scenario.scenario, str(scenario.result), *found[0]))
            rows += [("", "", *more) for more in found[1:]]
        return rows

    def to_json(self) -> str:
        """The same for programs: `connector`, `passed`, and of each scenario all fields, each finding with its fault's
        name and contract."""
        scenarios = [
            {
                **{field.name: getattr(scenario, field.name) for field in dataclasses.fields(scenario)},
                "findings": [
                    {
                        "fault": finding.fault.label,
                        "seen": finding.seen,
                        "count": finding.count,
                        "contract": finding.fault.contract,
                        "warning": finding.fault.is_warning,
                    }
                    for finding in scenario.findings
                ],
            }
            for scenario in self.scenarios
        ]
        found = {"connector": self.connector, "passed": self.passed, "scenarios": scenarios}
        return msgspec.json.format(msgspec.json.encode(found), indent=2).decode()
