"""Every metric of a record, each under `<view>/<its own name>`, with a value or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from cmoe.metrics import accuracy, diaz, forgetting, gem, mtil, stability
from cmoe.metrics.calibration import brier_top_label, ece
from cmoe.metrics.matrix import VIEWS, View, view
from cmoe.metrics.recency import recency_bias
from cmoe.metrics.record import Record
from cmoe.metrics.value import Array, Undefined, Value

# Means keep the view's unit; their names say "acc", which bits per byte are not.
MEANS: dict[str, str] = {
    "acc_macro": "bpb_macro",
    "acc_micro": "bpb_micro",
    "avg_incremental_acc": "avg_incremental_bpb",
    "avg_incremental_acc_macro": "avg_incremental_bpb_macro",
    "learning_accuracy": "learning_bpb",
    "acc_diaz": "bpb_diaz",
    "fwt_diaz": "fwt_diaz",
    "transfer": "transfer",
    "average": "average",
    "last": "last",
    "min_acc": "worst_bpb",
    "wc_acc": "wc_bpb",
}
# Differences are positive for better (transfer) or for worse (forgetting) in every view.
DIFFERENCES = (
    "bwt_gem",
    "fwt_gem",
    "forgetting_chaudhry",
    "forgetting_first_minus_last",
    "bwt_diaz",
    "rem",
    "bwt_plus",
    "intransigence",
)
MASKED = "undefined where unseen classes are masked or the head grows"


def compute(
    record: Record,
    upto: int | None = None,
    *,
    unseen_masked: bool = False,
    joint: Mapping[str, Array] | None = None,
) -> dict[str, Value]:
    """All metrics of a record.

    Args:
        upto: as of this row, over the experiences 0 … upto; default is the last row.
        unseen_masked: outputs of unseen classes are masked in class-IL predictions, or the head grows: then forward
            transfer is undefined for `class_il`.
        joint: by view, (T,) scores of models trained jointly on experiences 0 … i, for intransigence.

    Returns:
        Values by `<view>/<metric>`, a fixed order. For `bits_per_byte`, lower is better: differences have their sign
        turned, so that positive forgetting means worse, and means are named after the unit (`MEANS`).
    """
    index = record.last if upto is None else upto
    out: dict[str, Value] = {}
    for name in VIEWS[record.kind]:
        full = view(record, name)
        if index < 0 or not full.evaluated:
            reason = "nothing was learned yet" if index < 0 else _NO_VIEW.get(name, "not evaluated")
            out |= {f"{name}/{metric}": Value(None, reason) for metric in _names(name)}
            continue
        out |= {f"{name}/{k}": v for k, v in _of_view(full.upto(index), unseen_masked, (joint or {}).get(name)).items()}
        if record.kind == "classification":
            out |= {f"{name}/{k}": v for k, v in _of_predictions(record, name, index).items()}
    return out


def metric_names() -> list[str]:
    """Every name that `compute` may give a value."""
    names = dict.fromkeys(name for views in VIEWS.values() for name in views)
    return [f"{name}/{metric}" for name in names for metric in _names(name)]


def lower_is_better(name: str) -> bool:
    """Of a name that `compute` gives: forgetting, errors of calibration, and whatever is in bits per byte but a transfer."""
    view_name, _, metric = name.partition("/")
    if metric.startswith("forgetting") or metric in ("intransigence", "recency_bias", *CALIBRATION):
        return True
    return view_name == "bits_per_byte" and metric in MEANS.values()


_NO_VIEW = {
    "class_il": "no prediction without a task label was recorded",
    "task_il": "no prediction with a task label was recorded",
}


def _names(view_name: str) -> list[str]:
    means = list(MEANS.values()) if view_name == "bits_per_byte" else list(MEANS)
    own = {"class_il": ["recency_bias", *CALIBRATION], "task_il": list(CALIBRATION)}.get(view_name, [])
    return [*means, *DIFFERENCES, *own]


def _of_view(view: View, unseen_masked: bool, joint: Array | None) -> dict[str, Value]:
    sign = 1.0 if view.higher_is_better else -1.0
    R, b, n = sign * view.R, sign * view.b, view.n
    within = [(i, sign * scores) for i, _, scores in view.within]
    reference = None if joint is None else sign * np.asarray(joint, dtype=np.float64)
    functions: dict[str, Callable[[], float]] = {
        "acc_macro": lambda: accuracy.acc_macro(R),
        "acc_micro": lambda: accuracy.acc_micro(R, n),
        "avg_incremental_acc": lambda: accuracy.avg_incremental_acc(R, n),
        "avg_incremental_acc_macro": lambda: accuracy.avg_incremental_acc_macro(R),
        "learning_accuracy": lambda: accuracy.learning_accuracy(R),
        "acc_diaz": lambda: diaz.acc_diaz(R),
        "fwt_diaz": lambda: diaz.fwt_diaz(R),
        "transfer": lambda: mtil.transfer(R),
        "average": lambda: mtil.average(R),
        "last": lambda: mtil.last(R),
        "min_acc": lambda: stability.min_acc(R, within),
        "wc_acc": lambda: stability.wc_acc(R, within),
        "bwt_gem": lambda: gem.bwt_gem(R),
        "fwt_gem": lambda: gem.fwt_gem(R, b),
        "forgetting_chaudhry": lambda: forgetting.forgetting_chaudhry(R),
        "forgetting_first_minus_last": lambda: forgetting.forgetting_first_minus_last(R),
        "bwt_diaz": lambda: diaz.bwt_diaz(R),
        "rem": lambda: diaz.rem(R),
        "bwt_plus": lambda: diaz.bwt_plus(R),
        "intransigence": lambda: forgetting.intransigence(R, reference),
    }
    refused = {"rem": "defined for scores in [0, 1]"} if not view.higher_is_better else {}
    if view.name == "class_il" and unseen_masked:
        refused["fwt_gem"] = MASKED
    out: dict[str, Value] = {}
    for metric, better in MEANS.items():
        value = _value(functions[metric], sign)
        out[metric if view.higher_is_better else better] = value
    for metric in DIFFERENCES:
        out[metric] = Value(None, refused[metric]) if metric in refused else _value(functions[metric], 1.0)
    return out


CALIBRATION = {"ece": ece, "brier_top_label": brier_top_label}


def _of_predictions(record: Record, name: str, index: int) -> dict[str, Value]:
    """What needs the predictions themselves: recency bias, and calibration over the test sets of 0 … index together."""
    row = record.rows.get(index)
    columns = [row.columns.get(j) if row else None for j in range(index + 1)]
    field = "pred" if name == "class_il" else "task_pred"
    predictions = [None if c is None else getattr(c, field) for c in columns]
    out: dict[str, Value] = {}
    if name == "class_il":
        out["recency_bias"] = _value(lambda: recency_bias(predictions, record.classes[: index + 1]))
    confidences = [None if c is None else (c.confidence if name == "class_il" else c.task_confidence) for c in columns]
    for metric, function in CALIBRATION.items():

        def pooled(function=function) -> float:
            parts = []
            for j, (predicted, confidence) in enumerate(zip(predictions, confidences, strict=True)):
                if predicted is None or confidence is None:
                    raise Undefined(f"confidences were not recorded for experience {j}")
                made = predicted >= 0
                parts.append((confidence[made], (predicted == record.targets[j])[made]))
            return function(np.concatenate([c for c, _ in parts]), np.concatenate([r for _, r in parts]))

        out[metric] = _value(pooled)
    return out


def _value(function: Callable[[], float], sign: float = 1.0) -> Value:
    try:
        return Value(sign * function() + 0.0)  # + 0.0: no negative zero
    except Undefined as why:
        return Value(None, str(why))
