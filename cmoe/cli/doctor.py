"""`cmoe doctor`: what this installation has, and what is wrong with it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sqlite3
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cmoe.cli.common import DONE, FAILED, Parser, catalogue, data, emit, table
from cmoe.errors import UserError, first_line
from cmoe.plugins import KINDS

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "avalanche-lib", "timm", "mlflow", "omegaconf",
            "scikit-learn", "numpy")  # fmt: skip
IMPORTED = (
    "torch",
    "torchvision",
)  # broken pairs of these two are common: the one sees the other's version only at import
DATA = {
    "MNIST": ("MNIST/raw",),
    "FashionMNIST": ("FashionMNIST/raw",),
    "CIFAR-100": ("cifar-100-python", "cifar-100-python.tar.gz", "cifar100"),
    "CLINC150": ("clinc150",),
}
_SPACE = 2 * 2**30  # bytes below which checkpoints and a database soon fail


@dataclass
class Finding:
    """One line of the report.

    Attributes:
        state: 'ok', 'note' (nothing wrong) or 'bad'.
    """

    topic: str
    state: str
    text: str


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--mlruns", metavar="DIR", default="mlruns", help="folder of run output; default is mlruns")


def main(args: argparse.Namespace) -> int:
    findings = [*_python(), *_packages(), *_devices(), *_data(args), *_runs(Path(args.mlruns)), *_plugins(args)]
    bad = sum(f.state == "bad" for f in findings)
    emit(args, {"ok": not bad, "findings": [asdict(f) for f in findings]})
    if not args.json:
        print(table([[f.state, f.topic, f.text] for f in findings]))
        print(f"\n{bad or 'no'} problem{'' if bad == 1 else 's'} found")
    return FAILED if bad else DONE


def _python() -> list[Finding]:
    text = f"{platform.python_version()} at {sys.executable}"
    state = "ok" if sys.version_info >= (3, 11) else "bad"
    return [Finding("python", state, text if state == "ok" else f"{text}; expected 3.11 or newer")]


def _packages() -> list[Finding]:
    found = []
    for name in ("cmoe", *PACKAGES):
        try:
            found.append(Finding(name, "ok", version(name)))
        except PackageNotFoundError:
            found.append(Finding(name, "bad", "not installed; `make setup` or `pip install cmoe` installs it"))
    for name in IMPORTED:
        try:
            import_module(name)
        except Exception as e:  # whatever a package's own start-up raises is the finding
            found.append(Finding(name, "bad", f"does not import: {first_line(e)}"))
    return found


def _devices() -> list[Finding]:
    try:
        import torch
    except Exception:
        return []  # reported above
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [Finding("threads", "ok", f"{torch.get_num_threads()} used by torch, {cores} cores")]
    names = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    found.append(Finding("devices", "ok", ", ".join(["cpu", *names])))
    return found


def _data(args: argparse.Namespace) -> list[Finding]:
    folder = data(args)
    if not folder.root.is_dir():
        text = f"{folder.root} ({folder.origin}) is not there; data sets are downloaded into it when needed"
        return [Finding("data", "note", text)]
    there = [name for name, places in DATA.items() if folder.first(*places)]
    absent = [name for name in DATA if name not in there]
    text = f"{folder.root} ({folder.origin}): {', '.join(there) or 'no known data set'}"
    return [Finding("data", "ok" if there else "note", text + (f"; not there: {', '.join(absent)}" if absent else ""))]


def _runs(root: Path) -> list[Finding]:
    found = []
    here = root if root.exists() else Path()
    free = shutil.disk_usage(here).free
    state = "ok" if free > _SPACE else "bad"
    found.append(Finding("disk", state, f"{free / 2**30:.1f} GiB free for {root.absolute()}"))
    if root.exists() and not os.access(root, os.W_OK):
        found.append(Finding("mlruns", "bad", f"{root} cannot be written"))
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        found.append(Finding("tracking", "note", "MLFLOW_TRACKING_URI is set; runs are sent there"))
    database = root / "mlflow.db"
    runs = sorted(p for p in (root / "runs").glob("*") if p.is_dir()) if (root / "runs").is_dir() else []
    if not database.exists():
        found.append(Finding("mlruns", "note", f"{len(runs)} runs, no database yet; the first run makes it"))
        return found
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=2)) as db:
            healthy = db.execute("pragma quick_check").fetchone()[0] == "ok"
            count = db.execute("select count(*) from runs").fetchone()[0]
        found.append(
            Finding("mlruns", "ok" if healthy else "bad", f"{len(runs)} run folders, {count} runs in {database}")
        )
    except sqlite3.Error as e:
        found.append(Finding("mlruns", "bad", f"{database}: {e}"))
    return found


def _plugins(args: argparse.Namespace) -> list[Finding]:
    try:
        known = catalogue(args)
        counts = ", ".join(f"{len(known.entries(k))} {k}" for k in KINDS)
    except UserError as e:
        return [Finding("plugins", "bad", str(e))]
    broken = [Finding("plugin", "bad", f"{path}: {reason}") for path, reason in known.broken]
    return [Finding("components", "ok", counts), *broken]
