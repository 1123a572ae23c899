"""Which router for what: every router on a vision stream and a language stream, at equal active parameters.

    python benchmarks/routers.py [--data DIR] [--streams vision language] [--only NAME ...] [--seeds N] [--json]
                                 [--out DIR] [--docs DIR] [--steps N] [--tune RATE ...]

The list of routers is the registry's own; the ones that a stream cannot serve are named with the reason that the
configuration's rules give. Two networks without a choice stand beside them: `ffn_active`, one feed-forward network of as
many parameters as are active for a token, and `ffn_total`, one of as many as all experts have together.

All train in this one process, one run after the other, with the same strategy, steps, batches and learning rate. What
differs is the router and the size of its experts: a token is to meet as many parameters of a layer (router included) with
each of them as with top-2 of eight experts. How many experts a token meets is counted while training, in a pilot run of
another seed where the router does not fix it. The time is the processor's of a whole training step of the trained model,
in turns with a top-k model's, so that only the ratio is to be looked at.

Each finished run leaves a file under `--out` and is not trained again: a call that was stopped goes on where it was.
With `--docs` the tables in `routers.md` and its picture are replaced.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import itertools
import json
import logging
import os
import re
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import measure
import numpy as np
import torch

import cmoe.session
from cmoe.api import new_run
from cmoe.assembly import make_stream
from cmoe.config.plan import Plan
from cmoe.config.study import read_study
from cmoe.errors import RunFailed, UserError, one_line
from cmoe.learners.batch import Batch
from cmoe.metrics.catalogue import compute
from cmoe.metrics.statistics import paired_difference, summarise
from cmoe.moe import ROUTERS, MoELayer, diagnostics
from cmoe.plugins import Catalogue
from cmoe.runner import train
from cmoe.session import Session
from cmoe.streams import Stream
from cmoe.streams.data import DataFolder, data_folder
from cmoe.tracking.diagnostics import values as tracked

EXPERTS, K = 8, 2
PILOT = 100  # the seed of pilot runs, and of the choice of the learning rate; no result has it
CONTROLS = ("ffn_active", "ffn_total")
REFERENCE = "topk"
CLOSE = 0.05  # how far active parameters may be from the reference's

# Options that say what a router is. Without an entry a router with an option `k` gets K, any other its own number.
OWN: dict[str, dict[str, Any]] = {
    "switch": {"k": 1},  # one expert is the method
    "hierarchical": {"groups": 2},  # both of a token's experts from one group of four
    "null_experts": {"k": 3, "null": 4},  # three of twelve, of which two are true ones when all are as frequent
    "product_keys": {"k": 16, "heads": 2, "rank": 8},  # of very many small experts, see MANY
}
MANY = {"product_keys": 128}  # experts, as large together as the others' eight


@dataclass(frozen=True)
class Setting:
    """A stream with the network and training that all routers get on it.

    Attributes:
        title: for people.
        config: as for `cmoe run`, without experts.
        score: the view that says how good a run is.
        dim: width of the tokens.
    """

    title: str
    config: Mapping[str, Any]
    score: str
    dim: int


COMMON: dict[str, Any] = {
    "strategy": {"name": "replay", "size": 200},
    "evaluation": {"initial": False, "rows": "seen"},
}
SETTINGS = {
    "vision": Setting(
        "Split digits, class-incremental",
        {
            **COMMON,
            "stream": {"name": "split_digits", "scenario": "class"},
            "model": {"name": "vit", "patch": 4, "depth": 1, "dim": 32, "heads": 2},
            "optimizer": {"name": "adam", "lr": 0.003},
            "trainer": {"epochs": 50, "max_steps": 30, "batch_size": 16, "log_every": 0},
        },
        "class_il",
        32,
    ),
    "language": Setting(
        "CLINC150, three domains, task-incremental",
        {
            **COMMON,
            "stream": {"name": "clinc150", "scenario": "task", "vocabulary": 2048, "limit": 3},
            "model": {"name": "text_encoder", "depth": 1, "dim": 32, "heads": 2, "hidden": 128, "dropout": 0.0},
            "optimizer": {"name": "adam", "lr": 0.01},
            "trainer": {"epochs": 50, "max_steps": 30, "batch_size": 16, "log_every": 0},
        },
        "task_il",
        32,
    ),
}


# -- equal active parameters ----------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """What stands where the feed-forward networks are.

    Attributes:
        name: of the router, or a control's.
        moe: the section `model.moe`; None for a dense network.
        exact: whether the number of experts per token is known without counting.
    """

    name: str
    moe: dict[str, Any] | None
    exact: bool = True


def reference_layer(dim: int) -> MoELayer:
    """The layer whose active parameters all are held to: top-2 of eight experts, as active as the dense network."""
    return MoELayer(dim, hidden=4 * dim // K, experts=EXPERTS, router={"name": REFERENCE, "k": K})


def options_of(router: str) -> dict[str, Any]:
    """What a router is given beside its defaults."""
    if router in OWN:
        return OWN[router]
    return {"k": K} if "k" in inspect.signature(ROUTERS[router]).parameters else {}


def fitting_hidden(dim: int, router: dict[str, Any], experts: int, met: float) -> int:
    """Hidden units of an expert with which a token that meets `met` experts has the reference's active parameters."""
    layer = MoELayer(dim, hidden=1, experts=experts, router=router)
    wanted = reference_layer(dim).parameter_counts()[1] - layer.router.active_parameters()
    return max(1, round((wanted / met - dim) / (2 * dim + 1)))


