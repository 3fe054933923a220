from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvferry.config import KvCacheConnectorConfig
from kvferry.connector import Preset, presets, register_preset, resolve
from kvferry.errors import ConfigError, ConnectorError, ConnectorImportError, UnknownPresetError


@pytest.fixture(autouse=True)
def registry_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["kvferry.connector.presets"]
    monkeypatch.setattr(module, "_presets", dict(presets()))


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules can be imported during the test."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def explicit(module: str, scheduler: str = "S", worker: str = "W") -> KvCacheConnectorConfig:
    return KvCacheConnectorConfig(
        connector_module=module, connector_scheduler_class=scheduler, connector_worker_class=worker
    )


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_resolves_to_its_classes(name: str) -> None:
    classes = resolve(KvCacheConnectorConfig(connector=name))
    assert classes.scheduler.__name__ == presets()[name].scheduler_class
    assert classes.worker.__name__ == presets()[name].worker_class


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UnknownPresetError, match=r"'kvfery'; known: kvferry, kvferry-server, persistent") as caught:
        resolve(KvCacheConnectorConfig(connector="kvfery"))
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, ConnectorError)


def test_a_missing_module_is_named_with_the_import_s_own_message() -> None:
    with pytest.raises(ConnectorImportError) as caught:
        resolve(explicit("no_such_connector", "Here", "There"))
    for word in ("'no_such_connector'", "Here", "There", "ModuleNotFoundError: No module named 'no_such_connector'"):
        assert word in str(caught.value)
    assert isinstance(caught.value, ImportError)


def test_a_module_that_breaks_while_it_is_imported_is_named(importable: Path) -> None:
    (importable / "broken_connector.py").write_text("raise OSError('libfoo.so: cannot open')")
    with pytest.raises(ConnectorImportError, match=r"'broken_connector'.*OSError: libfoo\.so: cannot open"):
        resolve(explicit("broken_connector"))


@pytest.mark.parametrize(("text", "missing"), [("class S: ...", "W"), ("class W: ...", "S"), ("S = W = 3", "S")])
def test_a_missing_class_is_named(importable: Path, monkeypatch: pytest.MonkeyPatch, text: str, missing: str) -> None:
    (importable / "partial_connector.py").write_text(text)
    monkeypatch.delitem(sys.modules, "partial_connector", raising=False)
    with pytest.raises(ConnectorImportError, match=f"'partial_connector' has no class '{missing}'"):
        resolve(explicit("partial_connector"))
    monkeypatch.delitem(sys.modules, "partial_connector", raising=False)


def test_a_registered_preset_resolves(importable: Path) -> None:
    (importable / "own_connector.py").write_text("class S: ...\nclass W: ...")
    register_preset("own", Preset("own_connector", "S", "W"))
    assert resolve(KvCacheConnectorConfig(connector="own")).worker.__name__ == "W"
    assert "own" in presets()


def test_a_name_keeps_its_meaning() -> None:
    register_preset("kvferry", presets()["kvferry"])
    with pytest.raises(ConfigError, match=r"'kvferry' already means"):
        register_preset("kvferry", Preset("other", "S", "W"))
