"""`cmoe export`: a run's model as safetensors and JSON, and as an MLflow model."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from cmoe.cli.common import DONE, Parser, data, emit


def add_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's id, the beginning of it, its folder, or `last`")
    parser.add_argument("--to", metavar="DIR", help="where to; default is mlruns/exports/<run id>")
    parser.add_argument("--root", metavar="DIR", default="mlruns", help="folder of run output; default is mlruns")


def main(args: argparse.Namespace) -> int:
    from cmoe.rundir import find

    root = Path(args.root)
    folder = find(root, args.run)
    target = Path(args.to) if args.to else root / "exports" / folder.id
    print(f"cmoe: loading run {folder.id}", file=sys.stderr, flush=True)
    from cmoe.export import export
    from cmoe.restored import of_run

    restored = of_run(folder, args.plugins, data(args) if args.data else None)
    written = export(restored, target, args.plugins)
    written["notes"] = [*restored.notes, *written["notes"]]
    for note in written["notes"]:
        print(f"cmoe: {note}", file=sys.stderr)
    emit(args, written)
    if not args.json:
        print(f"weights:  {written['weights']} ({written['parameters']:,} parameters, {_size(written['bytes'])})")
        print(f"config:   {written['config']}")
        print(f"MLflow:   {written['mlflow_model']}")
        print(f"serve it: {_mlflow()} models serve -m {written['mlflow_model']} --env-manager local -p 5001")
    return DONE


def _mlflow() -> str:
    """The command as this shell can call it: MLflow itself looks for its web server on the path."""
    if shutil.which("mlflow") and shutil.which("uvicorn"):
        return "mlflow"
    return f"PATH={Path(sys.executable).parent}:$PATH mlflow"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
