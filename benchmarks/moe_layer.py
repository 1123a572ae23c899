"""The MoE layer beside a balanced product without routing, a dense layer, transformers and st-moe-pytorch.

    python benchmarks/moe_layer.py [--json] [--repeats N] [--shapes E,T,D,H,K ...] [--dtypes float32 bfloat16]
                                   [--ffn gelu swiglu] [--paths grouped loop bmm] [--at-most SECONDS]
                                   [--device cpu|cuda] [--malloc kept]

Forward and backward of one layer, the gradients of input and weights included, in one process and one thread; the
contestants alternate and medians are compared. E experts, T tokens, model dimension D, H hidden units, top-K.

- `cmoe`: the whole layer by default options: routing, dispatch, experts, the load balance loss.
- `balanced`: the same experts as batched products, T·K/E rows each, without any routing: the practical floor.
- `dense`: one FFN of K·H hidden units on all tokens, the same FLOPs.
- `transformers ...`: Mixtral's block with the very weights of `cmoe`, by each implementation of its experts; those whose
  first passes are far from the best one's are not measured further. The outputs are compared before anything is timed.
- `st-moe-pytorch`: its layer with the same experts and a capacity factor of K, so that it computes as many rows; in
  sequences of 256 tokens, or more where its least capacity of 4 would make it compute more rows. In bfloat16 under
  autocast, which it needs.
- on a GPU also MegaBlocks' dropless layer and ScatterMoE, where they are installed.

GELU experts have biases, SwiGLU experts have none (as transformers'). FLOPs and bytes are formulas: matrix products
only, and every operand of every step moved once. A processor without bfloat16 instructions takes 20 to 50 times as long
in that type: what would take longer than --at-most is left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which records memory, tells of every start and stop

import measure
import torch
import torch.nn.functional as F
from measure import MIB
from torch import Tensor, nn

from cmoe.moe import MoELayer, keep_memory

Output = tuple[Tensor, "Tensor | None"]  # what the next layer gets, and what is added to the loss


class Shape(NamedTuple):
    """E experts, T tokens, D dimensions, H hidden units, K experts per token."""

    experts: int
    tokens: int
    dim: int
    hidden: int
    k: int

    def __str__(self) -> str:
        return ", ".join(map(str, self))

    @property
    def rows(self) -> int:
        """Token-expert pairs."""
        return self.tokens * self.k

    @property
    def sequence(self) -> int:
        """Tokens per sequence for st-moe-pytorch, a divisor of T where 256 or the next power of 2 is one."""
        length = 256
        while length * self.k < 4 * self.experts:
            length *= 2
        return length if self.tokens % length == 0 else self.tokens


SHAPES = (
    Shape(64, 2048, 128, 512, 2),
    Shape(256, 2048, 128, 256, 2),
    Shape(8, 8192, 192, 768, 2),
    Shape(8, 512, 128, 512, 2),
    Shape(16, 4096, 256, 512, 1),
    Shape(32, 2048, 256, 512, 4),
    Shape(64, 256, 128, 512, 2),
)
GPU_SHAPES = (
    *SHAPES[:3],
    Shape(8, 16384, 1024, 3584, 2),
    Shape(64, 16384, 2048, 1024, 8),
    Shape(128, 16384, 2048, 768, 8),
    Shape(256, 16384, 1024, 512, 8),
)


@dataclass
class Contestant:
    """One way to compute the layer.

    Attributes:
        forward: input to output and auxiliary loss.
        x: its input, a leaf that wants a gradient.
        parameters: whose gradients are computed too.
        flops: of forward and backward, in matrix products.
        moved: bytes that forward and backward move, each operand of each step once.
    """

    forward: Callable[[Tensor], Output]
    x: Tensor
    parameters: list[nn.Parameter]
    flops: int
    moved: int
    gradient: Tensor = field(init=False)

    def __post_init__(self) -> None:
        with torch.no_grad():
            y, _ = self.forward(self.x)
        self.gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)

    def clear(self) -> None:
        """Let go of the gradients."""
        self.x.grad = None
        for p in self.parameters:
            p.grad = None

    def __call__(self) -> None:
        """One forward and backward with new gradients."""
        self.clear()
        y, extra = self.forward(self.x)
        if extra is None:
            y.backward(self.gradient)
        else:
            torch.autograd.backward((y, extra), (self.gradient, None))


# -- formulas ---------------------------------------------------------------------------------------------------------


def expert_flops(rows: int, s: Shape, gated: bool, hidden: int = 0) -> int:
    """Forward, the inputs' and the weights' gradients of both linear maps on so many rows."""
    hidden = hidden or s.hidden
    return 3 * 2 * rows * s.dim * hidden * (3 if gated else 2)


def expert_elements(rows: int, s: Shape, gated: bool, weights: int, hidden: int = 0) -> int:
    """Elements moved for the experts alone, with `weights` elements of weights read twice and their gradients written."""
    hidden = hidden or s.hidden
    inner = 2 * hidden if gated else hidden
    first, second, activation = s.dim + inner, hidden + s.dim, inner + hidden
    forward = first + activation + second
    backward = 2 * second + (2 * inner + hidden) + 2 * first  # each map: the input's gradient and the weights'
    return 3 * weights + rows * (forward + backward)


def routing_elements(s: Shape) -> int:
    """Elements moved for scores, for gathering rows and for their weighted sum."""
    scores = 3 * (s.tokens * s.dim + s.experts * s.dim + s.tokens * s.experts)
    gather = 2 * s.rows * s.dim + s.rows * s.dim + s.tokens * s.dim
    combine = s.rows * s.dim + s.tokens * s.dim + s.tokens * s.dim + 2 * s.rows * s.dim
    return scores + gather + combine


def weights_of(s: Shape, gated: bool) -> int:
    """Elements of one expert's weights."""
    return s.dim * s.hidden * (3 if gated else 2)


