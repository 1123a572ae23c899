"""How a run with strategies decides: by the model, by a strategy's own rule, with the task label given or inferred."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from cmoe.strategies.base import Strategy
from cmoe.strategies.infer_task import InferTask

Predict = Callable[[Tensor, int | None], Tensor | None]


def deciding(strategies: Sequence[Strategy]) -> Predict | None:
    """Logits for inputs whose task label is given or None, as `Strategy.predict` gives them; None is the model's own rule."""
    own = next((s.predict for s in strategies if s.owns_predict), None)
    infers = next((s for s in strategies if isinstance(s, InferTask)), None)
    if infers is None:
        return own

    def predict(x: Tensor, task: int | None) -> Tensor | None:
        if task is None:
            return infers.decided(x, own)
        return None if own is None else own(x, task)

    return predict
