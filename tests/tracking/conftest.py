"""A migrated database to copy: making one takes seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cmoe.tracking import store


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    location = store.locate(tmp_path_factory.mktemp("template"), uri=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store.prepare(store.locate(location.root))
    return location.root / "mlflow.db"


@pytest.fixture
def location(template, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = Path(tmp_path) / "mlruns"
    root.mkdir()
    shutil.copy(template, root / "mlflow.db")
    return store.locate(root)