def whole_layer(s: Shape, gated: bool, dtype: torch.dtype) -> tuple[int, int]:
    """FLOPs and bytes of a layer that computes each token-expert pair once."""
    flops = expert_flops(s.rows, s, gated) + 3 * 2 * s.tokens * s.dim * s.experts
    elements = expert_elements(s.rows, s, gated, s.experts * weights_of(s, gated)) + routing_elements(s)
    return flops, elements * dtype.itemsize


# -- contestants ------------------------------------------------------------------------------------------------------


def activate(h: Tensor, gated: bool) -> Tensor:
    """What stands between the two linear maps."""
    if not gated:
        return F.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def leaf(x: Tensor) -> Tensor:
    """A copy that wants a gradient."""
    return x.detach().clone().requires_grad_()


def our_layer(s: Shape, gated: bool, like: Tensor, path: str = "auto") -> MoELayer:
    """The layer of this package by default options, with the same weights each time."""
    torch.manual_seed(0)
    expert = {"name": "ffn", "activation": "swiglu", "bias": False} if gated else {"name": "ffn"}
    router = {"name": "topk", "k": s.k}
    layer = MoELayer(s.dim, s.hidden, experts=s.experts, expert=expert, router=router, dispatch=path)  # ty: ignore[invalid-argument-type]
    return layer.to(like)


def cmoe(layer: MoELayer, s: Shape, gated: bool, x: Tensor) -> Contestant:
    """Our layer as a contestant: what is not frozen gets a gradient."""

    def forward(x_TD: Tensor) -> Output:
        y, routing = layer(x_TD)
        return y, sum(routing.aux.values()) if routing.aux else None  # ty: ignore[invalid-return-type]

    parameters = [p for p in layer.parameters() if p.requires_grad]
    return Contestant(forward, leaf(x), parameters, *whole_layer(s, gated, x.dtype))