def contestant(name: str, dim: int, met: float | None = None) -> Contestant:
    """A router with experts of the size that makes it equal.

    Args:
        name: of a router or control.
        dim: width of the tokens.
        met: experts that a token meets on average; None is what the router says itself.
    """
    if name == "ffn_active":  # the backbones' own networks have 4 · dim hidden units
        return Contestant(name, None)
    if name == "ffn_total":
        hidden = EXPERTS * (4 * dim // K)
        return Contestant(name, {"experts": 1, "hidden": hidden, "router": {"name": "dense"}, "dispatch": "dense"})
    router, experts = {"name": name, **options_of(name)}, MANY.get(name, EXPERTS)
    layer = MoELayer(dim, hidden=1, experts=experts, router=router)
    # a slot's work is shared by a sequence's tokens: how many there are only the stream knows
    exact = layer.router.exact_k and getattr(layer.router, "routing_kind", "sparse") != "soft"
    known = met or layer.router.experts_per_token(layer.view)
    hidden = fitting_hidden(dim, router, experts, known)
    return Contestant(name, {"experts": experts, "hidden": hidden, "router": router}, exact)


# -- one run --------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What the experts of one layer did while training."""

    tokens: int = 0
    done: float = 0.0  # expert · token, where the layer itself does not count it
    groups: int = 0  # merged experts that were made
    slots: int = 0

    def see(self, layer: MoELayer, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
        """A forward hook."""
        if not layer.training:
            return
        routing, tokens = output[1], inputs[0].numel() // layer.dim
        self.tokens += tokens
        if routing.kind == "soft":
            groups, _, slots = routing.dispatch_GLS.shape
            self.slots += slots * tokens
            self.done += groups * slots
        elif routing.kind == "merge":
            self.groups += len(routing.weights_GE)
            self.done += tokens


class Watched(Session):
    """A run whose layers are counted, and which keeps nothing on disk: seconds of figures and checkpoints are spared."""

    def open(self) -> None:
        super().open()
        self.work = {name: Work() for name in self.model.moe_layers()}
        for name, layer in self.model.moe_layers().items():
            layer.register_forward_hook(self.work[name].see)

    def save(self, inside: bool = False) -> None:
        if not inside:
            self.position.phase = None

    def close(self) -> dict[str, Any]:
        values = compute(self.record, unseen_masked=False)
        if self.diagnosis is not None:
            values |= tracked(self.diagnosis)
        self.progress.end("FINISHED")
        self.progress.close()
        self.metrics: dict[str, Any] = {name: v.value for name, v in values.items()}
        return self.metrics


def cost(layer: MoELayer, work: Work) -> dict[str, float]:
    """Of one layer: experts per token as counted, active parameters and FLOPs of a forward pass per token."""
    total, _ = layer.parameter_counts()
    all_experts = sum(p.numel() for p in layer.cohorts.parameters())
    one = next(iter(layer.cohorts.values())).flops_per_token()
    met = (work.done or sum(layer.usage.values())) / work.tokens
    flops = diagnostics.flops_per_token(layer) + one * (met - layer.router.experts_per_token(layer.view))
    flops += 4 * layer.dim * work.slots / work.tokens  # tokens into slots and back
    flops += 2 * all_experts * work.groups / work.tokens  # experts into one
    looked_up = sum(p.numel() for p in layer.router.parameters()) - layer.router.active_parameters()
    active = total - all_experts - looked_up + all_experts / len(layer.ids) * met
    return {"experts_per_token": met, "active": active, "total": float(total), "flops": flops}


def dense_cost(dim: int) -> dict[str, float]:
    """The same of the backbone's own feed-forward network."""
    parameters = float(2 * dim * 4 * dim + 4 * dim + dim)
    return {"experts_per_token": 1.0, "active": parameters, "total": parameters, "flops": 4.0 * dim * 4 * dim}


METRICS = {
    "load_cv": "router/load_cv",
    "dead": "router/dead_experts",
    "entropy": "router/entropy",
    "dropped": "router/dropped_share",
}


@dataclass
class Bench:
    """Everything that trains: streams, where results lie, and how long a run is.

    Attributes:
        data: where data sets are.
        out: the folder of finished runs.
        steps: of an experience, in place of the settings' own.
        repeats: alternations of the time.
    """

    data: DataFolder
    out: Path
    steps: int | None = None
    repeats: int = 8
    catalogue: Catalogue = field(default_factory=Catalogue)
    streams: dict[str, Stream] = field(default_factory=dict)
    references: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def config(self, setting: str, who: Contestant, seed: int, **changes: Any) -> dict[str, Any]:
        """A run's configuration; `changes` are whole sections' keys."""
        config = copy.deepcopy(dict(SETTINGS[setting].config))
        config |= {"experiment": f"routers-{setting}", "label": who.name, "seed": seed}
        config["model"] = {**config["model"], **({"moe": who.moe} if who.moe else {})}
        config["tracking"] = {"root": str(self.out), "enabled": False}
        if self.steps:
            config["trainer"]["max_steps"] = self.steps
        for section, own in changes.items():
            config[section] = {**config[section], **own}
        return config

    def plan(self, config: dict[str, Any]) -> Plan:
        """The checked configuration.

        Raises:
            UserError: a rule refuses it.
        """
        return read_study(config, (), self.catalogue).plans[0]

    def trained(self, config: dict[str, Any]) -> Watched:
        """A finished run; its folder is not kept, its figures are."""
        plan = self.plan(config)
        folder = new_run(plan)
        session = Watched(plan, folder, self.catalogue, self.data)
        try:
            # reading the questions takes as long as training on them
            with folder.working(), session.watched(), patch.object(cmoe.session, "make_stream", self.opened):
                train(session)
        finally:
            shutil.rmtree(folder.path, ignore_errors=True)
        return session

    def opened(self, plan: Plan, catalogue: Catalogue, data: DataFolder) -> Stream:
        """The stream of a plan, read once for each seed."""
        key = json.dumps([plan.stream, plan.seed], sort_keys=True)
        if key not in self.streams:
            self.streams[key] = make_stream(plan, catalogue, data)
        return self.streams[key]

    def once(self, kind: str, config: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` returned for this configuration, now or in an earlier call."""
        key = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]
        path = self.out / "results" / f"{config['experiment']}-{config['label']}-{config['seed']}-{kind}-{key}.json"
        if path.exists():
            return json.loads(path.read_text())
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".part")
        half.write_text(json.dumps(found, indent=1))
        half.replace(path)
        return found

    def sized(self, setting: str, name: str) -> Contestant:
        """A router with experts of the right size, after as many pilot runs as it takes (two at most)."""
        dim = SETTINGS[setting].dim
        who = contestant(name, dim)
        if name in CONTROLS:
            return who
        wanted = reference_layer(dim).parameter_counts()[1]
        for _ in range(2):
            if who.exact:
                break
            config = self.config(setting, who, PILOT, evaluation={"every": 1000})
            found = self.once("pilot", config, lambda config=config: self.costs(setting, self.trained(config)))
            if abs(found["active"] / wanted - 1) <= CLOSE:
                break
            who = contestant(name, dim, found["experts_per_token"])
        return who

    def costs(self, setting: str, session: Watched) -> dict[str, float]:
        """Means over layers; experts, parameters and FLOPs of the whole network's other parts are the same for all."""
        layers = session.model.moe_layers()
        each = [cost(layer, session.work[name]) for name, layer in layers.items()] or [
            dense_cost(SETTINGS[setting].dim)
        ]
        return {key: statistics.fmean(one[key] for one in each) for key in each[0]}

    def result(self, setting: str, who: Contestant, seed: int) -> dict[str, Any]:
        """One run: how good it is, what its experts did, what it costs."""
        config = self.config(setting, who, seed)

        def make() -> dict[str, Any]:
            began = time.perf_counter()
            session = self.trained(config)
            metrics, view = session.metrics, SETTINGS[setting].score
            found = {
                "stream": setting, "router": who.name, "seed": seed,
                "hidden": who.moe["hidden"] if who.moe else 4 * SETTINGS[setting].dim,
                "experts": who.moe["experts"] if who.moe else 1,
                "accuracy": 100 * metrics[f"{view}/acc_macro"],
                "forgetting": 100 * metrics[f"{view}/forgetting_first_minus_last"],
                **{name: None if who.name in CONTROLS else metrics.get(metric) for name, metric in METRICS.items()},
                **self.costs(setting, session),
            }  # fmt: skip
            return found | self.times(setting, session) | {"seconds": time.perf_counter() - began}

        return self.once("run", config, make)

    def times(self, setting: str, session: Watched) -> dict[str, float]:
        """Processor time of a training step, in turns with the reference's."""
        if setting not in self.references:
            config = self.config(setting, contestant(REFERENCE, SETTINGS[setting].dim), PILOT, stream={"limit": 1})
            self.references[setting] = stepper(self.trained(config))
        runs = {"own": stepper(session), REFERENCE: self.references[setting]}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for i in range(self.repeats + 2):
            for name in runs if i % 2 == 0 else reversed(runs):
                began = time.process_time()
                runs[name]()
                if i >= 2:
                    times[name].append(time.process_time() - began)
        own, other = (statistics.median(values) for values in times.values())
        return {"step_ms": own * 1e3, "step_ratio": own / other}


def stepper(session: Session) -> Callable[[], Any]:
    """A training step of a finished run on a batch as large as with its replayed samples."""
    experience = session.stream.experiences[0]
    size = 2 * session.plan.trainer["batch_size"]
    x, y = session.evaluator.batches(experience, experience.train.subset(torch.arange(size)), size)[0]
    learner = session.learner
    session.model.train()
    session.objective.begin(experience.classes, experience.classes)
    # so small a rate that the routing stays what it is
    learner.begin_phase(torch.optim.Adam(learner.model.parameters(), lr=1e-8), None, hooks=False)
    batch = Batch(x, y, experience.index, torch.arange(size), size)
    return lambda: learner.step(batch)


# -- all of them ----------------------------------------------------------------------------------------------------


def left_out(bench: Bench, setting: str, names: Sequence[str]) -> dict[str, str]:
    """The routers that a stream cannot serve, with the reason that the configuration's rules give."""
    reasons = {}
    for name in names:
        try:
            bench.plan(bench.config(setting, contestant(name, SETTINGS[setting].dim), 0))
        except UserError as error:
            reasons[name] = str(error).split("model.moe.router: ")[-1].splitlines()[0]
    return reasons


def compete(bench: Bench, settings: Sequence[str], names: Sequence[str], seeds: int) -> dict[str, Any]:
    """Every contestant with every seed; the first seed of all comes before the second of any."""
    reasons = {s: left_out(bench, s, names) for s in settings}
    sized = {}
    for s in settings:
        here = [n for n in names if n not in reasons[s]]
        for i, name in enumerate(here):
            print(f"{s}: size of {name} ({i + 1} of {len(here)})", file=sys.stderr)
            sized[s, name] = bench.sized(s, name)
    runs: dict[str, list[dict[str, Any]]] = {s: [] for s in settings}
    every = list(itertools.product(range(seeds), sized.items()))
    began = time.perf_counter()
    for i, (seed, ((s, name), who)) in enumerate(every):
        print(
            f"{i + 1} of {len(every)}: {s}, {name}, seed {seed}, {time.perf_counter() - began:.0f} s", file=sys.stderr
        )
        if name in reasons[s]:
            continue
        try:
            runs[s].append(bench.result(s, who, seed))
        except (RunFailed, RuntimeError) as error:  # one that breaks is named, and the others go on
            reasons[s][name] = f"failed with seed {seed}: {one_line(error)}"
            runs[s] = [r for r in runs[s] if r["router"] != name]
    return {
        s: {
            "title": SETTINGS[s].title,
            "score": SETTINGS[s].score,
            "left_out": reasons[s],
            "rows": summary(runs[s]),
            "spread": spread(runs[s]),
            "runs": runs[s],
        }
        for s in settings
    }


MEANS = ("experts_per_token", "active", "total", "flops", "load_cv", "dead", "entropy", "dropped", "step_ms", "step_ratio")  # fmt: skip


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per contestant, the most accurate first."""
    rows = []
    by_name = {name: [r for r in runs if r["router"] == name] for name in dict.fromkeys(r["router"] for r in runs)}
    baseline = {r["seed"]: r["accuracy"] for r in by_name.get(REFERENCE, [])}
    for name, own in by_name.items():
        row: dict[str, Any] = {
            "router": name,
            "seeds": len(own),
            "hidden": own[0]["hidden"],
            "experts": own[0]["experts"],
        }
        for key in ("accuracy", "forgetting"):
            found = summarise([r[key] for r in own])
            row |= {key: found.mean, f"{key}_std": found.std}
        for key in MEANS:
            values = [r[key] for r in own if r[key] is not None]
            row[key] = statistics.fmean(values) if values else None
        if baseline and name != REFERENCE:
            difference = paired_difference({r["seed"]: r["accuracy"] for r in own}, baseline)
            row |= {"difference": difference.mean, "difference_half": difference.half}
        rows.append(row)
    return sorted(rows, key=lambda r: -r["accuracy"])


def spread(runs: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Whether contestants differ by more than seeds do: an analysis of variance with seeds as blocks.

    Returns:
        `noise`: standard deviation of a run's accuracy once the means of its router and of its seed are taken off;
        `f`, `p`: of the hypothesis that all routers are alike; `least`: how far a router must be from the reference, mean
        against mean, to be told from it at 5 % with as many comparisons as there are others (Bonferroni). None with
        fewer than two contestants or seeds.
    """
    from scipy.special import fdtrc, stdtrit

    names, seeds = sorted({r["router"] for r in runs}), sorted({r["seed"] for r in runs})
    if len(names) < 2 or len(seeds) < 2 or len(runs) < len(names) * len(seeds):
        return None
    value = {(r["router"], r["seed"]): r["accuracy"] for r in runs}
    table = np.array([[value[n, s] for s in seeds] for n in names])
    left = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    freedom = (len(names) - 1) * (len(seeds) - 1)
    noise = float((left**2).sum() / freedom)
    between = float(len(seeds) * table.mean(1).var(ddof=1))
    f = between / noise if noise else float("inf")
    least = stdtrit(freedom, 1 - 0.05 / (2 * (len(names) - 1))) * np.sqrt(2 * noise / len(seeds))
    return {
        "noise": noise**0.5,
        "f": f,
        "p": float(fdtrc(len(names) - 1, freedom, f)),
        "least": float(least),
    }


def agreement(document: Mapping[str, Any]) -> float | None:
    """Rank correlation (Spearman) of the accuracies on the two streams, of the routers that both serve."""
    scores = [{r["router"]: r["accuracy"] for r in of["rows"]} for of in document.values()]
    if len(scores) != 2:
        return None
    both = sorted(scores[0].keys() & scores[1].keys())
    if len(both) < 3:
        return None
    ranks = np.array([np.argsort(np.argsort([own[n] for n in both])) for own in scores])
    return float(np.corrcoef(ranks)[0, 1])


# -- for people -----------------------------------------------------------------------------------------------------

HEAD = ("router", "accuracy, %", "to topk", "forgetting", "load CV", "dead", "entropy", "experts a token", "hidden", "active", "in all", "FLOP", "step")  # fmt: skip


def cells(row: Mapping[str, Any], least: float | None) -> list[str]:
    """A line of the table; a difference beyond the noise is bold."""

    def number(key: str, digits: int, scale: float = 1.0) -> str:
        value = row.get(key)
        return "–" if value is None else f"{value * scale:.{digits}f}"

    def spread_of(key: str) -> str:
        deviation = row[f"{key}_std"]
        return f"{row[key]:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")

    difference = row.get("difference")
    told = "" if difference is None else f"{difference:+.1f}"
    if told and row["difference_half"] is not None:
        told += f" ± {row['difference_half']:.1f}"
    if difference is not None and least is not None and abs(difference) > least:
        told = f"**{told}**"
    return [
        row["router"], spread_of("accuracy"), told, spread_of("forgetting"), number("load_cv", 2), number("dead", 1),
        number("entropy", 2), number("experts_per_token", 2), str(row["hidden"]), number("active", 0), number("total", 0),
        number("flops", 0), number("step_ratio", 2),
    ]  # fmt: skip


def shown(name: str, of: Mapping[str, Any]) -> str:
    """One stream as Markdown."""
    told = of["spread"]
    least = told["least"] if told else None
    lines = [measure.table([cells(r, least) for r in of["rows"]], HEAD)]
    if told:
        chance = "< 0.0001" if told["p"] < 1e-4 else f"= {told['p']:.4f}"
        lines.append(
            f"Noise of one run {told['noise']:.1f} points; all alike: F = {told['f']:.1f}, p {chance}; told from topk "
            f"beyond {told['least']:.1f} points."
        )
    if of["left_out"]:
        lines.append("Left out:\n\n" + "\n".join(f"- {who}: {why}" for who, why in of["left_out"].items()))
    return "\n\n".join(lines)


def draw(document: Mapping[str, Any]) -> bytes:
    """Accuracy against the time of a step, a panel for each stream."""
    from cmoe.tracking.figures import style

    figure = style.canvas(7.4 * len(document), 7.6)
    grid = figure.add_gridspec(1, len(document))
    panels = []
    for i, of in enumerate(document.values()):
        ax = style.axes(figure, grid[0, i])
        rows = of["rows"]
        x, y = [r["step_ratio"] for r in rows], [r["accuracy"] for r in rows]
        for r in rows:
            control = r["router"] in CONTROLS
            colour = style.colour(5 if r["router"] == REFERENCE else 2 if control else 0)
            ax.plot(r["step_ratio"], r["accuracy"], "s" if control else "o", color=colour, markersize=5)
        ax.set_xscale("log")
        low, high = min(x) / 1.3, max(x) * 1.3
        ax.set_xlim(low, high)
        ticks = [t for t in (0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8, 12) if low < t < high]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        margin = 0.06 * (max(y) - min(y) + 1)
        ax.set_ylim(min(y) - margin, max(y) + margin)
        ax.set_xlabel("training step, times that of topk")
        ax.set_ylabel("accuracy at the end, %")
        noise = ""
        if of["spread"]:  # one bar for all: a bar for each would hide the names
            half = of["spread"]["noise"] / rows[0]["seeds"] ** 0.5
            ax.errorbar(high / 1.1, max(y) - half, half, color=style.INK, linewidth=1.2, capsize=4)
            noise = "bar: noise of a mean, ± one standard deviation; "
        style.title(ax, of["title"], f"{noise}orange: topk; green: dense networks")
        panels.append((ax, [r["router"] for r in rows], x, y))
    figure.canvas.draw()  # now it is known where everything is
    for ax, names, x, y in panels:
        for name, point, (dx, dy) in placed(ax, names, x, y):
            far = abs(dy) > 5 or not -60 < dx < 8
            ax.annotate(
                name, point, xytext=(dx, dy), textcoords="offset points", fontsize=7.5, color=style.INK, va="center",
                arrowprops={"arrowstyle": "-", "color": "#B0B0B0", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
                if far
                else None,
            )  # fmt: skip
    return style.png(figure, dpi=110)


def placed(
    ax: Any, names: Sequence[str], x: Sequence[float], y: Sequence[float]
) -> list[tuple[str, tuple[float, float], tuple[float, float]]]:
    """Labels that do not cover each other: name, point, and how far off (in points) the text begins.

    Each takes the nearest free place to the right or left of its point.
    """
    points = ax.transData.transform(np.column_stack([x, y]))
    scale = ax.figure.dpi / 72
    tall, wide = 9.5 * scale, 4.3 * scale
    edge = ax.get_window_extent()
    taken = [(px - 3 * scale, px + 3 * scale, py) for px, py in points]
    found = []
    for i in np.argsort(-points[:, 1]):
        px, py = points[i]
        width = wide * len(names[i])
        choices = [
            (abs(dy) + abs(dx), px + dx if dx > 0 else px + dx - width, py + dy)
            for dy in np.arange(-14, 14.5, 0.5) * tall
            for dx in (
                6 * scale,
                -6 * scale,
                30 * scale,
                -30 * scale,
                70 * scale,
                -70 * scale,
                120 * scale,
                -120 * scale,
            )
        ]
        inside = [
            c for c in sorted(choices)
            if edge.x0 <= c[1] and c[1] + width <= edge.x1 and edge.y0 <= c[2] <= edge.y1
        ]  # fmt: skip
        free = (
            (lx, ly) for _, lx, ly in inside
            if not any(a < lx + width and lx < b and abs(ly - level) < tall for a, b, level in taken)
        )  # fmt: skip
        lx, ly = next(free, (px + 6 * scale, py))
        taken.append((lx, lx + width, ly))
        found.append((names[i], (x[i], y[i]), (float(lx - px) / scale, float(ly - py) / scale)))
    return found


def write(docs: Path, document: Mapping[str, Any], about: str) -> None:
    """Replace what stands between the marks of `routers.md`, and the picture.

    Raises:
        ValueError: a mark is not there.
    """
    page = docs / "routers.md"
    text = page.read_text(encoding="utf-8")
    blocks = {f"table {name}": shown(name, of) for name, of in document.items()}
    for name, block in {**blocks, "about": about}.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page}: expected a line '<!-- {name} -->' and one '<!-- end -->' after it")
        text = pattern.sub(lambda m, block=block: f"{m[1]}\n{block}\n\n{m[2]}", text)
    page.write_text(text, encoding="utf-8")
    (docs / "images" / "routers.png").write_bytes(draw(document))


def tune(bench: Bench, settings: Sequence[str], names: Sequence[str], rates: Sequence[float]) -> None:
    """Accuracy on the validation split at several learning rates, with the pilots' seed: a line per stream and rate."""
    for s, rate in itertools.product(settings, rates):
        scores = []
        served = [n for n in names if n not in left_out(bench, s, names)]
        for name in served:
            config = bench.config(
                s, contestant(name, SETTINGS[s].dim), PILOT, optimizer={"lr": rate}, evaluation={"split": "validation"}
            )

            def make(config: dict[str, Any] = config, view: str = SETTINGS[s].score) -> dict[str, Any]:
                return {"accuracy": 100 * (bench.trained(config).metrics[f"{view}/acc_macro"] or 0.0)}

            scores.append(bench.once("tune", config, make)["accuracy"])
        told = ", ".join(f"{name} {score:.1f}" for name, score in zip(served, scores, strict=True))
        print(f"{s}, learning rate {rate}: mean {statistics.fmean(scores):.1f} ({told})", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    known = [*ROUTERS, *CONTROLS]
    parser.add_argument("--data", help="folder of data sets; default $CMOE_DATA, else ~/.cache/cmoe")
    parser.add_argument("--streams", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--only", nargs="+", choices=known, default=known, metavar="NAME", help="routers and controls")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--steps", type=int, help="of an experience; default is each stream's own")
    parser.add_argument("--repeats", type=int, default=8, help="alternations of the time")
    parser.add_argument("--out", type=Path, default=Path("mlruns/routers"), help="folder of finished runs")
    parser.add_argument("--docs", type=Path, help="folder whose routers.md and images/routers.png are renewed")
    parser.add_argument(
        "--tune", type=float, nargs="+", metavar="RATE", help="only compare learning rates on the validation split"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    bench = Bench(data_folder(args.data), args.out, args.steps, args.repeats)
    if args.tune:
        tune(bench, args.streams, args.only, args.tune)
        return
    document = compete(bench, args.streams, args.only, args.seeds)
    about = measure.machine(torch.device("cpu"))
    alike = agreement(document)
    if alike is not None:
        about += f". Rank correlation of the accuracies on the two streams: {alike:.2f}"
    if args.docs:
        write(args.docs, document, about + ".")
    if args.json:
        print(json.dumps({"machine": about, "streams": document}, indent=1))
    else:
        print("\n\n".join([about, *(f"{of['title']}\n\n{shown(s, of)}" for s, of in document.items())]))


if __name__ == "__main__":
    main()
