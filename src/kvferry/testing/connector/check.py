"""Runs scenarios against one connector and puts together what was found."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from kvferry.config import KvCacheConnectorConfig
from kvferry.connector.presets import resolve
from kvferry.errors import ConfigError, EngineDeadError
from kvferry.testing.connector.faults import Fault
from kvferry.testing.connector.reference import Reference
from kvferry.testing.connector.report import Report, Result, ScenarioReport
from kvferry.testing.connector.scenarios import SCENARIOS
from kvferry.testing.connector.session import Session
from kvferry.testing.connector.trial import CheckOptions, NotOffered, Stuck, Trial
from kvferry.testing.models import make_model


def check_connector(
    config: KvCacheConnectorConfig,
    scenarios: Sequence[str] = (),
    options: CheckOptions | None = None,
    on_scenario: Callable[[str], None] | None = None,
) -> Report:
    """Check the connector that `config` names, in the scenarios named, or in all of `SCENARIOS`.

    on_scenario: told each scenario's name as it begins. ConfigError: no such scenario, or an option of the check or of
    the connector is wrong. UnknownPresetError, ConnectorImportError: there is no such connector. RequestError: there is
    no such model. Whatever else goes wrong is in the report.
    """
    options = options or CheckOptions()
    if unknown := [name for name in scenarios if name not in SCENARIOS]:
        raise ConfigError(f"no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
    resolve(config)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvferry-check-")))
        session = stack.enter_context(Session(config, folder))
        references: dict[str, Reference] = {}

        def reference(family: str) -> Reference:
            if family not in references:
                model = _model(family, session, options)
                references[family] = Reference(session, model, options.tokens_per_block, options.device)
                stack.callback(references[family].close)
            return references[family]

        trial = Trial(session, options, reference)
        reports = []
        for name in scenarios or SCENARIOS:
            if on_scenario is not None:
                on_scenario(name)
            reports.append(_run(trial, name))
        return Report(_name(config), tuple(reports))


def _model(family: str, session: Session, options: CheckOptions) -> str:
    """A model with the same weights each time, so that tokens repeat, under an identity of its own, so that nothing is
    found that an earlier check kept."""
    if options.model is not None and family == "llama":
        return options.model
    return str(make_model(family, session.folder / family, made_for_check=session.session_id))


def _run(trial: Trial, name: str) -> ScenarioReport:
    if trial.is_stuck:
        return ScenarioReport(name, Result.NOT_OFFERED, note="not run: an engine hangs")
    trial.begin(name)
    started = time.monotonic()
    note, result = "", Result.OK
    try:
        note = SCENARIOS[name](trial)
    except NotOffered as reason:
        note, result = str(reason), Result.NOT_OFFERED
    except EngineDeadError as error:
        trial.session.found(Fault.REQUEST_LOST, str(error))
    except Stuck:
        note = "not finished"
    findings = tuple(trial.session.take_found())
    if findings:
        result = Result.WARNING if all(finding.fault.is_warning for finding in findings) else Result.FAIL
    return ScenarioReport(name, result, findings, note, round(time.monotonic() - started, 2))


def _name(config: KvCacheConnectorConfig) -> str:
    if config.connector is not None:
        return config.connector
    return f"{config.connector_module}:{config.connector_scheduler_class},{config.connector_worker_class}"
