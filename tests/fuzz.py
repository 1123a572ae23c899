"""The combination test: random configurations that must train, resume and grow, or be refused by name.

    python -m tests.fuzz --configs 300 --seed 0
    python -m tests.fuzz --only 0:17            # one of them again
    python -m tests.fuzz --config FAILED.yaml   # or as the file that a failure printed

Configurations are drawn from everything that is registered (tests/drawn_configs.py) until `--configs` of them ran.
Each is either refused, by one line that names a key of it and before anything is left behind, or it must
train with finite losses; end in the same state, bit for bit, when it is stopped in the middle and resumed; and its
final model, loaded from disk, must take another expert in every layer, freeze one and lose one, learn on, and come back
whole from a checkpoint.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import argparse
import contextlib
import functools
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning_fabric.utilities.registry
import sklearn.datasets
import torch

from cmoe import api, checkpoint, restored
from cmoe.assembly import make_model, make_objective
from cmoe.config.plan import Plan
from cmoe.config.sections import SECTIONS
from cmoe.config.study import read_study
from cmoe.config.text import dump, read_file
from cmoe.errors import UserError, one_line
from cmoe.learners import Batch, Model
from cmoe.moe import MoELayer, RouteContext
from cmoe.plugins import Catalogue
from cmoe.rundir import RunFolder
from cmoe.runner import train
from cmoe.session import Interrupted, Session
from cmoe.strategies.feature_classifier import FeatureClassifier
from cmoe.streams import readers
from cmoe.streams.data import DataFolder
from cmoe.tracking import layout

from . import tiny_data
from .drawing import undrawn
from .drawn_configs import Drawer, Undrawable

PATIENCE = 20  # seconds of computing after which a configuration counts as hanging; most take half a second
DIGITS = 120  # scikit-learn's, of 1797: strategies that look at every sample look at these
KINDS = ("router", "expert", "strategy", "backbone", "task", "optimizer", "scheduler")

# what of a checkpoint must be equal; `wal`, `number`, `seconds` depend on when checkpoints were written
EXACT = ("position", "seen", "previous", "structure", "model", "optimizer", "carried", "strategies", "generators",
         "rows", "timeline", "loads", "routes", "steps", "phase_steps", "data")  # fmt: skip
KEY = re.compile(rf"\b(?:{'|'.join(['stream', 'strategy', 'scheduler', 'experiment', *SECTIONS])})(?:\.\w+)+")


class Failed(Exception):
    """What a configuration should have done and did not."""


@dataclass
class Verdict:
    """What became of a configuration.

    Attributes:
        how: 'passed', 'refused' (before torch is needed), 'refused late' (by the data or the built model), 'failed'.
        stage: what was being done.
        message: the refusal or the failure, in one line.
        trace: where it failed.
        parts: the names of its components by kind.
    """

    how: str
    stage: str = ""
    message: str = ""
    trace: str = ""
    parts: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0  # of computing


class Range:
    """A folder with tiny data, and the runs that are made in it.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        tiny_data.write(root / "data")
        self.data = DataFolder(root / "data", "--data")
        self.catalogue = _catalogue([Path(__file__).parent / "strategies" / "tasks"])
        self.stage = ""

    def judge(self, config: Mapping[str, Any], seed: str = "") -> Verdict:
        """Check a configuration, and if it is valid put it through everything."""
        began = time.process_time()
        rng = random.Random(f"judge {seed}")
        place = Path(tempfile.mkdtemp(dir=self.root, prefix="run-"))
        self.stage = "check"
        try:
            with patience(PATIENCE):
                verdict = self._judged(config, place, rng)
        except Exception as error:
            trace = traceback.format_exc()
            verdict = Verdict("failed", self.stage, one_line(error), trace)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        verdict.seconds = time.process_time() - began
        verdict.parts = parts(config)
        return verdict

    def _judged(self, config: Mapping[str, Any], place: Path, rng: random.Random) -> Verdict:
        config = {**config, "tracking": {"enabled": False, "root": str(place / "mlruns")}}
        catalogue = _catalogue([*self.catalogue.given, *config.get("plugins", ())])
        try:
            (plan,) = read_study(config, (), catalogue).plans
        except UserError as error:
            return refusal("refused", error)
        self.stage = "train"
        ticks = Ticks()
        try:
            whole = self._run(plan, catalogue, ticks)
        except UserError as error:
            if list((place / "mlruns").rglob("*.pt")):
                raise Failed(f"refused after it had begun: {error}") from error
            return refusal("refused late", error)
        trained(whole)
        self.stage = "resume"
        if ticks.count:  # some strategies train nothing
            stopped = self._stopped(plan, catalogue, rng.randrange(ticks.count))
            expect_same(whole.folder, stopped)
        self.stage = "experts"
        model = restored.of_run(whole.folder, catalogue.given).model
        grow(model, whole, rng)
        self.stage = "round trip"
        comes_back(model, whole, catalogue, place / "again")
        return Verdict("passed")

    def _run(
        self, plan: Plan, catalogue: Catalogue, stop: Callable[[], bool] | None, folder: RunFolder | None = None
    ) -> Session:
        session = Session(plan, folder or api.new_run(plan), catalogue, self.data, stop=stop)
        with session.folder.working(), session.watched():
            train(session)
        return session

    def _stopped(self, plan: Plan, catalogue: Catalogue, after: int) -> RunFolder:
        """The folder of a run that was stopped after so many chunks, and resumed."""
        folder = api.new_run(plan)
        try:
            self._run(plan, catalogue, Ticks(after), folder)
        except Interrupted:
            pass
        else:
            raise Failed("the run did not stop")
        again = Plan.from_dict(folder.facts()["config"], catalogue, "run.json")
        self._run(again, catalogue, None, folder)
        return folder


