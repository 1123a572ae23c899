"""Memory aware synapses against their formula in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cmoe.backbones.byte_lm import PADDING
from cmoe.session import Session
from cmoe.strategies import MAS

from .helpers import WORLDS, begin, opened
from .stepping import DOMAIN, EXACT, HEADS, enter, leave, take, the, walk

SPEC = {"name": "mas", "strength": 2.0, "samples": 6}
MODELS = {**HEADS, "vit": WORLDS["vit"], "text": WORLDS["text_encoder"]}


def sensitivity(of: Session, experience: int) -> dict[str, Tensor]:
    """Mean over six samples of |d ‖f‖²|, f the outputs of the head, of a multi-head those of the task."""
    model = of.model.eval()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    split = of.stream.experiences[experience].train
    head = model.head
    own = [u for u, (_, t) in enumerate(head.units) if head.kind != "multi" or t == experience]
    for place in torch.linspace(0, len(split) - 1, 6).round().long().tolist():
        at = split.index[place : place + 1]
        x = of.context.inputs(split.x[at], torch.tensor([experience]), None)
        if of.stream.language:
            real = x[0, 1:] != PADDING
            logits = model(x[:, :-1], of.context.route(experience)).logits[0][real]
            length = (logits**2).sum() / len(logits)
        else:
            length = (model(x, of.context.route(experience)).logits[0, own] ** 2).sum()
        made = torch.autograd.grad(length, list(named.values()), allow_unused=True)
        for name, g in zip(named, made, strict=True):
            if g is not None:
                total[name] += g.abs() / 6
    model.train()
    return total


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert sum(float(v.sum()) for v in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_importance_is_its_formula(tmp_path: Path, model: str) -> None:
    of = opened(tmp_path, EXACT, MODELS[model], {"strategy": SPEC})
    for segment in of.segments[:2]:
        begin(of, segment)
    expected = sensitivity(of, 1)
    the(of, MAS).after_experience(of.segments[1])
    close(the(of, MAS).importance, expected)


def test_of_a_language_it_is_the_mean_over_positions(tmp_path: Path) -> None:
    of = opened(tmp_path, EXACT, WORLDS["byte_lm"], DOMAIN, {"strategy": SPEC})
    begin(of, of.segments[0])
    expected = sensitivity(of, 0)
    the(of, MAS).after_experience(of.segments[0])
    close(the(of, MAS).importance, expected)


def test_importances_add_up_and_make_the_penalty(tmp_path: Path) -> None:
    of = opened(tmp_path, EXACT, DOMAIN, {"strategy": SPEC})
    mas, sums = the(of, MAS), []
    for e in range(2):
        enter(of, e)
        walk(of, e, range(3))
        sums.append(sensitivity(of, e))
        leave(of, e)
    close(mas.importance, {n: v + sums[1][n] for n, v in sums[0].items()})
    anchor = {n: p.detach().clone() for n, p in of.model.named_parameters()}
    enter(of, 2)
    walk(of, 2, range(2))
    batch = take(of, 2, 2)
    found = mas.losses(of.model(batch.x, of.context.route(2)), batch)["mas"]
    named = dict(of.model.named_parameters())
    expected = sum(2.0 * float((mas.importance[n] * (named[n].detach() - a) ** 2).sum()) for n, a in anchor.items())
    assert float(found.detach()) == pytest.approx(expected, rel=1e-9)
