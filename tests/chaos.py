"""The kill test: runs killed at random moments, resumed, and compared bit by bit with runs that nobody killed.

    python -m tests.chaos --kills 200 --seed 0

Every run is a process forked from one that has imported everything and never computed (imports take 20 s; forking after
computing can hang). It is killed by SIGKILL: at a random time, at a random training step, or just before, just after or
in the middle of a random durable operation (fsync, rename, truncate, unlink, mkdir) on its checkpoints, rows, log,
commits, facts or figures. In the middle means that what was written since the last fsync is cut at a random place, as
after a power cut. Runs are often killed several times before they may finish. Whatever a run leaves behind must equal
the reference: weights, structure, optimizer and strategy state, random generators, rows and figures byte for byte, the
log line by line (each metric once; wall-clock times excepted), the facts, and what MLflow got.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the forked processes must find no threads

import argparse
import json
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import avalanche.training
import sklearn.datasets
import timm
import torch
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

import cmoe.environment
import cmoe.runner
import cmoe.session
from cmoe import api
from cmoe.rundir import RunFolder, runs
from cmoe.streams.data import DataFolder
from cmoe.tracking import layout, store, wal
from tests.drawing import undrawn

IMPORTED = (avalanche.training, sklearn.datasets, timm, SqlAlchemyStore, cmoe.runner)  # once, for all children
PATIENCE = 120.0  # seconds after which a process counts as hanging

AUGMENTED = '''
from dataclasses import dataclass
from cmoe.streams.task import Task
from cmoe.streams.builders import class_incremental

@dataclass
class ShiftedDigits(Task):
    """Digits under random shifts, with a permutation of the classes."""
    class_order: str = "shuffled"

    def benchmark(self, data, seed):
        import torch
        from sklearn.datasets import load_digits
        from cmoe.streams.arrays import hold_out
        digits = load_digits()
        x, y = digits.images.astype("uint8"), torch.from_numpy(digits.target)
        fit, test = hold_out(y, 0.2, "digits test")
        return class_incremental(self, seed, train=(x[fit], y[fit]), test=(x[test], y[test]), experiences=5)

    def transform(self):
        from cmoe.streams.transforms import Augment, Chain, Scale
        return Chain(Augment(2, False), Scale(16))
'''

NOISY = {"experts": 2, "router": {"name": "topk", "k": 2, "noise": "shazeer", "load": 0.01}}
BUFFER = {"name": "replay", "size": 60}
DIGITS: dict[str, Any] = {
    "stream": "split_digits",
    "model": {"name": "mlp", "hidden": [24, 24]},
    "optimizer": {"name": "adam", "lr": 0.003},
    "trainer": {"epochs": 2, "batch_size": 16},
}
TEXT: dict[str, Any] = {
    "stream": {
        "name": "text_domains",
        "domains": {n: f"{n}.txt" for n in "abc"},
        "bytes_per_domain": 6000,
        "length": 32,
    },
    "model": {"name": "byte_lm", "depth": 1, "dim": 24, "heads": 2, "dropout": 0.1},
    "optimizer": {"name": "adam", "lr": 0.003},
    "trainer": {"epochs": 2, "batch_size": 8},
}


def _over(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in base.items()}
    for key, value in changes.items():
        old = merged.get(key)
        same = (
            isinstance(value, dict) and isinstance(old, dict) and value.get("name", old.get("name")) == old.get("name")
        )
        merged[key] = {**old, **value} if same else value
    return merged


@dataclass(frozen=True)
class Scenario:
    """A run to shoot at.

    Attributes:
        config: its configuration.
        tracked: whether MLflow is delivered to.
        drawn: whether its pictures are drawn (1 s); else their inputs are written in their place.
        extended: whether the finished run is extended by the rest of its stream.
    """

    config: dict[str, Any]
    tracked: bool = False
    drawn: bool = False
    extended: bool = False


VISION = _over(DIGITS, model={"moe": NOISY, "dropout": 0.1}, strategy=["expand", BUFFER])
LANGUAGE = _over(TEXT, model={"moe": NOISY}, strategy=["expand", {"name": "replay", "size": 20}])
ASKED = {"diagnostics": "all", "diagnostics_samples": 32}
SMALL_VIT = {"name": "vit", "depth": 2, "dim": 16, "heads": 2, "dropout": 0.1, "moe": NOISY}

SCENARIOS: dict[str, Scenario] = {
    "vision expand+replay": Scenario(VISION, drawn=True),
    "language expand+replay": Scenario(LANGUAGE),
    "vision expand+replay, MLflow": Scenario(VISION, tracked=True),
    "lwf with warm-up": Scenario(_over(
        DIGITS, strategy={"name": "lwf", "warm_up": True, "l2": 0.0005}, model={"head": "growing", "dropout": 0.1})),
    "online_ewc, momentum kept": Scenario(_over(
        DIGITS, strategy="online_ewc", scheduler="cosine",
        optimizer={"name": "sgd", "lr": 0.05, "momentum": 0.9, "reset": "never"})),
    "vision vit expand+replay": Scenario(_over(
        DIGITS, strategy=["expand", BUFFER], model=SMALL_VIT, stream={"name": "split_digits", "limit": 3},
        trainer={"epochs": 1, "batch_size": 32}, evaluation=ASKED)),
    "augmented, bfloat16": Scenario(_over(
        DIGITS, stream="shifted_digits", strategy=[BUFFER], plugins=["plugins"],
        trainer={"precision": "bf16-mixed", "clip_norm": 1.0})),
    "online, balanced replay": Scenario(_over(
        DIGITS, stream={"name": "split_digits", "scenario": "online"}, trainer={"epochs": 1, "batch_size": 10},
        strategy={"name": "replay", "size": 60, "policy": "class_balanced"})),
    "vision expand, isolated": Scenario(_over(
        DIGITS, stream={"name": "split_digits", "scenario": "task"}, strategy="expand",
        model={"moe": {"experts": 1, "router": "task_table"}}, evaluation=ASKED)),
    "language expand+replay, MLflow": Scenario(LANGUAGE, tracked=True),
    "cumulative, restarting": Scenario(_over(DIGITS, strategy={"name": "cumulative", "restart": True})),
    "separate networks": Scenario(_over(
        DIGITS, stream={"name": "split_digits", "scenario": "task"}, strategy="separate")),
    "joint": Scenario(_over(DIGITS, stream={"name": "split_digits", "scenario": "joint"}, strategy="joint")),
    "extended": Scenario(
        _over(DIGITS, stream={"name": "split_digits", "limit": 2}, strategy=["expand", BUFFER], model={"moe": NOISY}),
        extended=True,
    ),
    "experts from a dense model, merged, pruned and unmade": Scenario(_over(
        DIGITS, model={"dropout": 0.1}, optimizer={"name": "adam", "lr": 0.003, "reset": "never"}, strategy=[
            {"name": "upcycle", "experts": 2, "noise": 0.1}, {"name": "expand", "init": "nearest", "samples": 40},
            {"name": "merge_experts", "experts": 3}, {"name": "prune", "keep": 2, "assigned": True},
            {"name": "collapse", "after": 4, "how": "distil", "steps": 5}])),
    "native Avalanche": Scenario(_over(
        DIGITS, strategy={"name": "avalanche", "strategy": "Replay", "options": {"mem_size": 60}},
        stream={"name": "split_digits", "limit": 2})),
}  # fmt: skip
COMMON: dict[str, Any] = {"trainer": {"chunk": 3, "log_every": 5}, "checkpoint": {"every_seconds": 0.02}}

# what of a checkpoint must be equal; `wal`, `number`, `seconds` depend on when checkpoints were written
EXACT = ("position", "seen", "previous", "structure", "model", "optimizer", "carried", "strategies", "generators",
         "rows", "timeline", "loads", "routes", "steps", "phase_steps", "data")  # fmt: skip


# -- when to kill -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """When a process dies.

    Attributes:
        how: 'time', 'step', or 'before', 'after' or 'torn' for a durable operation.
        what: for those, which kind of file.
        count: at the how-manieth step or operation; for 'time' the milliseconds.
        share: of a torn write, how much of it got to the disk.
    """

    how: str
    what: str = ""
    count: int = 0
    share: float = 0.0


@dataclass
class Trigger:
    """Counts steps and durable operations in a child, and kills it at the right one."""

    shot: Shot | None
    seen: Counter[str] = field(default_factory=Counter)
    synced: dict[str, int] = field(default_factory=dict)

    def install(self) -> None:
        """Watch this process."""
        for path in Path.cwd().rglob("*"):  # what an earlier process wrote is on the disk
            if path.is_file():
                self.synced[str(path.resolve())] = path.stat().st_size
        for name in ("fsync", "replace", "unlink", "truncate", "mkdir"):
            setattr(os, name, self._watched(name, getattr(os, name)))
        step = cmoe.session.Learner.step

        def counted(learner: Any, batch: Any) -> Any:
            output = step(learner, batch)
            self.seen["step"] += 1
            if self.shot and self.shot.how == "step" and self.seen["step"] == self.shot.count:
                die()
            return output

        setattr(cmoe.session.Learner, "step", counted)  # noqa: B010

    def _watched(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **options: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{target}") if name == "fsync" else os.fspath(target)
            what = kind_of(path)
            self.seen[what] += 1
            shot = self.shot
            hit = shot is not None and shot.what == what and shot.count == self.seen[what]
            if hit and shot is not None and shot.how == "before":
                die()
            if hit and shot is not None and shot.how == "torn":
                if name == "fsync" and os.path.isfile(path):
                    whole = os.fstat(target).st_size
                    before = min(whole, self.synced.get(path, 0))  # a log may have been cut back
                    os.ftruncate(target, before + int(shot.share * (whole - before)))
                die()
            result = original(target, *args, **options)
            if name == "fsync" and os.path.isfile(path):
                self.synced[path] = os.fstat(target).st_size
            if hit:
                die()
            return result

        return call


def kind_of(path: str) -> str:
    """What a file is to a run."""
    parts, name = Path(path).parts, Path(path).name
    for folder, kind in (("state", "checkpoint"), ("rows", "row"), ("figures", "figure")):
        if folder in parts:
            return kind
    known = {"wal": "log", "committed": "commit", "delivered": "commit", "run": "facts", "config": "facts"}
    return known.get(name.lstrip(".").split(".")[0], "other")


def die() -> None:
    """As by kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def aim(rng: random.Random, counts: dict[str, int], seconds: float) -> Shot:
    """A random moment of a run that makes `counts` operations and takes so long."""
    how = rng.choices(("time", "step", "before", "after", "torn"), (3, 2, 2, 2, 2))[0]
    if how == "time" or (how == "step" and not counts.get("step")):
        return Shot("time", count=int(1000 * rng.uniform(0.0, seconds)))
    if how == "step":
        return Shot("step", count=rng.randint(1, counts["step"]))
    what = rng.choice([k for k in counts if k != "step"])
    # the last few operations finish a run: as many of these as would hardly ever come by chance
    first = max(1, counts[what] - 4) if rng.random() < 0.25 else 1
    return Shot(how, what, rng.randint(first, counts[what]), rng.random())


