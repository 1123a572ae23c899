"""`cmoe predict`: classes and confidences for images, arrays or texts; bits per byte for language models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cmoe.cli.common import DONE, Parser, data, emit, table

if TYPE_CHECKING:
    from cmoe.predict import Measured, Prediction
    from cmoe.restored import Restored

SHOWN = 50  # rows of the table; --json has them all


def add_arguments(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's id, the beginning of it, its folder, or `last`")
    parser.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="images (0..255 a channel, resized where needed), .npz with an array x (and y: then accuracy is "
        "printed), .txt with one text a line; for a byte language model any file",
    )
    parser.add_argument("--task", metavar="TASK", help="name or number of the experience that the inputs belong to")
    parser.add_argument("--top", metavar="K", type=int, default=1, help="the K most probable classes; default is 1")
    parser.add_argument("--root", metavar="DIR", default="mlruns", help="folder of run output; default is mlruns")


def main(args: argparse.Namespace) -> int:
    from cmoe.errors import UserError
    from cmoe.rundir import find

    if args.top < 1:
        raise UserError(f"--top: expected an integer >= 1, got {args.top}")
    folder = find(Path(args.root), args.run)
    for file in args.files:  # before torch is imported
        if not Path(file).exists():
            raise UserError(f"{file}: no such file")
    print(f"cmoe: loading run {folder.id}", file=sys.stderr, flush=True)
    from cmoe import predict
    from cmoe.restored import of_run

    restored = of_run(folder, args.plugins, data(args) if args.data else None)
    task = restored.task(args.task)
    notes = list(restored.notes)
    if task is not None and task not in restored.state["learned"]:
        notes.append(f"task {restored.stream.experiences[task].name} was not learned by this run yet")
    result: dict = {"run": folder.id, "task": None if task is None else restored.stream.experiences[task].name}
    if restored.stream.language:
        measured = predict.measure(restored, args.files, task)
        result["files"] = [vars(m) for m in measured]
        shown = _measured(measured)
    else:
        predictions = predict.classify(restored, args.files, task, args.top, notes.append)
        share = predict.accuracy(predictions)
        if task is not None:
            notes += _strangers(predictions, restored, task)
        result["predictions"] = list(predict.documents(predictions, restored.class_names))
        result |= {} if share is None else {"accuracy": share}
        shown = _predictions(predictions, restored, share)
    for note in notes:
        print(f"cmoe: {note}", file=sys.stderr)
    emit(args, {**result, "notes": notes})
    if not args.json:
        print(shown)
    return DONE


def _strangers(found: list[Prediction], restored: Restored, task: int) -> list[str]:
    """A line where inputs are of classes that the task does not have: they cannot be right."""
    experience = restored.stream.experiences[task]
    count = sum(p.target is not None and p.target not in experience.classes for p in found)
    return [f"{count} of the inputs are of classes that task {experience.name} does not have"] if count else []


def _measured(found: list[Measured]) -> str:
    rows = [["file", "bytes", "bits per byte", "right next bytes"]]
    rows += [[m.input, f"{m.bytes:,}", f"{m.bits_per_byte:.3f}", f"{100 * m.accuracy:.1f} %"] for m in found]
    return table(rows)


def _predictions(found: list[Prediction], restored: Restored, share: float | None) -> str:
    names = restored.class_names
    known = any(p.target is not None for p in found)
    more = max((len(p.top) for p in found), default=1) > 1
    rows = [["input", "class", "id", "confidence", *(["is"] if known else []), *(["then"] if more else [])]]
    for p in found[:SHOWN]:
        best, confidence = p.top[0]
        row = [p.input, names[best], str(best), _percent(confidence)]
        if known:
            row.append("" if p.target is None else "right" if p.target == best else f"wrong: {names[p.target]}")
        if more:
            row.append(", ".join(f"{names[c]} {_percent(s)}" for c, s in p.top[1:]))
        rows.append(row)
    lines = [table(rows)]
    if len(found) > SHOWN:
        lines.append(f"... and {len(found) - SHOWN} more (--json has them all)")
    if share is not None:
        count = sum(p.target is not None for p in found)
        lines.append(f"\naccuracy {100 * share:.1f} % of {count} input{'s' * (count > 1)}")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
