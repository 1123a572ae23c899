"""From predictions to named values: views, signs, and reasons."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cmoe import metrics as m
from cmoe.metrics import Column, Record, compute, view

from .helpers import classification, column, language


def value(values, name):
    assert values[name].value is not None, f"{name}: {values[name].reason}"
    return values[name].value


def test_matrix_counts_right_predictions():
    record = classification(1)
    v = view(record, "class_il")
    for i in range(4):
        for j in range(4):
            assert v.R[i, j] == np.mean(record.rows[i].columns[j].pred == record.targets[j])
    assert v.b[2] == np.mean(record.rows[-1].columns[2].pred == record.targets[2])
    assert v.n.tolist() == [13, 7, 20, 10]


def test_micro_is_the_accuracy_of_all_samples_together():
    record = classification(2)
    values = compute(record)
    row = record.rows[3].columns
    every = np.concatenate([row[j].pred == record.targets[j] for j in range(4)])
    assert value(values, "class_il/acc_micro") == pytest.approx(every.mean())
    seen = [
        np.concatenate([record.rows[i].columns[j].pred == record.targets[j] for j in range(i + 1)]) for i in range(4)
    ]
    assert value(values, "class_il/avg_incremental_acc") == pytest.approx(np.mean([s.mean() for s in seen]))


def test_every_name_of_the_reference_list_is_there_for_every_view():
    names = {
        "acc_macro", "acc_micro", "bwt_gem", "fwt_gem", "forgetting_chaudhry", "forgetting_first_minus_last",
        "avg_incremental_acc", "avg_incremental_acc_macro", "acc_diaz", "bwt_diaz", "rem", "bwt_plus", "fwt_diaz",
        "transfer", "average", "last", "intransigence", "learning_accuracy", "min_acc", "wc_acc",
    }  # fmt: skip
    values = compute(classification())
    for name in ("class_il", "task_il"):
        assert {f"{name}/{n}" for n in names} <= values.keys()
    assert {"class_il/recency_bias", "class_il/ece", "task_il/ece"} <= values.keys()
    assert {f"next_byte_accuracy/{n}" for n in names} <= compute(language()).keys()


@pytest.mark.parametrize("record", [classification(rows=[]), classification(), classification(task=False), language()])
def test_the_names_do_not_depend_on_what_was_evaluated(record):
    reference = classification() if record.kind == "classification" else language()
    assert list(compute(record)) == list(compute(reference))


def test_absent_with_a_reason():
    values = compute(classification())
    assert "jointly" in str(values["class_il/intransigence"].reason)
    assert "every n steps" in str(values["class_il/min_acc"].reason)
    assert values["class_il/fwt_gem"].value is not None
    masked = compute(classification(), unseen_masked=True)
    assert masked["class_il/fwt_gem"].value is None
    assert "masked" in str(masked["class_il/fwt_gem"].reason)
    assert masked["task_il/fwt_gem"].value is not None
    no_baseline = compute(classification(initial=False))
    assert "freshly initialised" in str(no_baseline["class_il/fwt_gem"].reason)
    no_label = compute(classification(task=False))
    assert "task label" in str(no_label["task_il/acc_macro"].reason)
    assert no_label["class_il/acc_macro"].value is not None


def test_a_joint_run_has_its_last_row_only():
    values = compute(classification(rows=[3]))
    assert values["class_il/acc_macro"].value is not None
    assert values["class_il/ece"].value is not None
    for name in ("bwt_gem", "avg_incremental_acc", "average", "forgetting_chaudhry"):
        assert values[f"class_il/{name}"].value is None
        assert "not evaluated: R[0,0]" in str(values[f"class_il/{name}"].reason)


def test_as_of_an_earlier_row_only_what_was_there_counts():
    record = classification(5)
    early = Record(record.kind, record.names[:2], record.classes[:2], record.targets[:2])
    for i in (-1, 0, 1):
        early.add_row(i, {j: record.rows[i].columns[j] for j in range(2)})
    assert compute(record, upto=1) == compute(early)


def test_bits_per_byte_and_its_signs():
    record = language(4)
    R = view(record, "bits_per_byte").R
    nll = record.rows[1].columns[2].nll.astype(np.float64).sum()
    assert R[1, 2] == pytest.approx(nll / math.log(2) / record.targets[2].sum())
    values = compute(record)
    assert value(values, "bits_per_byte/bpb_macro") == pytest.approx(R[2].mean())
    assert value(values, "bits_per_byte/bpb_micro") == pytest.approx(
        np.average(R[2], weights=view(record, "bits_per_byte").n)
    )
    worse = ((R[2, 0] - R[0, 0]) + (R[2, 1] - R[1, 1])) / 2  # more bits are worse
    assert value(values, "bits_per_byte/forgetting_first_minus_last") == pytest.approx(worse)
    assert value(values, "bits_per_byte/bwt_gem") == pytest.approx(-worse)
    best = np.minimum(R[0, :2], R[1, :2])
    assert value(values, "bits_per_byte/forgetting_chaudhry") == pytest.approx((R[2, :2] - best).mean())
    b = view(record, "bits_per_byte").b
    assert value(values, "bits_per_byte/fwt_gem") == pytest.approx(((b[1] - R[0, 1]) + (b[2] - R[1, 2])) / 2)
    assert values["bits_per_byte/rem"].value is None
    assert not any(name.startswith("bits_per_byte/acc") for name in values)


def test_the_stability_gap_of_bits_per_byte_is_the_most_bits():
    record = language(4)
    for i in (1, 2):
        t = record.targets
        record.add_row(i, {j: Column(nll=t[j] * 9.0, correct=t[j] * 0, tokens=t[j]) for j in range(3)}, step=10 * i)
    values = compute(record)
    assert value(values, "bits_per_byte/worst_bpb") == pytest.approx(9 / math.log(2))
    assert value(values, "next_byte_accuracy/min_acc") == 0


def test_evaluations_within_experiences_give_the_worst_case():
    record = classification(6, experiences=3)
    rng = np.random.default_rng(2)
    for index, step in ((1, 10), (1, 20), (2, 30)):
        record.add_row(index, {j: column(rng, record, j) for j in range(3)}, step)
    R, within = view(record, "class_il").R, view(record, "class_il").within
    worst_0 = min(R[1, 0], R[2, 0], *(scores[0] for _, _, scores in within))
    worst_1 = min(R[2, 1], within[2][2][1])
    values = compute(record)
    assert value(values, "class_il/min_acc") == pytest.approx((worst_0 + worst_1) / 2)
    assert value(values, "class_il/wc_acc") == pytest.approx(R[2, 2] / 3 + (worst_0 + worst_1) / 3)


def test_intransigence_with_a_joint_reference():
    record = classification()
    R = view(record, "class_il").R
    joint = np.array([0.9, 0.8, 0.7, 0.6])
    assert value(compute(record, joint={"class_il": joint}), "class_il/intransigence") == pytest.approx(
        (joint - np.diag(R)).mean()
    )


def test_calibration_by_hand():
    confidence = np.array([0.9, 0.9, 0.9, 0.9, 0.3, 0.3], dtype=np.float32)
    correct = np.array([True, True, True, False, False, True])
    assert m.ece(confidence, correct, bins=5) == pytest.approx(4 / 6 * 0.15 + 2 / 6 * 0.2, abs=1e-6)
    assert m.brier_top_label(confidence, correct) == pytest.approx((3 * 0.01 + 0.81 + 0.09 + 0.49) / 6, abs=1e-6)
    with pytest.raises(m.Undefined):
        m.ece(confidence[:0], correct[:0])


def test_abstentions_are_wrong_but_have_no_confidence():
    record = classification(0, experiences=1)
    t = record.targets[0]
    pred = np.where(np.arange(len(t)) < 4, -1, t)
    record.add_row(0, {0: Column(pred=pred, confidence=np.ones(len(t)))})
    values = compute(record)
    assert value(values, "class_il/acc_macro") == pytest.approx(9 / 13)
    assert value(values, "class_il/ece") == pytest.approx(0.0)