# -- children -----------------------------------------------------------------------------------------------------


def fork(work: Callable[[], object], log: Path) -> int:
    """A child that does `work` and ends with 0, or 1 after an error, which `log` then holds."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int, kill_after: float | None = None) -> int | None:
    """How a child ended: its exit code, -9 when it was killed, None when it hung (it is killed then)."""
    began, killed = time.monotonic(), False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - began
        if not killed and kill_after is not None and passed >= kill_after:
            os.kill(pid, signal.SIGKILL)
            killed = True
        if passed > PATIENCE:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.002)


class Range:
    """A folder with data, a plugin, a template database and the references; and the runs that are shot at.

    Args:
        root: an empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = DataFolder(root / "data", "--data")
        self.data.root.mkdir()
        (root / "plugins").mkdir()
        (root / "plugins" / "shifted_digits.py").write_text(AUGMENTED)
        words = random.Random(0)
        for name, letters in (("a", "aeinrst "), ("b", "(){}=+01 \n"), ("c", "ABCdef,. ")):
            (self.data.root / f"{name}.txt").write_text("".join(words.choices(letters, k=6000)))
        # constant while this runs, whatever is edited or committed meanwhile; and quicker
        fingerprint, commit, versions = cmoe.environment.code_fingerprint(), "0" * 40, layout.versions()
        setattr(cmoe.environment, "code_fingerprint", lambda: fingerprint)  # noqa: B010
        setattr(layout, "git_commit", lambda folder=None: commit)  # noqa: B010
        setattr(layout, "versions", lambda: dict(versions))  # noqa: B010
        self.plans: dict[str, Any] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self.seconds: dict[str, float] = {}

    def prepare(self, name: str) -> None:
        """Check a scenario's configuration and make its reference."""
        tracked = SCENARIOS[name].tracked
        config = _over(SCENARIOS[name].config, experiment="chaos", tracking={"enabled": tracked})
        for section, options in COMMON.items():
            config[section] = {**config.get(section, {}), **options}
        if "plugins" in config:
            config["plugins"] = [str(self.root / folder) for folder in config["plugins"]]
        self.plans[name] = api.plan_of(config, plugins=config.get("plugins", ()))
        template = self.root / "template"
        if tracked and not template.exists():
            ended = wait(fork(lambda: store.prepare(store.locate(template)), self.root / "template.log"))
            assert ended == 0, (self.root / "template.log").read_text()
        began = time.monotonic()
        place = self.place(name, "reference")
        ended = wait(self.launch(name, place, None))
        assert ended == 0, f"{name}: {(place / 'log').read_text()}"
        self.seconds[name] = time.monotonic() - began
        self.counts[name] = json.loads((place / "counts.json").read_text())

    def place(self, name: str, what: str) -> Path:
        """A fresh working folder."""
        place = self.root / name.replace(" ", "_") / what
        place.mkdir(parents=True)
        if SCENARIOS[name].tracked:
            (place / "mlruns").mkdir()
            shutil.copy(self.root / "template" / "mlflow.db", place / "mlruns")
        return place

    def launch(self, name: str, place: Path, shot: Shot | None) -> int:
        """A child that starts the scenario's run in `place`, or resumes it."""

        def work() -> None:
            os.chdir(place)
            trigger = Trigger(shot)
            trigger.install()
            if not SCENARIOS[name].drawn:
                undrawn(setattr)
            found = runs(Path("mlruns"))
            ready = SCENARIOS[name].extended and found and found[-1].facts()["status"] == "FINISHED"
            if ready and found[-1].facts()["config"]["stream"]["limit"]:
                api.extend(found[-1], "all", self.data)
            elif found:
                api.resume(found[-1], self.data)
            else:
                plan, catalogue = self.plans[name]
                api.start(plan, catalogue, self.data)
                if SCENARIOS[name].extended:
                    api.extend(runs(Path("mlruns"))[-1], "all", self.data)
            if shot is None:
                (place / "counts.json").write_text(json.dumps(trigger.seen))

        return fork(work, place / "log")

    def shoot(self, name: str, number: int, rng: random.Random, most: int) -> tuple[list[Shot], list[str]]:
        """One run, killed some times and resumed to its end: the kills that hit, and all differences."""
        place = self.place(name, f"run {number}")
        hits: list[Shot] = []
        wanted = min(most, rng.choices((1, 2, 3, 5), (5, 3, 2, 1))[0])
        for attempt in range(3 * wanted):
            if len(hits) == wanted:
                break
            # a resumed run has less before it
            scale = 0.5 ** min(attempt, 2)
            counts = {k: max(1, int(n * scale)) for k, n in self.counts[name].items()}
            shot = aim(rng, counts, self.seconds[name] * scale)
            pid = self.launch(name, place, shot)
            ended = wait(pid, shot.count / 1000 if shot.how == "time" else None)
            if ended == -signal.SIGKILL:
                hits.append(shot)
                if not runs(place / "mlruns"):  # before there was anything: nothing to resume
                    shutil.rmtree(place / "mlruns" / "runs", ignore_errors=True)
            elif ended != 0:
                return hits, [failure(place, ended, shot)]
        for _ in range(
            2 + SCENARIOS[name].extended
        ):  # the last finds a finished run, and has nothing to do but deliver the rest
            ended = wait(self.launch(name, place, None))
            if ended != 0:
                return hits, [failure(place, ended, None)]
        found = self.differences(name, place)
        if not found:
            shutil.rmtree(place)
            return hits, []
        # is it the kill? where the machine computes otherwise by now, a run that nobody killed differs too
        control = self.place(name, f"control {number}")
        wait(self.launch(name, control, None))
        if self.differences(name, control):
            found.insert(0, "a run that nobody killed differs from the reference too")
        return hits, found

    def differences(self, name: str, place: Path) -> list[str]:
        """Compare with the reference (in a child, as it computes)."""
        reference = self.root / name.replace(" ", "_") / "reference"
        result = place / "differences.json"
        compared = lambda: compare(reference / "mlruns", place / "mlruns", SCENARIOS[name].tracked)  # noqa: E731
        ended = wait(fork(lambda: result.write_text(json.dumps(compared())), place / "log"))
        return json.loads(result.read_text()) if ended == 0 else [failure(place, ended, None)]


