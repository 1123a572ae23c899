"""Offline EWC against its formulas in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.session import Session
from cmoe.strategies import EWC

from .helpers import BY_TASK, LEARNED, WORLDS, begin, merged, opened
from .stepping import DOMAIN, EXACT, HEADS, enter, leave, take, the, walk

MODELS: dict[str, dict[str, Any]] = {
    **HEADS,
    "current": {"model": {"train_outputs": "current"}},
    "vit": WORLDS["vit"],
    "experts": {"model": {"moe": LEARNED}},
    "experts by task": {"stream": {"scenario": "task"}, "model": {"moe": merged(BY_TASK, {"experts": 2})}},
    "text": WORLDS["text_encoder"],
}


def formula(of: Session, experience: int, kind: str, samples: int) -> dict[str, Tensor]:
    """Mean over evenly spread samples of (d log p(y|x))² at the label, or of Σ p(c|x) (d log p(c|x))²."""
    model = of.model.eval()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    split = of.stream.experiences[experience].train
    assert split.y is not None
    head, task = model.head, torch.tensor([experience])
    mine = of.stream.experiences[experience].classes
    own = [
        u
        for u, (c, t) in enumerate(head.units)
        if (t == experience if head.kind == "multi" else of.plan.model["train_outputs"] == "all" or c in mine)
    ]
    for place in torch.linspace(0, len(split) - 1, samples).round().long().tolist():
        at = split.index[place : place + 1]
        x = of.context.inputs(split.x[at], task, None)
        log_p = model(x, of.context.route(experience)).logits[0, own].log_softmax(0)
        label = [head.units[u][0] for u in own].index(int(split.y[at]))
        for c in range(len(own)) if kind == "exact" else [label]:
            weight = float(log_p[c].detach().exp()) if kind == "exact" else 1.0
            made = torch.autograd.grad(log_p[c], list(named.values()), retain_graph=True, allow_unused=True)
            for name, g in zip(named, made, strict=True):
                if g is not None:
                    total[name] += weight * g**2 / samples
    model.train()
    return total


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_fisher_is_its_formula(tmp_path: Path, model: str, kind: str) -> None:
    of = opened(tmp_path, EXACT, MODELS[model], {"strategy": {"name": "ewc", "fisher": kind, "samples": 7}})
    for segment in of.segments[:2]:
        begin(of, segment)
    ewc = the(of, EWC)
    expected = formula(of, 1, kind, 7)
    ewc.after_experience(of.segments[1])
    ((halves, anchor),) = ewc.past
    assert halves.keys() == anchor.keys() == expected.keys()
    assert sum(float(v.sum()) for v in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(2 * halves[name], value, rtol=1e-6, atol=1e-12)
    assert of.model.training


def test_each_experience_has_a_term_of_its_own(tmp_path: Path) -> None:
    of = opened(tmp_path, EXACT, DOMAIN, {"strategy": {"name": "ewc", "strength": 2.5, "samples": 5}})
    ewc, terms = the(of, EWC), []
    for e in range(2):
        enter(of, e)
        walk(of, e, range(3))
        terms.append((formula(of, e, "exact", 5), {n: p.detach().clone() for n, p in of.model.named_parameters()}))
        leave(of, e)
    enter(of, 2)
    walk(of, 2, range(2))
    batch = take(of, 2, 2)
    found = ewc.losses(of.model(batch.x, of.context.route(2)), batch)["offline_ewc"]
    expected = sum(
        2.5 / 2 * float((f[n] * (p.detach() - a[n]) ** 2).sum())
        for f, a in terms
        for n, p in of.model.named_parameters()
    )
    assert expected > 0
    assert float(found.detach()) == pytest.approx(expected, rel=1e-9)
    held = sum(t.numel() * 8 for f, a in terms for t in (*f.values(), *a.values()))
    assert ewc.facts() == {"ewc/bytes": held}


def test_terms_drop_weights_that_are_gone_and_spare_those_that_froze(tmp_path: Path) -> None:
    of = opened(tmp_path, EXACT, HEADS["growing"], {"strategy": {"name": "ewc", "samples": 3}})
    enter(of, 0)
    walk(of, 0, range(2))
    leave(of, 0)
    enter(of, 1)
    ewc = the(of, EWC)
    of.model.head.blocks.get_submodule("0").requires_grad_(False)
    ewc.past.append(({"gone": torch.ones(2)}, {"gone": torch.ones(2)}))
    held = [p for p, _, _ in ewc.held()]
    assert held
    assert all(p.requires_grad for p in held)
    ewc.after_experience(of.segments[1])
    first, gone, second = ewc.past
    assert gone == ({}, {})
    assert "head.blocks.0.weight" in first[0]
    assert "head.blocks.0.weight" not in second[0]
    assert "head.blocks.1.weight" in second[0]
    assert "head.blocks.1.weight" not in first[0]


def test_language_has_no_exact_fisher(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"strategy\.ewc\.fisher: expected 'empirical' .*, got 'exact'"):
        opened(tmp_path, WORLDS["byte_lm"], DOMAIN, {"strategy": "ewc"})
