"""Our figures equal Avalanche's own plugins, fed with the same predictions (this module alone imports avalanche)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cmoe.metrics import compute, view

from .helpers import classification


@pytest.fixture(scope="module")
def avalanche():
    from avalanche.evaluation.metrics import (
        StreamAccuracy,
        StreamBWT,
        StreamForgetting,
        StreamForwardTransfer,
    )

    return SimpleNamespace(
        forgetting=StreamForgetting,
        bwt=StreamBWT,
        fwt=StreamForwardTransfer,
        accuracy=StreamAccuracy,
    )


def replay(record, plugins, upto):
    """Drives the plugins as a strategy would: the untrained model, then train and evaluate, experience by experience."""
    outputs = sum(map(len, record.classes))
    for i in range(-1, upto + 1):
        if i >= 0:
            strategy = SimpleNamespace(experience=SimpleNamespace(current_experience=i), clock=None)
            for plugin in plugins:
                plugin.before_training_exp(strategy)
        for plugin in plugins:
            plugin.before_eval(SimpleNamespace())
        for j in range(upto + 1):
            pred = torch.from_numpy(record.rows[i].columns[j].pred).long()
            target = torch.from_numpy(record.targets[j]).long()
            exp = SimpleNamespace(current_experience=j)
            empty = SimpleNamespace(experience=exp)
            for plugin in plugins:
                plugin.before_eval_exp(empty)
            for rows in torch.arange(len(target)).split(4):  # batches of unequal size
                batch = SimpleNamespace(
                    experience=exp,
                    is_eval=True,
                    mb_output=torch.nn.functional.one_hot(pred[rows], outputs).float(),
                    mb_y=target[rows],
                    mb_task_id=torch.zeros(len(rows), dtype=torch.long),
                    clock=SimpleNamespace(train_iterations=0),
                )
                for plugin in plugins:
                    plugin.after_eval_iteration(batch)
            for plugin in plugins:
                if hasattr(plugin, "stream_forgetting") or hasattr(plugin, "stream_forward_transfer"):
                    plugin.after_eval_exp(empty)
        for plugin in plugins:
            plugin.at_init = False  # what after_eval does; the rest of it needs a real strategy


def scalar(result):
    return float(next(iter(result.values())) if isinstance(result, dict) else result)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("experiences", [2, 5])
def test_equal_to_avalanche(avalanche, seed, experiences):
    record = classification(seed, experiences=experiences, task=False)
    for upto in range(1, experiences):
        forgetting, bwt, fwt, accuracy = avalanche.forgetting(), avalanche.bwt(), avalanche.fwt(), avalanche.accuracy()
        replay(record, [forgetting, bwt, fwt, accuracy], upto)
        ours = {k.removeprefix("class_il/"): v.value for k, v in compute(record, upto=upto).items()}
        assert scalar(forgetting.result()) == pytest.approx(ours["forgetting_first_minus_last"], abs=1e-6)
        assert scalar(bwt.result()) == pytest.approx(ours["bwt_gem"], abs=1e-6)
        assert scalar(fwt.result()) == pytest.approx(ours["fwt_gem"], abs=1e-6)
        assert scalar(accuracy.result()) == pytest.approx(ours["acc_micro"], abs=1e-6)


def test_standalone_metrics_agree_cell_by_cell(avalanche):
    from avalanche.evaluation.metrics.forgetting_bwt import BWT, Forgetting
    from avalanche.evaluation.metrics.forward_transfer import ForwardTransfer

    v = view(classification(9), "class_il")
    forgetting, bwt, fwt = Forgetting(), BWT(), ForwardTransfer()
    for j in range(4):
        fwt.update(j, v.b[j], initial=True)
        for metric in (forgetting, bwt):
            metric.update(j, v.R[j, j], initial=True)
            metric.update(j, v.R[3, j])
        if j:
            fwt.update(j, v.R[j - 1, j])
    for j in range(3):
        assert forgetting.result()[j] == pytest.approx(v.R[j, j] - v.R[3, j], abs=1e-6)
        assert bwt.result()[j] == pytest.approx(v.R[3, j] - v.R[j, j], abs=1e-6)
        assert fwt.result()[j + 1] == pytest.approx(v.R[j, j + 1] - v.b[j + 1], abs=1e-6)