class Ticks:
    """Counts the chunks of a run; asks it to stop after so many."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.count, self.stop_after = 0, stop_after

    def __call__(self) -> bool:
        self.count += 1
        return self.stop_after is not None and self.count > self.stop_after


@contextlib.contextmanager
def patience(seconds: float) -> Generator[None]:
    """Give up on what takes longer."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise Failed(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# -- what must hold -----------------------------------------------------------------------------------------------


def refusal(how: str, error: UserError) -> Verdict:
    """A refusal, if it is a good one."""
    message = str(error)
    if "\n" in message or not message:
        raise Failed(f"expected a refusal of one line, got {message!r}") from error
    if not KEY.search(message):
        raise Failed(f"expected a refusal that names a key, got {message!r}") from error
    return Verdict(how, "check", message)


def trained(session: Session) -> None:
    """It trained at every stop and ended in finite weights (every loss was looked at while it trained)."""
    status = session.folder.facts()["status"]
    if status != "FINISHED":
        raise Failed(f"ended as {status}")
    rows = [row for row in session.record.rows if row >= 0]
    still = session.native is not None or any(isinstance(s, FeatureClassifier) for s in session.strategies)
    if not still and session.learner.steps < len(session.segments):
        raise Failed(f"{session.learner.steps} steps in {len(session.segments)} experiences")
    if not rows or rows[-1] != session.segments[-1].last:
        raise Failed(f"the last row is missing: {rows}")
    for name, value in session.model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise Failed(f"{name} is not finite")


def expect_same(a: RunFolder, b: RunFolder) -> None:
    """Two finished runs left behind the same state, rows, metrics and log."""
    first, second = checkpoint.load(a.state), checkpoint.load(b.state)
    assert first is not None
    assert second is not None
    found = [d for key in EXACT for d in unequal(first[key], second[key], key)]
    names = [{p.name: p.read_bytes() for p in f.rows.glob("*.safetensors")} for f in (a, b)]
    found += [f"rows/{n}" for n in sorted(set(names[0]) | set(names[1])) if names[0].get(n) != names[1].get(n)]
    found += unequal(a.facts()["metrics"], b.facts()["metrics"], "metrics")
    found += unequal(points(a), points(b), "log")
    if found:
        raise Failed(f"a resumed run differs: {'; '.join(found[:6])}")