def drawn(x: Tensor, fan_in: int, *shape: int) -> nn.Parameter:
    """A parameter as `nn.Linear` draws it."""
    return nn.Parameter((torch.rand(shape, device=x.device) * 2 - 1).div(fan_in**0.5).to(x))


def balanced(s: Shape, gated: bool, x: Tensor) -> Contestant:
    """The floor: every expert gets the same number of rows, and nobody asks which."""
    if s.rows % s.experts:
        raise ValueError(f"expected T·K to be a multiple of E, got {s}")
    inner = 2 * s.hidden if gated else s.hidden
    w1, w2 = drawn(x, s.dim, s.experts, s.dim, inner), drawn(x, s.hidden, s.experts, s.hidden, s.dim)
    b1, b2 = drawn(x, s.dim, s.experts, 1, inner), drawn(x, s.hidden, s.experts, 1, s.dim)
    rows_ECD = x.repeat_interleave(s.k, 0).view(s.experts, s.rows // s.experts, s.dim)

    def forward(x_ECD: Tensor) -> Output:
        if gated:
            return torch.bmm(activate(torch.bmm(x_ECD, w1), True), w2), None
        return torch.baddbmm(b2, activate(torch.baddbmm(b1, x_ECD, w1), False), w2), None

    moved = expert_elements(s.rows, s, gated, s.experts * weights_of(s, gated)) * x.dtype.itemsize
    parameters = [w1, w2] if gated else [w1, w2, b1, b2]
    return Contestant(forward, leaf(rows_ECD), parameters, expert_flops(s.rows, s, gated), moved)


def dense(s: Shape, gated: bool, x: Tensor) -> Contestant:
    """One FFN of K·H hidden units."""
    hidden = s.k * s.hidden
    first = nn.Linear(s.dim, 2 * hidden if gated else hidden, bias=not gated).to(x)
    second = nn.Linear(hidden, s.dim, bias=not gated).to(x)

    def forward(x_TD: Tensor) -> Output:
        return second(activate(first(x_TD), gated)), None

    moved = expert_elements(s.tokens, s, gated, s.k * weights_of(s, gated), hidden) * x.dtype.itemsize
    parameters = [*first.parameters(), *second.parameters()]
    return Contestant(forward, leaf(x), parameters, expert_flops(s.tokens, s, gated, hidden), moved)


def transformers(s: Shape, x: Tensor, ours: MoELayer, implementation: str, limit: float) -> Contestant | str:
    """Mixtral's block with our weights; or why not."""
    flops, moved = whole_layer(s, True, x.dtype)
    if implementation == "batched_mm":
        # a copy of its expert's weights for every row: gathered, read, multiplied, and their gradients added up
        copies = s.rows * weights_of(s, True) * x.dtype.itemsize
        if copies > limit * 2**30:
            return f"would copy {copies / 2**30:.1f} GiB of weights, more than --memory {limit:g}"
        moved += 7 * copies
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=s.dim, intermediate_size=s.hidden, num_local_experts=s.experts, num_experts_per_tok=s.k
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config).to(x)
    cohort = ours.cohorts["0"]
    with torch.no_grad():
        block.gate.weight.copy_(ours.router.columns["0"].weight)
        block.experts.gate_up_proj.copy_(cohort.get_parameter("w1").mT)
        block.experts.down_proj.copy_(cohort.get_parameter("w2").mT)

    def forward(x_TD: Tensor) -> Output:
        return block(x_TD.unsqueeze(0)).squeeze(0), None

    return Contestant(forward, leaf(x), list(block.parameters()), flops, moved)


