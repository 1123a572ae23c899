"""`cmoe compare`: an experiment's runs beside each other, as a table, a picture and one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from cmoe.cli.common import DONE, Parser, emit


def add_arguments(parser: Parser) -> None:
    parser.add_argument("experiment", metavar="EXPERIMENT", help="its name, as in the configuration")
    parser.add_argument(
        "--baseline", metavar="LABEL", help="what differences refer to; default is `naive` where there is one"
    )
    parser.add_argument("--root", metavar="DIR", default="mlruns", help="folder of run output; default is mlruns")


def main(args: argparse.Namespace) -> int:
    from cmoe.cli.results import show_comparison, write_comparison

    document, picture, report = write_comparison(args.experiment, Path(args.root), args.baseline)
    emit(args, {**document, "picture": str(picture), "report": str(report)})
    if not args.json:
        show_comparison(document, picture, report)
        print(f"MLflow:  cmoe ui {args.experiment}")
    return DONE