def unequal(a: Any, b: Any, where: str) -> list[str]:
    """Paths of what is not exactly the same in two nested containers."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
        return [] if same else [f"{where}: other values"]
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        if list(a) != list(b):  # the order counts: optimizer states go by it
            return [f"{where}: keys {sorted(map(str, a.keys() ^ b.keys())) or 'in another order'}"]
        return [d for k in a for d in unequal(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} items"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in unequal(x, y, f"{where}/{i}")]
    return [] if a == b or (a != a and b != b) else [f"{where}: {str(a)[:60]} and {str(b)[:60]}"]


def points(run: RunFolder) -> list[list[Any]]:
    """What was logged, in order, but for wall-clock times."""
    entries = [json.loads(line) for line in run.wal.read_text().splitlines()]
    return [
        [e["step"], name, value]
        for e in entries
        if e["kind"] == "metric"
        for name, value in e["values"].items()
        if not name.startswith("time/")
    ]


def grow(model: Model, session: Session, rng: random.Random) -> None:
    """Another expert in every layer, one frozen, one removed; then the model still learns."""
    model.train()
    last = session.segments[-1].last
    for layer in model.moe_layers().values():
        change(layer, rng, last)
    frozen = {name: frozen_weights(layer) for name, layer in model.moe_layers().items()}
    batch = some(session, last)
    objective = make_objective(session.plan, session.stream, model.head)
    objective.begin(session.context.seen, session.stream.experiences[last].classes)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = session.optimizer_options.build(learning)
    with session.placement.forward():
        output = model(batch.x, RouteContext(task=batch.task, training=True))
        loss = objective.loss(output.logits, batch) + sum(output.auxiliary().values())
    if not loss.isfinite():
        raise Failed(f"the loss with a new expert is {float(loss)}")
    if loss.requires_grad:
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise Failed(f"{name} is not finite after a step with a new expert")
    for name, layer in model.moe_layers().items():
        if found := unequal(frozen[name], frozen_weights(layer), name):
            raise Failed(f"frozen experts changed: {'; '.join(found[:6])}")


def frozen_weights(layer: MoELayer) -> dict[int, list[torch.Tensor]]:
    """Copies of each frozen expert's weights and router columns, by id."""
    found = {}
    for expert in sorted(layer.frozen_ids):
        key, row = layer.view.where[expert]
        own = [modules[key] for modules in layer.stacked_modules() if key in modules]
        found[expert] = [p.detach()[row].clone() for module in own for p in module.parameters()]
    return found


def change(layer: MoELayer, rng: random.Random, task: int) -> None:
    """Add, freeze and remove an expert of a layer."""
    old = layer.ids
    most = layer.structure()["next_expert"]
    init = rng.choice(("fresh", "copy", "zero"))
    try:
        added = layer.add_experts(1, init=init, tasks=[task])
    except ValueError as error:
        if init == "fresh" or "\n" in str(error):
            raise
        added = layer.add_experts(1, tasks=[task])
    gone = rng.choice(old)
    frozen = rng.choice([expert for expert in layer.ids if expert != gone])
    layer.freeze([frozen])
    layer.remove([gone])
    wanted = {*old, *added} - {gone}
    if set(layer.ids) != wanted or added != [most] or set(added) & set(old):
        raise Failed(f"expected the experts {sorted(wanted)}, {added} of them new, got {layer.ids}")
    if frozen not in layer.frozen_ids:
        raise Failed(f"expert {frozen} is not frozen")


def some(session: Session, experience: int) -> Batch:
    """A few training samples of an experience as a step gets them."""
    split = session.stream.experiences[experience].train
    rows = split.index[:6]
    raw = split.x.index_select(0, rows)
    generator = torch.Generator().manual_seed(0)
    x = session.context.inputs(raw, torch.full((len(rows),), experience), generator)
    if split.y is None:
        return Batch(x[:, :-1], x[:, 1:], experience, rows, len(rows))
    return Batch(x, split.y.index_select(0, rows), experience, rows, len(rows))


