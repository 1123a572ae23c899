"""Hyper-parameters chosen on the validation split, with the same budget for every method; the test set is read once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cmoe.config.plan import Plan
from cmoe.config.study import grid, label_grid, read_study
from cmoe.config.tree import parse_override
from cmoe.errors import UserError, nearest
from cmoe.metrics.catalogue import lower_is_better, metric_names
from cmoe.plugins import Catalogue

SPLITS = {"val": "validation", "validation": "validation"}


@dataclass
class Setting:
    """One combination of values of one method.

    Attributes:
        method: the label of the variant, or of the strategies.
        values: what sets it apart from the method's others, as `key=value`; the seed is none of it.
        variant: the variant's label, '' where it is none.
        again: the overrides that make it again, without a seed.
        plans: one for each seed.
    """

    method: str
    values: tuple[str, ...]
    variant: str
    again: tuple[str, ...]
    plans: list[Plan] = field(default_factory=list)

    @property
    def label(self) -> str:
        """For tables: the method, and what sets the setting apart."""
        return " ".join((self.method, ", ".join(self.values))).strip()


@dataclass
class Choice:
    """What was chosen for a method.

    Attributes:
        setting: the best one.
        mean: the metric's mean over seeds on the validation split.
        tried: how many settings there were.
    """

    setting: Setting
    mean: float
    tried: int


def settings(
    config: str, overrides: Sequence[str], catalogue: Catalogue, only: Sequence[str] = (), more: Sequence[str] = ()
) -> list[Setting]:
    """Every setting that a configuration's `grid` sections and the command line combine to, with a plan for each seed.

    Args:
        config: as for `read_study`.
        overrides: `key=a,b`, as on the command line of a sweep; a key given here is none of the file's grid.
        catalogue: what can be named.
        only: labels of the variants wanted; none is all.
        more: `key=value` for all of them.

    Raises:
        ConfigError: anything is wrong.
    """
    given = {".".join(parse_override(o)[0]) for o in overrides}
    found: dict[tuple[str, tuple[str, ...]], Setting] = {}
    for combination in grid(overrides):
        study = read_study(config, [*combination, *more], catalogue, only)
        typed = label_grid(overrides, combination)
        again = tuple(c for c in combination if not c.startswith("seed="))
        for plan in study.plans:
            variant = plan.label if plan.label in study.grids else ""
            values = {k: v for k, v in study.grids[variant].items() if k not in given}
            for chosen in itertools.product(*([f"{k}={json.dumps(v)}" for v in vs] for k, vs in values.items())):
                own = plan
                if chosen:
                    picked = [variant] if variant else only
                    (own,) = read_study(config, [*chosen, *combination, *more], catalogue, picked).plans
                apart = (*chosen, *([typed] if typed else []))
                key = own.label, apart
                setting = found.setdefault(key, Setting(own.label, apart, variant, (*chosen, *again)))
                if own.hash not in {p.hash for p in setting.plans}:
                    setting.plans.append(own)
    return list(found.values())


def wanted(select: str) -> str:
    """The metric that `val:METRIC` names.

    Raises:
        UserError: it is not of this form, or there is no such metric.
    """
    split, _, metric = select.partition(":")
    if split not in SPLITS or not metric:
        raise UserError(f"--select: expected val:METRIC (the test set chooses nothing), got '{select}'")
    if metric not in metric_names():
        raise UserError(f"--select: expected a metric like class_il/acc_macro, got '{metric}'{nearest(metric, metric_names())}")  # fmt: skip
    return metric


def equal_budget(found: Sequence[Setting]) -> int:
    """How many settings each method has.

    Raises:
        UserError: not all have as many, or not all as many seeds, or there is nothing to choose.
    """
    tried: dict[str, int] = {}
    for setting in found:
        tried[setting.method] = tried.get(setting.method, 0) + 1
    if len(set(tried.values())) > 1:
        counts = ", ".join(f"'{method}' {n}" for method, n in tried.items())
        raise UserError(f"--select: expected as many settings for every method, got {counts}; see `grid` in the file")
    if max(tried.values()) < 2:
        raise UserError("--select: expected at least two settings of a method to choose from, got one; see `grid`")
    if len({len(s.plans) for s in found}) > 1:
        raise UserError("--select: expected as many seeds for every setting")
    return max(tried.values())


def choose(found: Sequence[Setting], metric: str, value: Callable[[Plan], float | None]) -> list[Choice]:
    """The best setting of every method by the mean over its seeds; of equals the first.

    Args:
        found: settings whose runs are finished.
        metric: its name; some are better when they are lower.
        value: the metric's value of a plan's run.

    Raises:
        UserError: a run has no such value.
    """
    sign = -1.0 if lower_is_better(metric) else 1.0
    best: dict[str, Choice] = {}
    for setting in found:
        values = [value(plan) for plan in setting.plans]
        if None in values:
            raise UserError(f"--select: expected a value of {metric} for every run, got none for '{setting.label}'")
        mean = sum(v for v in values if v is not None) / len(values)
        known = best.get(setting.method)
        if known is None:
            best[setting.method] = Choice(setting, mean, 1)
        else:
            known.tried += 1
            if sign * mean > sign * known.mean:
                known.setting, known.mean = setting, mean
    return list(best.values())


def fresh_seeds(found: Sequence[Setting]) -> list[int]:
    """As many seeds as were used, none of them."""
    used = {plan.seed for setting in found for plan in setting.plans}
    return list(range(max(used) + 1, max(used) + 1 + len(used)))


def confirmed(config: str, choices: Sequence[Choice], seeds: Sequence[int], catalogue: Catalogue) -> list[Plan]:
    """The chosen settings with these seeds, on the test split; labels are the methods'."""
    plans = []
    for choice in choices:
        only = [choice.setting.variant] if choice.setting.variant else []
        for seed in seeds:
            overrides = [*choice.setting.again, f"seed={seed}", "evaluation.split=test"]
            plans += read_study(config, overrides, catalogue, only).plans
    return plans
