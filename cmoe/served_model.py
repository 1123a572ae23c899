"""An export as MLflow serves it: the script of a "models from code" model, copied into it and run by MLflow.

It takes what the stream stores: images and vectors as an array (N, ...), texts as a column `text`. The parameter `task`
gives the task label. It answers with a row for each input: class, id and confidence, or for a language model bytes,
bits_per_byte and accuracy. Nothing of cmoe imports this file.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model

from cmoe.errors import UserError
from cmoe.export import load
from cmoe.predict import encode, fitting


def _rows(restored, raw: torch.Tensor, task: int | None) -> list[dict[str, Any]]:
    best = (top[0] for top in restored.classes(raw, task))
    return [{"class": restored.class_names[c], "id": c, "confidence": share} for c, share in best]


def _texts(restored, texts: list[str], task: int | None) -> list[dict[str, Any]]:
    if not restored.stream.language:
        return _rows(restored, encode(texts, restored.stream), task)
    rows = []
    for text in map(str.encode, texts):
        if not text:
            raise UserError("text: expected at least one byte, got none")
        bits, accuracy = restored.language(text, task)
        rows.append({"bytes": len(text), "bits_per_byte": bits, "accuracy": accuracy})
    return rows


def _arrays(restored, values, task: int | None) -> list[dict[str, Any]]:
    raw = fitting("inputs", np.asarray(values), restored.stream, logging.getLogger("cmoe").warning, task or 0)
    return _rows(restored, raw, task)


class Served(mlflow.pyfunc.PythonModel):
    """An export behind MLflow's pyfunc interface."""

    def load_context(self, context) -> None:
        """Restore the model once."""
        self.restored = load(Path(context.artifacts["export"]))

    # of all type hints this one makes MLflow neither check nor warn; texts come as a data frame
    def predict(self, context, model_input: np.ndarray, params=None):
        """A row for each input, see the module."""
        restored = self.restored
        try:
            task = restored.task((params or {}).get("task"), key="params.task")
            if restored.stream.vocabulary is None:
                return pd.DataFrame(_arrays(restored, model_input, task))
            texts = model_input["text"] if isinstance(model_input, pd.DataFrame) else model_input
            return pd.DataFrame(_texts(restored, [str(t) for t in texts], task))
        except UserError as error:  # the client's mistake: HTTP 400
            raise MlflowException.invalid_parameter_value(str(error)) from error


set_model(Served())
