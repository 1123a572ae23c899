"""The benchmark programs as modules: they are scripts beside each other, in no package."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from tests.conftest import ROOT


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    """Import a program by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load
