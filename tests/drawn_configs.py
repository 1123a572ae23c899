"""Random configurations, drawn from the catalogue: whatever is registered, with the options that it declares.

A value comes from the option's declared type and range, so that a new component or option is drawn without a word here.
`HINTS` holds what a type cannot say: files that are there, and sizes that keep a run under a second. What components
declare about themselves (modalities, needs, scenarios) is followed most of the time and ignored now and then, so that
both kinds of configuration come up: those that must run, and those that must be refused.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cmoe.config.check import section_options
from cmoe.config.rules import LABELLED
from cmoe.config.sections import SECTIONS
from cmoe.config.types import Range
from cmoe.plugins import REQUIRED, Catalogue, Option
from cmoe.plugins.types import Choice, Flag, ListOf, MapOf, Nested, Nothing, Number, OneComponent, Text, TupleOf, Type
from cmoe.plugins.types import Union as OneOf

SHARE = 0.2  # of the options that are not left at their defaults
HEED = 0.85  # of the times that what components declare is followed
SMALL = 8  # largest integer drawn where nothing says more
LEAVE = object()  # a hint: the default

Hints = dict[str, Sequence[Any]]

# by full key; `*` stands for any name. A hint is drawn from always, but where LEAVE is among its values
HINTS: Hints = {
    "task.arrays.path": ["vectors.npz", "grey.npz", "colour.npz", "tasks.npz"],
    "task.image_folder.path": ["pictures"],
    "task.image_folder.size": [8, 16],
    "task.text_domains.domains": [{"a": "a.txt", "b": "b.txt"}, {"a": "a.txt", "b": "b.txt", "c": "c.txt"}],
    "task.text_domains.bytes_per_domain": [1000],
    "task.*.length": [6, 12],
    "task.*.limit": [LEAVE, 2, 2, 2, 2, 3],
    "task.*.experiences": [LEAVE, 2, 2, 2, 3],
    "task.arrays.experiences": [LEAVE, 2, 3, 3],
    "task.clinc150.vocabulary": [64],
    "task.permuted_mnist.experiences": [2, 3],
    "task.rotated_mnist.experiences": [2, 3],
    "task.*.validation": [LEAVE, LEAVE, 0.0, 0.3],
    "task.*.test": [LEAVE, LEAVE, 0.3],
    "backbone.*.pretrained": [False],
    "backbone.*.model": [LEAVE],
    "backbone.mlp.hidden": [[8], [8, 6]],
    "backbone.vit.patch": [LEAVE, 4],
    "backbone.*.depth": [1, 1, 2],
    "backbone.*.dim": [8, 12],
    "backbone.*.heads": [1, 2],
    "backbone.*.hidden": [LEAVE, 12],
    "backbone.convnet.depths": [[1, 1, 1, 1]],
    "backbone.convnet.dims": [[4, 4, 6, 8]],
    "optimizer.*.eps": [LEAVE],
    "strategy.avalanche.strategy": ["Naive", "Replay", "EWC", "LwF", "SynapticIntelligence"],
    "strategy.avalanche.options": [LEAVE],
    "router.*.z": [0.0, 0.001, 0.01],  # it is of squares of scores: a large weight diverges as a large rate does
    "model.moe.experts": [1, 2, 3, 4],
    "model.moe.hidden": [LEAVE, 4, 8],
    "model.moe.layers": [LEAVE, LEAVE, "last", "alternate", [0], [-1]],
    "trainer.epochs": [1, 1, 1, 2],
    "trainer.batch_size": [4, 8],
    "trainer.max_steps": [2, 2, 3],
    "trainer.chunk": [1, 2],
    "trainer.threads": [1],
    "trainer.devices": [1],
    "trainer.accelerator": ["cpu"],
    "trainer.log_every": [1, 1, 2],
    "evaluation.batch_size": [32, 64],
    "evaluation.every": [LEAVE, 1, 2],
    "evaluation.diagnostics_samples": [8],
    "checkpoint.every_seconds": [LEAVE, LEAVE, LEAVE, 0.01],
    "checkpoint.keep": [1, 2],
}
PATCH = {
    "split_cifar100": 4,
    "split_mnist": 3,
    "permuted_mnist": 3,
    "rotated_mnist": 3,
    "split_fashion_mnist": 3,
}  # else 1
NATIVE = {"EWC": {"ewc_lambda": 0.4}, "LwF": {"alpha": 1.0, "temperature": 2.0}, "SynapticIntelligence": {"si_lambda": 0.1},
          "Replay": {"mem_size": 20}}  # fmt: skip


class Undrawable(Exception):
    """A required option has a type that says nothing about its values, and there is no hint."""


class Drawer:
    """Draws the configurations of a campaign; the same seed and index give the same one.

    Args:
        catalogue: what can be drawn.
        seed: of the campaign.
        only: names of the components that may be drawn, by kind; kinds that are not there are free.
    """

    def __init__(self, catalogue: Catalogue, seed: int, only: Mapping[str, Collection[str]] | None = None) -> None:
        self.catalogue, self.seed, self.only = catalogue, seed, dict(only or {})
        order = random.Random(f"{seed}")
        # every router comes up as often
        self.routers = order.sample(self.names("router"), len(self.names("router")))
        self.rng = random.Random(0)
        self._said: dict[tuple[str, str, str], Any] = {}

    def names(self, kind: str) -> list[str]:
        """The names of a kind that may be drawn."""
        return [n for n in self.catalogue.entries(kind) if n in self.only.get(kind, (n,))]

    def config(self, index: int) -> dict[str, Any]:
        """The configuration of an index, in plain containers."""
        self.rng = random.Random(f"{self.seed}:{index}")
        moe = self._moe(index) if self.rng.random() < 0.9 else None
        strategies = self._strategies(moe is not None)
        needs = self._needs("router", moe["router"]) if moe else set()
        labels = bool({"task", "task_label"} & needs.union(*(self._needs("strategy", s) for s in strategies)))
        model = self._model(moe, needs)
        stream = self._stream(model["name"], labels, strategies)
        config: dict[str, Any] = {
            "seed": self.rng.randrange(3),
            "stream": stream,
            "model": model,
            "strategy": strategies,
            "optimizer": self._optimizer(),
            "scheduler": self.component("scheduler", self.rng.choice(self.names("scheduler"))),
            "trainer": self.section("trainer"),
            "checkpoint": self.section("checkpoint"),
            "evaluation": self.section("evaluation"),
            "experiment": "fuzz",
            "tracking": {"enabled": False},
        }
        if model["name"] == "convnet" and self._heed():
            model["patch"] = PATCH.get(stream["name"], 1)
        if stream.get("scenario") == "online" and self._heed():
            config["trainer"]["epochs"] = 1
        if any(self._says("strategy", s["name"], "owns_loop") for s in strategies) and self._heed():
            self._plain(config)
        return config

    # -- components ---------------------------------------------------------------------------------------------

    def component(self, kind: str, name: str) -> dict[str, Any]:
        """A component with some of its options."""
        entry = self.catalogue.find(kind, name)
        return {"name": name, **self.options(entry.options(), f"{kind}.{name}")}

    def section(self, name: str) -> dict[str, Any]:
        """Some of the options of a fixed section."""
        return self.options(section_options(SECTIONS[name]), name)

    def options(self, options: Mapping[str, Option], key: str) -> dict[str, Any]:
        """Some of these options: those that must be, those with a hint, and a share of the rest."""
        drawn = {}
        for name, option in options.items():
            value = self._option(option, f"{key}.{name}")
            if value is not LEAVE:
                drawn[name] = value
        return drawn

    def _option(self, option: Option, key: str) -> Any:
        first, *middle, last = key.split(".")
        for known in (key, f"{first}.*.{last}" if middle else key):
            if known in HINTS:
                return self.rng.choice(HINTS[known])
        if option.default is not REQUIRED and self.rng.random() > SHARE:
            return LEAVE
        value = self.value(option.type, option.default, key)
        if value is LEAVE and option.default is REQUIRED:
            raise Undrawable(key)
        return value

    def value(self, kind: Type, default: Any, key: str) -> Any:
        """A value of a type; LEAVE where the type does not say what could be meant (texts, mappings, anything)."""
        rng = self.rng
        match kind:
            case Flag():
                return rng.random() < 0.5
            case Choice(values):
                return rng.choice(values)
            case Nothing():
                return None
            case Number(integral=True, range=bounds):
                return self._integer(bounds, default)
            case Number(range=bounds):
                return self._real(bounds, default)
            case Nested(_, options):
                return self.options(options, key)
            case OneComponent(name):
                return self.component(name, rng.choice(self.names(name)))
            case OneOf(members):
                usable = [m for m in members if type(m) not in (Text, Type, MapOf)]
                return self.value(rng.choice(usable), default, key) if usable else LEAVE
            case TupleOf(items):
                found = [self.value(t, default, key) for t in items]
                return LEAVE if LEAVE in found else found
            case ListOf(item):
                found = [self.value(item, REQUIRED, key) for _ in range(rng.randrange(1, 3))]
                return LEAVE if LEAVE in found else found
        return LEAVE

    def _integer(self, bounds: Range, default: Any) -> int:
        """The smallest ones mostly: that is where the corners are, and what keeps models small."""
        low = (
            -1
            if bounds.ge is None and bounds.gt is None
            else math.ceil(bounds.ge if bounds.ge is not None else bounds.gt or 0)
        )
        choices = {low, low + 1, low + 2, 3, 4, SMALL}
        if isinstance(default, int) and default <= SMALL:
            choices.add(default)
        return self.rng.choice(sorted(c for c in choices if c in bounds))

    def _real(self, bounds: Range, default: Any) -> float:
        """Between the bounds and on them, or about the default."""
        rng = self.rng
        low, high = (a if a is not None else b for a, b in ((bounds.ge, bounds.gt), (bounds.le, bounds.lt)))
        if low is not None and high is not None:
            choices = [low, high, rng.uniform(low, high), rng.uniform(low, high)]
        else:
            size = abs(default) if isinstance(default, int | float) and default else 0.3
            choices = [size * 10 ** rng.uniform(-1.0, 0.3) for _ in range(3)]
            choices += [low] if low is not None else [0.0, -size]
        return round(rng.choice([c for c in choices if c in bounds]), 6)

    # -- parts that must fit together ---------------------------------------------------------------------------

    def _heed(self) -> bool:
        return self.rng.random() < HEED

    def _says(self, kind: str, name: str, what: str, default: Any = None) -> Any:
        """What a component declares about itself."""
        key = (kind, name, what)
        if key not in self._said:
            self._said[key] = self.catalogue.find(kind, name).attribute(what)
        found = self._said[key]
        return default if found is None else found

    def _needs(self, kind: str, spec: Mapping[str, Any]) -> set[str]:
        found = set(self._says(kind, spec["name"], "needs", ()))
        options = self.catalogue.find(kind, spec["name"]).options()
        for option, by_value in self._says(kind, spec["name"], "needs_with", {}).items():
            value = spec.get(option, options[option].default if option in options else None)
            found |= set(by_value.get(value, ()))
        return found

    def _moe(self, index: int) -> dict[str, Any]:
        options = dict(section_options(SECTIONS["model"])["moe"].type.members[0].options)  # ty: ignore[unresolved-attribute]
        del options["router"], options["expert"]
        moe = self.options(options, "model.moe")
        moe["router"] = self.component("router", self.routers[index % len(self.routers)])
        if self.rng.random() < 0.7:
            moe["expert"] = self.component("expert", self.rng.choice(self.names("expert")))
        return moe

    def _strategies(self, experts: bool) -> list[dict[str, Any]]:
        names = [n for n in self.names("strategy") if experts or n != "expand" or not self._heed()]
        count = min(len(names), self.rng.choices((1, 2, 3), (5, 4, 1))[0])
        alone = [n for n in names if self._says("strategy", n, "owns_loop")]
        chosen = self.rng.sample(names, count)
        if count > 1 and self._heed():  # beside others it is refused, and there is little more to learn from that
            chosen = [n for n in chosen if n not in alone] or chosen[:1]
        return [self.component("strategy", n) for n in chosen]

    def _model(self, moe: dict[str, Any] | None, needs: set[str]) -> dict[str, Any]:
        names = self.names("backbone")
        tokens = needs - {"task", "task_label"}
        causal = moe is None or self._says("router", moe["router"]["name"], "causal", False)
        fitting = [
            n
            for n in names
            if tokens <= set(self._says("backbone", n, "gives", ()))
            and (causal or not self._says("backbone", n, "causal"))
        ]
        name = self.rng.choice(fitting if fitting and self._heed() else names)
        unit = self._says("backbone", name, "unit", 0)
        for spec in [moe, *moe.get("more", [])] if moe else []:
            other = spec.get("expert") and self._says("expert", spec["expert"]["name"], "inner", 0) not in (0, unit)
            if other and self._heed():
                del spec["expert"]
        options = {k: o for k, o in section_options(SECTIONS["model"]).items() if k not in ("name", "moe")}
        model = {**self.component("backbone", name), **self.options(options, "model")}
        if moe is not None:
            model["moe"] = moe
        return model

    def _stream(self, backbone: str, labels: bool, strategies: list[dict[str, Any]]) -> dict[str, Any]:
        takes = self._says("backbone", backbone, "modalities", ())
        names = self.names("task")
        fitting = [n for n in names if self._says("task", n, "modality") in takes]
        name = self.rng.choice(fitting if fitting and self._heed() else names)
        stream = self.component("task", name)
        stream.pop("class_order", None)
        if self.rng.random() < SHARE:
            stream["class_order"] = "shuffled"
        scenarios = list(self._says("task", name, "scenarios", ()))
        if labels and self._heed():
            scenarios = [s for s in scenarios if s in LABELLED]
        elif any(self._says("strategy", s["name"], "needs_boundaries") for s in strategies) and self._heed():
            scenarios = [s for s in scenarios if s != "online"]
        if scenarios:
            stream["scenario"] = self.rng.choice(scenarios)
            if stream["scenario"] == "joint" and self._heed() and self._heed():
                stream["scenario"] = self.rng.choice(scenarios)  # one experience says less
        if "then" in stream:
            # the same task again fits, as its classes are new ones; of another kind of samples it must be refused
            again = stream if self._heed() else self.component("task", self.rng.choice(names))
            stream["then"] = [{k: v for k, v in again.items() if k not in ("then", "scenario", "limit")}]
            stream.pop("limit", None)
        return stream

    def _optimizer(self) -> dict[str, Any]:
        own = self.component("optimizer", self.rng.choice(self.names("optimizer")))
        shared = {k: o for k, o in section_options(SECTIONS["optimizer"]).items() if k != "name"}
        return {**own, **self.options(shared, "optimizer")}

    def _plain(self, config: dict[str, Any]) -> None:
        """What a strategy with a loop of its own knows."""
        config["scheduler"] = {"name": "constant"}
        for option in ("max_steps", "clip_norm", "clip_value", "precision"):
            config["trainer"].pop(option, None)
        config["trainer"]["batch_size"] = 64
        for strategy in config["strategy"]:
            if strategy.get("strategy") in NATIVE:
                strategy["options"] = dict(NATIVE[strategy["strategy"]])
