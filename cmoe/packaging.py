"""The MLflow model of an export ("models from code": a script and the export's files, no pickle)."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

    from cmoe.restored import Restored

SCRIPT = Path(__file__).with_name("served_model.py")
PACKAGES = ("cmoe", "torch", "mlflow", "pandas")  # what serving in an environment of its own installs


def save_mlflow(restored: Restored, export: Path, target: Path) -> None:
    """Write the MLflow model of an export's folder, which is copied into it.

    Args:
        restored: the exported model.
        export: `model.safetensors`, `config.json` and perhaps `plugins/`.
        target: a new folder.
    """
    with _quiet():
        import mlflow.pyfunc
    with _quiet():  # again: the import sets log levels
        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(SCRIPT),
            artifacts={"export": str(export)},
            signature=signature(restored),
            input_example=example(restored),
            pip_requirements=[f"{name}=={version(name)}" for name in PACKAGES],
            metadata={"cmoe.run": restored.run_id},
        )


def signature(restored: Restored) -> ModelSignature:
    """What the served model takes and gives."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    if restored.stream.vocabulary is not None:
        takes = Schema([ColSpec("string", "text")])
    else:
        blank = restored.raw_like(1).numpy()
        takes = Schema([TensorSpec(blank.dtype, (-1, *blank.shape[1:]))])
    if restored.stream.language:
        gives = Schema([ColSpec("long", "bytes"), ColSpec("double", "bits_per_byte"), ColSpec("double", "accuracy")])
    else:
        gives = Schema([ColSpec("string", "class"), ColSpec("long", "id"), ColSpec("double", "confidence")])
    return ModelSignature(takes, gives, ParamSchema([ParamSpec("task", "string", "")]))


def example(restored: Restored) -> Any:
    """An example request: a blank sample, with a task label where one is needed."""
    if restored.stream.vocabulary is not None:
        import pandas as pd

        data: Any = pd.DataFrame({"text": ["what is the weather like today"]})
    else:
        data = restored.raw_like(1).numpy()
    if restored.why_task() is None:
        return data
    return data, {"task": restored.stream.experiences[(restored.state["learned"] or [0])[0]].name}


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """MLflow announces and warns about much that is no news for a user."""
    bar = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    before = os.environ.get(bar)
    logger = logging.getLogger("mlflow")
    level = logger.level
    os.environ[bar] = "false"
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        os.environ.pop(bar)
        if before is not None:
            os.environ[bar] = before
