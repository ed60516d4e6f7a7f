"""torchvision must import with or without its compiled operators, and other failures must not be hidden."""

from __future__ import annotations

import sys
import types

import pytest

from data import torchvision_compat as compat


def test_imports_with_datasets_and_twice():
    torchvision = compat.import_torchvision()
    assert hasattr(torchvision.datasets, "MNIST")
    assert compat.import_torchvision() is torchvision


def fake_import(monkeypatch, outcomes):
    """Make the import end as the outcomes say, one after the other, and count declarations."""
    calls = []

    def fake():
        calls.append("import")
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(compat, "_import", fake)
    monkeypatch.setattr(compat, "_purge", lambda: calls.append("purge"))
    monkeypatch.setattr(compat, "_declare_operators", lambda: calls.append("declare"))
    return calls


def test_a_sound_torchvision_is_left_alone(monkeypatch):
    module = types.ModuleType("torchvision")
    calls = fake_import(monkeypatch, [module])
    assert compat.import_torchvision() is module
    assert calls == ["import"]


def test_missing_operators_are_declared_once(monkeypatch):
    module = types.ModuleType("torchvision")
    calls = fake_import(monkeypatch, [RuntimeError("operator torchvision::nms does not exist"), module])
    assert compat.import_torchvision() is module
    assert calls == ["import", "purge", "declare", "import"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA versions differ"), ImportError("no torchvision")])
def test_other_errors_pass_through(monkeypatch, error):
    calls = fake_import(monkeypatch, [error])
    with pytest.raises(type(error), match=str(error)):
        compat.import_torchvision()
    assert calls == ["import"]


def test_purge_forgets_torchvision_only(monkeypatch):
    modules = {"torchvision": None, "torchvision.ops": None, "torchvisionary": None, "torch": sys.modules["torch"]}
    monkeypatch.setattr(sys, "modules", modules)
    compat._purge()
    assert set(modules) == {"torchvisionary", "torch"}