def st_moe(s: Shape, x: Tensor) -> Contestant | str:
    """st-moe-pytorch's layer with GELU experts; or why not."""
    if s.k < 2:
        return "takes at least two experts per token"
    from st_moe_pytorch import MoE

    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(s.dim, s.hidden), nn.GELU(), nn.Linear(s.hidden, s.dim)) for _ in range(s.experts)
    )
    factor = float(s.k)
    layer = MoE(s.dim, s.experts, gating_top_n=s.k, capacity_factor_train=factor, experts=experts).to(x)
    length = s.sequence
    low = x.dtype != torch.float32

    def forward(x_TD: Tensor) -> Output:
        with torch.autocast(x.device.type, x.dtype, enabled=low):
            out = layer(x_TD.view(-1, length, s.dim))
        return out.outputs.view(-1, s.dim), out.total_aux_loss.sum()

    room = max(4, min(length, length * s.k // s.experts))
    slots = s.tokens // length * s.experts * room
    products = 2 * 3 * 2 * slots * length * s.dim  # one-hot products to and from the experts
    flops = expert_flops(slots, s, False) + products + 3 * 2 * s.tokens * s.dim * s.experts
    elements = expert_elements(slots, s, False, s.experts * weights_of(s, False))
    elements += 3 * (s.tokens * s.dim + slots * s.dim) * 2 + 6 * slots * length
    return Contestant(forward, leaf(x), list(layer.parameters()), flops, elements * x.dtype.itemsize)


def megablocks(s: Shape, x: Tensor) -> Contestant | str:
    """MegaBlocks' dropless layer with SwiGLU experts; or why not."""
    try:
        from megablocks.layers.arguments import Arguments  # ty: ignore[unresolved-import]
        from megablocks.layers.dmoe import dMoE  # ty: ignore[unresolved-import]
        from megablocks.layers.moe import clear_load_balancing_loss  # ty: ignore[unresolved-import]
    except ImportError as e:
        return f"does not import: {e}"
    options = Arguments(
        hidden_size=s.dim,
        ffn_hidden_size=s.hidden,
        moe_num_experts=s.experts,
        moe_top_k=s.k,
        moe_normalize_expert_weights=1,
        moe_loss_weight=0.0,
        mlp_type="glu",
        mlp_impl="grouped" if find_spec("grouped_gemm") else "sparse",
        activation_fn=F.silu,
        bias=False,
        return_bias=False,
        bf16=x.dtype == torch.bfloat16,
        fp16=False,
        device=x.device,
    )
    layer = dMoE(options).to(x)

    def forward(x_TD: Tensor) -> Output:
        clear_load_balancing_loss()  # it would keep every pass's
        out = layer(x_TD.unsqueeze(1))
        return (out[0] if isinstance(out, tuple) else out).squeeze(1), None

    return Contestant(forward, leaf(x), list(layer.parameters()), *whole_layer(s, True, x.dtype))


def scattermoe(s: Shape, x: Tensor, ours: MoELayer) -> Contestant | str:
    """ScatterMoE's SwiGLU experts behind Mixtral's rule with our router's weights; or why not."""
    try:
        from scattermoe.mlp import GLUMLP  # ty: ignore[unresolved-import]
    except ImportError as e:
        return f"does not import: {e}"
    experts = GLUMLP(s.dim, s.hidden, s.experts, s.k, activation=nn.SiLU()).to(x)
    columns = nn.Parameter(ours.router.columns["0"].get_parameter("weight").detach().clone())

    def forward(x_TD: Tensor) -> Output:
        values, ids = F.linear(x_TD, columns).float().topk(s.k)
        return experts(x_TD, values.softmax(-1).to(x_TD.dtype), ids), None

    return Contestant(forward, leaf(x), [columns, *experts.parameters()], *whole_layer(s, True, x.dtype))


# -- comparison -------------------------------------------------------------------------------------------------------


def same(name: str, ours: MoELayer, other: Contestant, x: Tensor) -> None:
    """Refuse to time two things that do not compute the same."""
    with torch.no_grad():
        expected, got = ours(x)[0], other.forward(x)[0]
    if not torch.allclose(expected, got, rtol=1e-3, atol=1e-4):
        raise RuntimeError(f"{name}: outputs differ from ours by {(expected - got).abs().max():.2g}")


def contestants(
    s: Shape, gated: bool, x: Tensor, paths: Sequence[str], limit: float
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Who takes part, and who does not with the reason."""
    layer = our_layer(s, gated, x)
    runs = {"cmoe": cmoe(layer, s, gated, x), "balanced": balanced(s, gated, x), "dense": dense(s, gated, x)}
    runs |= {f"cmoe {path}": cmoe(our_layer(s, gated, x, path), s, gated, x) for path in paths}
    peers: dict[str, Callable[[], Contestant | str]] = {}
    if gated:
        for kind in ("eager", "batched_mm", "grouped_mm"):
            peers[f"transformers {kind}"] = lambda kind=kind: transformers(s, x, layer, kind, limit)
        if x.device.type == "cuda":
            peers |= {"megablocks": lambda: megablocks(s, x), "scattermoe": lambda: scattermoe(s, x, layer)}
    else:
        peers["st-moe-pytorch"] = lambda: st_moe(s, x)
    left_out: dict[str, str] = {}
    for name, make in peers.items():
        try:
            made = make()
            if not isinstance(made, str):
                made()
        except Exception as e:  # a peer that fails is a result, not the end
            made = f"{type(e).__name__}: {str(e).split(chr(10), 1)[0]}"
        if isinstance(made, str):
            left_out[name] = made
            continue
        if name.startswith("transformers") and x.dtype == torch.float32:
            same(name, layer, made, x)
        runs[name] = made
    return runs, left_out


def measured(s: Shape, gated: bool, dtype: torch.dtype, args: argparse.Namespace) -> tuple[list[dict[str, Any]], ...]:
    """Rows and bars of one shape, type and kind of FFN."""
    device = torch.device(args.device)
    x = torch.randn(s.tokens, s.dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    about = {"shape": list(s), "dtype": str(dtype).removeprefix("torch."), "ffn": "swiglu" if gated else "gelu"}
    floor = balanced(s, gated, x)
    floor()
    expected = measure.seconds(floor, device) * args.repeats * (5 + len(args.paths)) * 1.2
    if expected > args.at_most:
        reason = f"would take about {expected / 60:.0f} minutes on this machine, more than --at-most {args.at_most:g} s"
        return [about | {"contestant": "all", "left_out": reason}], []
    runs, left_out = contestants(s, gated, x, args.paths, args.memory)
    for run in runs.values():
        run()
    family = {name: measure.seconds(run, device) for name, run in runs.items() if name.startswith("transformers")}
    for name, first in family.items():
        if first > args.patience * min(family.values()):
            left_out[name] = f"{first * 1e3:.1f} ms in the second pass, {first / min(family.values()):.1f} x the best"
            del runs[name]
    times = measure.medians(measure.alternate(runs, device, args.repeats))
    rows = [
        about
        | {
            "contestant": name,
            "ms": times[name] * 1e3,
            "to_balanced": times[name] / times["balanced"],
            "peak_mib": measure.peak_memory(run, run.clear, device) / MIB,
            "gflop": run.flops / 1e9,
            "moved_mb": run.moved / 1e6,
        }
        for name, run in runs.items()
    ]
    rows += [about | {"contestant": name, "left_out": reason} for name, reason in left_out.items()]
    bars: list[dict[str, Any]] = []

    def bar(what: str, ratio: float, ok: bool, bound: str) -> None:
        bars.append(about | {"what": what, "ratio": ratio, "bar": bound, "ok": ok})

    own = times["cmoe"]
    bar("time over the balanced product", own / times["balanced"], own <= 1.2 * times["balanced"], "<= 1.2")
    rivals = {name: t for name, t in times.items() if name.startswith("transformers")}
    if rivals:
        best = min(rivals, key=rivals.__getitem__)
        bar(f"time over {best}", own / rivals[best], own <= 1.03 * rivals[best], "<= 1.03")
    if "st-moe-pytorch" in times:
        ratio = times["st-moe-pytorch"] / own
        bar("speed over st-moe-pytorch", ratio, ratio >= 2, ">= 2")
    for name in ("megablocks", "scattermoe"):
        if name in times:
            bar(f"time over {name}", own / times[name], True, "none")
    return rows, bars


def shown(rows: list[dict[str, Any]], bars: list[dict[str, Any]]) -> str:
    """Both as Markdown tables."""

    def about(r: dict[str, Any]) -> list[str]:
        return [str(Shape(*r["shape"])), r["dtype"], r["ffn"]]

    body = [
        [*about(r), r["contestant"], f"{r['ms']:.2f}", f"{r['to_balanced']:.2f}", f"{r['peak_mib']:.1f}",
         f"{r['gflop']:.2f}", f"{r['moved_mb']:.0f}", f"{r['gflop'] / r['ms'] * 1e3:.0f}"]
        for r in rows if "ms" in r
    ]  # fmt: skip
    head = ["E, T, D, H, K", "type", "FFN", "", "ms", "x balanced", "peak MiB", "GFLOP", "MB moved", "GFLOP/s"]
    missing = [f"- {', '.join(about(r))}: {r['contestant']} left out: {r['left_out']}" for r in rows if "left_out" in r]
    verdicts = [[*about(b), b["what"], b["bar"], f"{b['ratio']:.2f}", "met" if b["ok"] else "missed"] for b in bars]
    bounds = measure.table(verdicts, ["E, T, D, H, K", "type", "FFN", "what", "bar", "measured", ""])
    return "\n".join([measure.table(body, head), *(["", *missing] if missing else []), "", bounds])


def shape(text: str) -> Shape:
    """E,T,D,H,K.

    Raises:
        argparse.ArgumentTypeError: it is anything else.
    """
    try:
        made = Shape(*map(int, text.split(",")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected E,T,D,H,K as in 64,2048,128,512,2, got {text!r}") from None
    if min(made) < 1 or made.k > made.experts or made.rows % made.experts:
        raise argparse.ArgumentTypeError(f"expected 1 <= K <= E and T·K a multiple of E, got {text!r}")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--repeats", type=int, default=21, help="alternations")
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="E,T,D,H,K", help="default: those of the results")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: both, on a GPU bfloat16")
    parser.add_argument("--ffn", nargs="+", choices=("gelu", "swiglu"), default=["gelu", "swiglu"])
    parser.add_argument("--paths", nargs="+", default=[], help="ways to dispatch that are shown beside 'auto'")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", type=float, default=2.0, help="GiB that copies of weights may take (batched_mm)")
    parser.add_argument(
        "--at-most",
        type=float,
        default=600.0,
        help="seconds for a shape, type and kind of FFN; longer ones are left out",
    )
    parser.add_argument("--patience", type=float, default=3.0, help="x the best of transformers' that is measured on")
    measure.add_malloc(parser)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that torch can use")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.malloc == "kept":
        keep_memory()
    shapes = args.shapes or (GPU_SHAPES if args.device == "cuda" else SHAPES)
    dtypes = args.dtypes or (["bfloat16"] if args.device == "cuda" else ["float32", "bfloat16"])
    rows: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    for s in shapes:
        for dtype in dtypes:
            for ffn in args.ffn:
                print(f"{s}: {dtype}, {ffn}", file=sys.stderr)
                more, further = measured(s, ffn == "swiglu", getattr(torch, dtype), args)
                rows += more
                bars += further
    where = measure.machine(torch.device(args.device), args.malloc)
    if args.json:
        print(json.dumps({"machine": where, "repeats": args.repeats, "rows": rows, "bars": bars}, indent=1))
    else:
        print(f"{where}; medians of {args.repeats} alternations\n\n{shown(rows, bars)}")


if __name__ == "__main__":
    main()
