"""Several plans from one file: variants that are compared with each other, and grids over keys.

A study is a configuration with a section `variants`, a mapping from a label to what that variant changes; `seeds`
(a number, or a list) says how often each is repeated by `cmoe reproduce`, and `published` holds the figures that it is
held against. `grid`, of the file or of a variant, maps keys to lists of values that `cmoe sweep` combines.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cmoe.config.load import compose, resolve
from cmoe.config.plan import Plan
from cmoe.config.tree import Tree, parse_override
from cmoe.config.where import COMMAND_LINE, ConfigError, Where, show
from cmoe.errors import nearest
from cmoe.plugins import Catalogue

SECTIONS = ("variants", "seeds", "published", "grid")


@dataclass
class Study:
    """What a file describes.

    Attributes:
        plans: one for each variant (or the one that the file is), in order.
        seeds: what `cmoe reproduce` repeats each variant with.
        published: the section of that name.
        grids: values by key that a sweep combines, for each variant's label; '' is for plans that are no variant.
    """

    plans: list[Plan]
    seeds: list[int] = field(default_factory=lambda: [0])
    published: dict[str, Any] = field(default_factory=dict)
    grids: dict[str, dict[str, list[Any]]] = field(default_factory=dict)


def read_study(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    catalogue: Catalogue | None = None,
    only: Sequence[str] = (),
) -> Study:
    """The plans that a configuration describes.

    Args:
        config: as for `cmoe.config.load.read`.
        overrides: `key=value`, for every variant; with `strategy=…` the variants step aside and the base runs.
        catalogue: what can be named.
        only: labels of the variants wanted; none is all.

    Raises:
        ConfigError: anything is wrong, as for `read`.
    """
    catalogue = catalogue or Catalogue()
    tree = compose(config)
    taken = {name: _take(tree, name) for name in SECTIONS}
    variants, where = taken["variants"]
    if variants is not None and any(parse_override(o)[0] in (["strategy"], ["label"]) for o in overrides):
        variants = None
    if only:
        unknown = [n for n in only if n not in (variants or {})]
        if unknown:
            names = ", ".join(map(str, variants or {})) or "the file has none"
            raise ConfigError(
                f"--only: expected a variant ({names}), got '{unknown[0]}'{nearest(unknown[0], variants or {})}"
            )
    study = Study([], _seeds(*taken["seeds"]), _published(*taken["published"]))
    study.grids[""] = _grid(*taken["grid"])
    if variants is None:
        study.plans = [resolve(tree, overrides, catalogue)]
        return study
    if not isinstance(variants, dict) or not variants:
        raise where.expected("a mapping from labels to what each variant changes", show(variants))
    for label, change in variants.items():
        if only and label not in only:
            continue
        own = copy.deepcopy(tree)
        if not isinstance(change, dict):
            raise Where(where.source, f"variants.{label}").expected("a mapping of keys to change", show(change))
        change = dict(change)
        values = _grid(change.pop("grid", None), Where(where.source, f"variants.{label}.grid"))
        study.grids[str(label)] = {**study.grids[""], **values}
        own.merge({"label": str(label), **change}, f"{where.source}: variants.{label}")
        study.plans.append(resolve(own, overrides, catalogue))
    return study


def _take(tree: Tree, name: str) -> tuple[Any, Where]:
    """A study's own section, out of the tree, with its place."""
    where = tree.where((name,))
    value = tree.value.pop(name, None)
    tree.sources = {p: s for p, s in tree.sources.items() if p[0] != name}
    return value, where


def _seeds(value: Any, where: Where) -> list[int]:
    if value is None:
        return [0]
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return list(range(value))
    if isinstance(value, list) and value and all(isinstance(s, int) and s >= 0 for s in value):
        return list(value)
    raise where.expected("how many seeds, or a list of them", show(value))


def _published(value: Any, where: Where) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not isinstance(value.get("rows"), dict):
        raise where.expected("a mapping with `rows`, from labels to published figures", show(value))
    return value


def _grid(value: Any, where: Where) -> dict[str, list[Any]]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, list) and v for v in value.values()):
        raise where.expected("a mapping from keys like optimizer.lr to lists of values", show(value))
    return {str(key): list(values) for key, values in value.items()}


def grid(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of `key=a,b` and `key=0..4` (both ends included); other overrides stay as they are.

    A value in brackets or braces is one value: `strategy=[expand,replay]`.

    Raises:
        ConfigError: a range that has no values.
    """
    choices = []
    for override in overrides:
        keys, value = parse_override(override)
        key = ".".join(keys)
        found = re.fullmatch(r"(\d+)\.\.(\d+)", value.strip())
        if found:
            first, last = int(found[1]), int(found[2])
            if last < first:
                raise ConfigError(f"{COMMAND_LINE}: {key}: expected a range like 0..4, got {value}")
            choices.append([f"{key}={n}" for n in range(first, last + 1)])
        else:
            choices.append([f"{key}={part}" for part in split(value)])
    return [list(c) for c in itertools.product(*choices)]


def split(value: str) -> list[str]:
    """The parts of `a,b` at commas outside of brackets, braces and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in value:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in "]})":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [p.strip() for p in parts]


def label_grid(overrides: Sequence[str], combination: Sequence[str]) -> str:
    """What sets a combination of a grid apart, without the seed: `strategy.0.size=200`; empty when nothing does."""
    varied = [c for o, c in zip(overrides, combination, strict=True) if o != c and not c.startswith("seed=")]
    return ", ".join(v for v in varied if not v.startswith("strategy="))