def failure(place: Path, ended: int | None, shot: Shot | None) -> str:
    """What a process that did not end as it should left in its log."""
    how = "hung" if ended is None else f"ended with {ended}"
    lines = (place / "log").read_text().strip().splitlines()[-3:]
    return f"{how} ({shot}): {' | '.join(lines)}"


# -- comparing ----------------------------------------------------------------------------------------------------


def compare(reference: Path, killed: Path, tracked: bool) -> list[str]:
    """Everything in which the run under `killed` differs from the one under `reference`."""
    a, *more = runs(reference)
    b, *others = runs(killed)
    found = [f"{len(others) + 1} runs"] if others or more else []
    mine, theirs = final_state(a), final_state(b)
    found += [d for key in EXACT for d in unequal(mine[key], theirs[key], key)]
    for folder in ("rows", "figures"):
        found += files(a.path / folder, b.path / folder)
    found += unequal(entries(a), entries(b), "log")
    twice = [k for k, n in Counter((e["step"], m) for e in entries(b) if e["kind"] == "metric" for m in e["values"]).items() if n > 1]  # fmt: skip
    found += [f"log: {key} twice" for key in twice]
    ignored = ("wall_seconds", "created", "finished", "data_root")
    facts = [{k: v for k, v in run.facts().items() if k not in ignored} for run in (a, b)]
    found += unequal(*facts, "run.json")
    if tracked:
        delivered_a, delivered_b = in_mlflow(reference), in_mlflow(killed)
        found += unequal(delivered_a, delivered_b, "MLflow")
        logged = sorted([m, e["step"], v] for e in entries(b) if e["kind"] == "metric" for m, v in e["values"].items() if v is not None)  # fmt: skip
        found += unequal(logged, [list(m) for m in delivered_b["metrics"]], "MLflow metrics")
    return found[:20]


