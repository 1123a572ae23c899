"""The MoE layer's time against its number of experts, beside what the memory allows, and what frozen experts save.

    python benchmarks/moe_scale.py [--json] [--repeats N] [--figure FILE] [--experts 8 16 ...] [--shape T,D,H,K]
                                   [--frozen E,T,D,H,K] [--dtype float32|bfloat16] [--device cpu|cuda]

Forward and backward in one process and one thread, GELU experts, tokens and experts per token fixed, medians of
alternations. Three lines beside ours:

- balanced: the same experts as batched products without routing (`moe_layer.py`).
- memory traffic: every operand of every step moved once, above all the weights, read twice, and their gradients,
  written once; at the bandwidth of a large copy on this machine.
- products: the FLOPs at the rate of a large matrix product on this machine.

Frozen: the oldest experts are frozen, tokens still go to all. Forward and backward alone, and with a step of Adam.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import measure
import torch
from moe_layer import Contestant, Shape, balanced, cmoe, our_layer, shape, weights_of
from torch import Tensor

from cmoe.moe import keep_memory

EXPERTS = (8, 16, 32, 64, 128, 256, 512, 1024)
SHAPE = (2048, 128, 256, 2)
FROZEN = Shape(256, 2048, 128, 256, 2)
SHARES = (0.5, 0.9, 1.0)
BARS = {"forward + backward": 0.8, "forward + backward + Adam": 0.6}  # of the same with none frozen, at 90 %


def tokens(s: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A batch, the same each time."""
    return torch.randn(s.tokens, s.dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def product_rate(dtype: torch.dtype, device: torch.device, size: int = 1024, repeats: int = 7) -> float:
    """FLOP/s of a square matrix product at its fastest: a floor is what the machine can do."""
    a = torch.randn(size, size).to(device, dtype)
    return 2 * size**3 / min(measure.seconds(lambda: a @ a, device) for _ in range(repeats))


def scale(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """A row per number of experts."""
    rate, band = product_rate(dtype, device), measure.bandwidth(device)
    rows = []
    for n in args.experts:
        s = Shape(n, *args.shape)
        print(f"{n} experts", file=sys.stderr)
        x = tokens(s, dtype, device)
        runs = {"cmoe": cmoe(our_layer(s, False, x), s, False, x), "balanced": balanced(s, False, x)}
        for run in runs.values():
            run()
        times = measure.medians(measure.alternate(runs, device, args.repeats))
        ours = runs["cmoe"]
        weights = 3 * n * weights_of(s, False) * dtype.itemsize
        rows.append(
            {
                "experts": n,
                "cmoe_ms": times["cmoe"] * 1e3,
                "balanced_ms": times["balanced"] * 1e3,
                "memory_ms": ours.moved / band * 1e3,
                "products_ms": ours.flops / rate * 1e3,
                "peak_mib": measure.peak_memory(ours, ours.clear, device) / measure.MIB,
                "gflop": ours.flops / 1e9,
                "moved_mb": ours.moved / 1e6,
                "weights_mb": weights / 1e6,
                "gb_per_s": band / 1e9,
                "gflop_per_s": rate / 1e9,
            }
        )
    return rows


class Step:
    """A contestant's pass, followed by a step of Adam."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        # a step so small that the routing stays what it is
        self.optimizer = torch.optim.Adam(contestant.parameters, lr=1e-8) if contestant.parameters else None

    def __call__(self) -> None:
        self.contestant()
        if self.optimizer is not None:
            self.optimizer.step()


def frozen(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """A row per share of frozen experts and kind of pass."""
    s, x = args.frozen, tokens(args.frozen, dtype, device)
    contestants = {}
    for share in (0.0, *SHARES):
        layer = our_layer(s, False, x)
        layer.freeze(range(round(share * s.experts)))
        contestants[share] = cmoe(layer, s, False, x)
    rows = []
    passes = {
        "forward + backward": contestants,
        "forward + backward + Adam": {share: Step(contestant) for share, contestant in contestants.items()},
    }
    for what, of_share in passes.items():
        print(f"frozen: {what}", file=sys.stderr)
        runs = {f"{share:.0%}": run for share, run in of_share.items()}
        for run in runs.values():
            run()
        times = measure.medians(measure.alternate(runs, device, args.repeats))
        for share, contestant in contestants.items():
            name, bar = f"{share:.0%}", BARS[what] if share == 0.9 else None
            ratio = times[name] / times["0%"]
            rows.append(
                {
                    "what": what,
                    "frozen": share,
                    "ms": times[name] * 1e3,
                    "ratio": ratio,
                    "bar": bar,
                    "ok": None if bar is None else ratio <= bar,
                    "peak_mib": measure.peak_memory(of_share[share], contestant.clear, device) / measure.MIB,
                    "trained_parameters": sum(p.numel() for p in contestant.parameters),
                }
            )
    return rows


def draw(rows: Sequence[dict[str, Any]], about: str, path: Path) -> None:
    """Time against the number of experts, both on logarithmic axes."""
    from cmoe.tracking.figures import style

    figure = style.canvas(7, 4.6)
    ax = style.axes(figure)
    lines = {"cmoe_ms": "cmoe", "balanced_ms": "balanced product, no routing", "memory_ms": "floor: memory traffic", "products_ms": "floor: products"}  # fmt: skip
    for k, (key, label) in enumerate(lines.items()):
        measured = key in ("cmoe_ms", "balanced_ms")
        ax.plot(
            [r["experts"] for r in rows],
            [r[key] for r in rows],
            color=style.colour(k),
            marker=style.marker(k) if measured else None,
            linestyle="-" if measured else "--",
            label=label,
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")
    ax.set_xticks([r["experts"] for r in rows], [str(r["experts"]) for r in rows])
    ax.set_xlabel("experts")
    ax.set_ylabel("forward + backward, ms")
    ax.legend(frameon=False, fontsize=9)
    style.title(ax, "Time against the number of experts", about)
    path.write_bytes(style.png(figure))


def shown(rows: list[dict[str, Any]], saved: list[dict[str, Any]], s: Shape) -> str:
    """Both as Markdown tables."""
    body = [
        [str(r["experts"]), *(f"{r[k]:.1f}" for k in ("cmoe_ms", "balanced_ms", "memory_ms", "products_ms")),
         f"{r['cmoe_ms'] / r['balanced_ms']:.2f}", f"{r['peak_mib']:.0f}", f"{r['gflop']:.2f}", f"{r['moved_mb']:.0f}"]
        for r in rows
    ]  # fmt: skip
    head = [
        "experts",
        "cmoe ms",
        "balanced ms",
        "memory ms",
        "products ms",
        "x balanced",
        "peak MiB",
        "GFLOP",
        "MB moved",
    ]
    further = [
        [r["what"], f"{r['frozen']:.0%}", f"{r['ms']:.1f}", f"{r['ratio']:.2f}", f"{r['peak_mib']:.0f}",
         f"{r['trained_parameters'] / 1e6:.2f}", "" if r["bar"] is None else f"<= {r['bar']}",
         {None: "", True: "met", False: "missed"}[r["ok"]]]
        for r in saved
    ]  # fmt: skip
    below = ["", "frozen", "ms", "x none frozen", "peak MiB", "M trained", "bar", ""]
    return f"{measure.table(body, head)}\n\n{s}:\n\n{measure.table(further, below)}"


def four(text: str) -> tuple[int, int, int, int]:
    """T,D,H,K.

    Raises:
        argparse.ArgumentTypeError: it is anything else.
    """
    try:
        t, d, h, k = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected T,D,H,K as in 2048,128,256,2, got {text!r}") from None
    return t, d, h, k


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--repeats", type=int, default=21, help="alternations")
    parser.add_argument("--figure", type=Path, help="PNG file for time against the number of experts")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--shape", type=four, default=SHAPE, metavar="T,D,H,K", help="of the scale")
    parser.add_argument("--frozen", type=shape, default=FROZEN, metavar="E,T,D,H,K", help="of the frozen experts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    measure.add_malloc(parser)
    args = parser.parse_args(argv)
    rows_in_all = args.shape[0] * args.shape[3]
    uneven = [n for n in args.experts if n < args.shape[3] or rows_in_all % n]
    if uneven:
        parser.error(f"--experts: expected at least K and divisors of T·K = {rows_in_all}, got {uneven}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that torch can use")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.malloc == "kept":
        keep_memory()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rows, saved = scale(args, dtype, device), frozen(args, dtype, device)
    where = measure.machine(device, args.malloc)
    if args.figure is not None:
        t, d, h, k = args.shape
        draw(rows, f"{t} tokens, dimension {d}, {h} hidden units, top-{k}, {args.dtype}\n{where}", args.figure)
    if args.json:
        document = {
            "machine": where,
            "repeats": args.repeats,
            "dtype": args.dtype,
            "shape": list(args.shape),
            "rows": rows,
        }
        print(json.dumps(document | {"frozen_shape": list(args.frozen), "frozen": saved}, indent=1))
    else:
        print(f"{where}; medians of {args.repeats} alternations, {args.dtype}\n\n{shown(rows, saved, args.frozen)}")


if __name__ == "__main__":
    main()
