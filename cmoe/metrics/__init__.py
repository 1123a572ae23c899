"""Metrics of continual learning as pure functions of the recorded predictions.

Every published metric has its own name and function; one whose cells were not evaluated raises `Undefined` with the
reason instead of averaging over what is there. `compute` gives all of a run at once.
"""

from cmoe.metrics.accuracy import (
    acc_macro,
    acc_micro,
    avg_incremental_acc,
    avg_incremental_acc_macro,
    learning_accuracy,
)
from cmoe.metrics.calibration import brier_top_label, ece, reliability
from cmoe.metrics.catalogue import compute
from cmoe.metrics.diaz import acc_diaz, bwt_diaz, bwt_plus, fwt_diaz, rem
from cmoe.metrics.forgetting import forgetting_chaudhry, forgetting_first_minus_last, intransigence
from cmoe.metrics.gem import bwt_gem, fwt_gem
from cmoe.metrics.matrix import View, view, views
from cmoe.metrics.mtil import average, last, transfer
from cmoe.metrics.recency import recency_bias
from cmoe.metrics.record import Column, Record, Row
from cmoe.metrics.stability import min_acc, wc_acc
from cmoe.metrics.statistics import Summary, paired_difference, summarise
from cmoe.metrics.value import Undefined, Value

__all__ = [
    "Column",
    "Record",
    "Row",
    "Summary",
    "Undefined",
    "Value",
    "View",
    "acc_diaz",
    "acc_macro",
    "acc_micro",
    "average",
    "avg_incremental_acc",
    "avg_incremental_acc_macro",
    "brier_top_label",
    "bwt_diaz",
    "bwt_gem",
    "bwt_plus",
    "compute",
    "ece",
    "forgetting_chaudhry",
    "forgetting_first_minus_last",
    "fwt_diaz",
    "fwt_gem",
    "intransigence",
    "last",
    "learning_accuracy",
    "min_acc",
    "paired_difference",
    "recency_bias",
    "reliability",
    "rem",
    "summarise",
    "transfer",
    "view",
    "views",
    "wc_acc",
]