def final_state(run: RunFolder) -> dict[str, Any]:
    """A finished run's last checkpoint."""
    return torch.load(sorted(run.state.glob("*.pt"))[-1], weights_only=True)


def entries(run: RunFolder) -> list[dict[str, Any]]:
    """The log without time stamps and wall-clock metrics; artifacts and a status are entries too."""
    kept = []
    for line in run.wal.read_text().splitlines():
        if not line.endswith("}"):  # torn; every line is an object
            kept.append({"kind": "torn"})
            continue
        entry = json.loads(line)
        del entry["t"]
        if entry["kind"] == "metric":
            entry["values"] = {k: v for k, v in entry["values"].items() if not k.startswith(wal.WALL_CLOCK)}
        kept.append(entry)
    return kept


def files(a: Path, b: Path) -> list[str]:
    """Files that are not the same byte for byte; temporary ones (hidden) may be left over."""
    names = [{p.name for p in folder.glob("*") if not p.name.startswith(".")} for folder in (a, b)]
    found = [f"{b.name}/{n}: only in one" for n in sorted(names[0] ^ names[1])]
    both = sorted(names[0] & names[1])
    return found + [f"{b.name}/{n}: other bytes" for n in both if (a / n).read_bytes() != (b / n).read_bytes()]


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


def in_mlflow(root: Path) -> dict[str, Any]:
    """What MLflow's database and artifact folder hold: every point of every metric, duplicates and all."""
    with closing(sqlite3.connect(root / "mlflow.db")) as db:
        ask = lambda query: [list(row) for row in db.execute(query)]  # noqa: E731
        wall = f"key not like '{wal.WALL_CLOCK}%'"
        return {
            "runs": ask("select status, name, lifecycle_stage from runs"),
            "metrics": ask(
                f"select key, step, value from metrics where is_nan = 0 and {wall} order by key, step, value"
            ),
            "absent": ask(f"select key, step from metrics where is_nan = 1 and {wall} order by key, step"),
            "times": ask("select key, step, count(*) from metrics where key like 'time/%' group by key, step"),
            "params": ask("select key, value from params order by key"),
            "tags": ask("select key, value from tags where key != 'mlflow.artifactLocation' order by key"),
            "inputs": ask("select count(*) from inputs"),
            "artifacts": [[p.parent.name, p.name] for p in sorted((root / "artifacts").rglob("*")) if p.is_file()],
        }