def comes_back(model: Model, session: Session, catalogue: Catalogue, folder: Path) -> None:
    """Structure and weights, through a file, make the same model again."""
    checkpoint.save(folder, 1, {"structure": model.structure(), "model": model.state_dict()}, keep=1)
    state = checkpoint.load(folder)
    assert state is not None
    fresh = make_model(session.plan, catalogue, session.stream).to(session.placement.device, session.placement.dtype)
    fresh.restore_structure(state["structure"])
    fresh.load_state_dict(state["model"])
    found = unequal(model.structure(), fresh.structure(), "structure")
    found += unequal(dict(model.state_dict()), dict(fresh.state_dict()), "state")
    batch = some(session, session.segments[-1].last)
    # gates that a strategy puts on units by the label are the strategy's, not the model's
    task = batch.task if model.needs_task() else None
    answers = []
    for one in (model, fresh):
        torch.manual_seed(0)
        with torch.no_grad(), session.placement.forward():
            answers.append(one.eval()(batch.x, RouteContext(task=task)).logits)
    found += unequal(answers[0], answers[1], "logits")
    if found:
        raise Failed(f"a restored model differs: {'; '.join(found[:6])}")


def parts(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Kind and name of every component of a configuration."""
    model = config.get("model") or {}
    moe = model.get("moe") or {}
    specs = [("task", config.get("stream")), ("backbone", model), ("router", moe.get("router"))]
    specs += [("expert", m.get("expert")) for m in [moe, *moe.get("more", [])]]
    specs += [("strategy", s) for s in config.get("strategy", [])]
    specs += [("optimizer", config.get("optimizer")), ("scheduler", config.get("scheduler"))]
    return [(kind, spec if isinstance(spec, str) else spec["name"]) for kind, spec in specs if spec]


# -- the campaign -------------------------------------------------------------------------------------------------


@functools.cache
def _read(folders: tuple[str, ...]) -> Catalogue:
    return Catalogue(folders)


def _catalogue(folders: Iterable[str | Path] = ()) -> Catalogue:
    return _read(tuple(dict.fromkeys(map(str, folders))))


_DIGITS = sklearn.datasets.load_digits
_SHEETS = readers._cifar_sheets


def _few_pictures(train: Any, test: Any, names: list[str]) -> Any:
    (x, y), (x_test, y_test) = train, test
    return (x[::20], y[::20]), (x_test[::10], y_test[::10]), names


def _few_digits() -> Any:
    digits = _DIGITS()
    digits.images, digits.target = digits.images[:DIGITS], digits.target[:DIGITS]
    return digits


@contextlib.contextmanager
def quick(patch: Callable[[Any, str, Any], object]) -> Generator[None]:
    """What does not depend on the configuration is done once (versions, entry points, components as they are in source),
    the digits are few, and nothing waits for the disk."""
    undrawn(patch)
    versions = layout.versions()
    patch(layout, "versions", lambda: dict(versions))
    patch(layout, "git_commit", lambda folder=None: "0" * 40)
    patch(os, "fsync", lambda handle: None)
    patch(sklearn.datasets, "load_digits", functools.cache(_few_digits))
    patch(readers, "_cifar_sheets", lambda folder: _few_pictures(*_SHEETS(folder)))
    patch(restored, "Catalogue", _catalogue)
    registry = lightning_fabric.utilities.registry
    patch(registry, "entry_points", functools.cache(registry.entry_points))
    torch.set_num_threads(1)
    yield


def campaign(
    site: Range, seed: int, wanted: int, only: Mapping[str, list[str]] | None = None, say: Callable[[str], object] = len
) -> dict[str, Any]:
    """Draw configurations until `wanted` of them ran or failed."""
    began, computing = time.monotonic(), time.process_time()
    drawer = Drawer(site.catalogue, seed, only)
    how: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    seen: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    failures: list[dict[str, Any]] = []
    undrawable: set[str] = set()
    slowest = (0.0, -1)
    index = -1
    while how["passed"] + how["failed"] < wanted and index < 50 * wanted + 100:
        index += 1
        try:
            config = drawer.config(index)
        except Undrawable as error:
            undrawable.add(str(error))
            continue
        verdict = site.judge(config, f"{seed}:{index}")
        how[verdict.how] += 1
        if verdict.how == "passed":
            for kind, name in verdict.parts:
                seen[kind][name] += 1
        elif verdict.how == "failed":
            failures.append({"config": f"{seed}:{index}", "stage": verdict.stage, "message": verdict.message,
                             "trace": verdict.trace, "yaml": dump(config)})  # fmt: skip
            say(told(failures[-1]))
        else:
            reasons[f"{verdict.how}: {reason(verdict.message)}"] += 1
        slowest = max(slowest, (round(verdict.seconds, 2), index))
    return {
        "seed": seed,
        "drawn": sum(how.values()),
        "passed": how["passed"],
        "refused": how["refused"] + how["refused late"],
        "refused_late": how["refused late"],
        "failed": how["failed"],
        "failures": failures,
        "reasons": dict(reasons.most_common()),
        "never_ran": {k: sorted(set(site.catalogue.entries(k)) - set(seen[k])) for k in KINDS},
        "undrawable": sorted(undrawable),
        "slowest": {"config": f"{seed}:{slowest[1]}", "seconds": slowest[0]},
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - computing, 1),
    }


def reason(message: str) -> str:
    """A refusal without what was drawn: its key and what was expected."""
    found = KEY.search(message)
    expected = message.partition(", got ")[0].rpartition("expected ")[2]
    return f"{re.sub(r'[0-9]+', 'N', found[0]) if found else '?'}: {re.sub(r'[0-9]+', 'N', expected)[:90]}"


def told(failure: Mapping[str, Any]) -> str:
    """A failure for people, with what it takes to see it again."""
    return (
        f"FAILED {failure['config']} at {failure['stage']}: {failure['message']}\n{failure['trace']}\n"
        f"# python -m tests.fuzz --only {failure['config']}, or --config with this file:\n{failure['yaml']}\n"
    )


def table(result: Mapping[str, Any]) -> str:
    """The result for people."""
    lines = [f"{count:>5}  {why}" for why, count in result["reasons"].items()]
    for kind, names in result["never_ran"].items():
        lines += [f"never ran: {kind} {', '.join(names)}"] if names else []
    lines += [f"cannot be drawn: {', '.join(result['undrawable'])}"] if result["undrawable"] else []
    lines.append(f"slowest: {result['slowest']['config']} with {result['slowest']['seconds']} s")
    lines.append(
        f"{result['drawn']} configurations drawn, {result['refused']} refused ({result['refused_late']} of them by data "
        f"or model), {result['passed']} passed, {result['failed']} failed in {result['seconds']} s, {result['cpu_seconds']} of them computing (seed {result['seed']})"
    )
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def site_in(folder: str | None = None) -> Iterator[Range]:
    """A range in a new folder that goes away."""
    root = Path(tempfile.mkdtemp(prefix="cmoe-fuzz-", dir=folder)).absolute()
    try:
        yield Range(root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def as_in_tests() -> None:
    """Warnings are errors, but for those that pyproject.toml names."""
    warnings.simplefilter("error")
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module="(?!cmoe)")


def main() -> int:
    """Draw until enough configurations ran; 0 without any failure, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", type=int, default=300, help="how many configurations must run")
    parser.add_argument("--seed", type=int, default=0, help="of the configurations")
    parser.add_argument("--only", metavar="SEED:INDEX", help="the configuration of this seed and index")
    parser.add_argument("--config", metavar="FILE", help="the configuration in this file")
    parser.add_argument("--among", action="append", default=[], metavar="KIND=NAME[,NAME]",
                        help="components to draw from (repeatable), such as router=topk,hash")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    as_in_tests()
    say = sys.stdout.write
    among = {kind: names.split(",") for kind, _, names in (a.partition("=") for a in options.among)}
    if unknown := sorted(set(among) - set(KINDS)):
        parser.error(f"--among: expected one of {', '.join(KINDS)}, got {unknown[0]}")
    with site_in() as site, quick(setattr):
        if options.only or options.config:
            seed, _, index = (options.only or "0:0").partition(":")
            config = read_file(Path(options.config)) if options.config else None
            config = config or Drawer(site.catalogue, int(seed), among).config(int(index))
            say(dump(config))
            verdict = site.judge(config, options.only or options.config)
            say(f"{verdict.trace}{verdict.how} in {verdict.seconds:.2f} s {verdict.stage}: {verdict.message}\n")
            return int(verdict.how == "failed")
        result = campaign(site, options.seed, options.configs, among, sys.stderr.write)
    say(json.dumps(result, indent=1) + "\n" if options.json else table(result))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
