"""`cmoe validate`: check a configuration without running anything."""

from __future__ import annotations

import argparse

from cmoe.cli.common import DONE, Parser, catalogue, emit


def add_arguments(parser: Parser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a file, or the name of a configuration that comes with cmoe")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace the file's")
    parser.add_argument("--resolved", action="store_true", help="print the whole configuration, defaults filled in")


def main(args: argparse.Namespace) -> int:
    from cmoe.config.study import read_study

    plans = read_study(args.config, args.overrides, catalogue(args)).plans
    documents = [{"label": p.label, "hash": p.hash, "config": p.to_dict()} for p in plans]
    emit(args, {"valid": True, **documents[0]} if len(plans) == 1 else {"valid": True, "variants": documents})
    if args.json:
        return DONE
    for plan in plans:
        if args.resolved:
            print(plan.to_yaml(), end="" if plan is plans[-1] else "---\n")
            continue
        moe = plan.model["moe"]
        model = plan.model["name"] + (f" with {moe['experts']} experts by {moe['router']['name']}" if moe else "")
        label = f" {plan.label}:" if len(plans) > 1 else ""
        print(f"{args.config}:{label} valid: {plan.strategies} on {plan.stream['name']}, {model}, hash {plan.hash[:6]}")
    return DONE