# -- the program --------------------------------------------------------------------------------------------------


def main() -> int:
    """Kill until enough kills hit; 0 without any difference, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how many kills must hit")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", action="append", default=[], help="scenarios whose names hold this (repeatable)")
    parser.add_argument("--keep", metavar="DIR", help="leave runs that differ in this new folder")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    names = [n for n in SCENARIOS if not options.only or any(o in n for o in options.only)]
    if not names:
        parser.error(f"--only: expected part of one of {', '.join(SCENARIOS)}")
    torch.set_num_threads(1)
    for variable in ("MLFLOW_TRACKING_URI", "CMOE_MAX_THREADS"):
        os.environ.pop(variable, None)
    root = Path(options.keep or tempfile.mkdtemp(prefix="cmoe-chaos-")).absolute()
    root.mkdir(parents=True, exist_ok=True)
    try:
        result = campaign(Range(root), names, options.kills, random.Random(options.seed))
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    result["seed"] = options.seed
    say = sys.stdout.write
    if options.json:
        say(json.dumps(result, indent=1) + "\n")
    else:
        say(table(result))
    return 1 if result["differences"] else 0


def campaign(site: Range, names: list[str], kills: int, rng: random.Random) -> dict[str, Any]:
    """Shoot at the scenarios in turn until `kills` hit."""
    began = time.monotonic()
    hits: Counter[str] = Counter()
    moments: Counter[str] = Counter()
    finished: Counter[str] = Counter()
    differences: list[str] = []
    number = 0
    while sum(hits.values()) < kills and len(differences) < 20:
        name = names[number % len(names)]
        if name not in site.plans:
            site.prepare(name)
        shots, found = site.shoot(name, number, rng, kills - sum(hits.values()))
        number += 1
        hits[name] += len(shots)
        finished[name] += 1
        moments.update(" ".join(filter(None, (s.how, s.what))) for s in shots)
        if found:
            moment = ", ".join(f"{s.how} {s.what} {s.count}".replace("  ", " ") for s in shots)
            differences.append(f"{name}, run {number - 1}, killed at [{moment}]: {'; '.join(found)}")
    return {
        "kills": sum(hits.values()),
        "runs": number,
        "differences": differences,
        "scenarios": {n: {"kills": hits[n], "runs": finished[n], "seconds": round(site.seconds[n], 2)} for n in site.plans},
        "moments": dict(sorted(moments.items())),
        "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'scenario':<34}{'kills':>7}{'runs':>7}{'seconds each':>14}"]
    for name, row in result["scenarios"].items():
        lines.append(f"{name:<34}{row['kills']:>7}{row['runs']:>7}{row['seconds']:>14}")
    lines.append("moments: " + ", ".join(f"{k} {n}" for k, n in result["moments"].items()))
    lines += [f"DIFFERENT: {d[:600]}" for d in result["differences"]]
    lines.append(
        f"{result['kills']} kills of {result['runs']} runs in {result['seconds']} s: "
        f"{len(result['differences'])} runs differ (seed {result['seed']})"
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
