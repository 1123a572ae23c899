"""From dense to experts: copies of a feed-forward network (sparse upcycling), or parts of it (MoEfication).

Sparse upcycling: Komatsuzaki et al. 2022, https://arxiv.org/abs/2212.05055. Experts that are copies, with weights that sum
to 1, are the dense network exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn

from cmoe.moe.dispatch import Path
from cmoe.moe.kinds import Spec
from cmoe.moe.layer import MoELayer
from cmoe.moe.merging import fill, summed
from cmoe.moe.optimizer import ParameterChange, Part, Row
from cmoe.moe.surgery import split as splitting
from cmoe.moe.surgery.bare import Bare
from cmoe.moe.surgery.dense import Dense
from cmoe.moe.surgery.forms import Form, linear_form, recognise
from cmoe.moe.surgery.place import Routers, replace
from cmoe.moe.surgery.report import Seeded, Surgery, home, unseeded

Where = str | Sequence[str] | Callable[[str, nn.Module], bool]
SPLIT = {"name": "dense", "init_std": 0.0}  # all experts with equal weights: their sum is the network that was split


def dense_networks(model: nn.Module) -> dict[str, Form]:
    """The feed-forward networks of a model that can become experts, by name, in the order of depth.

    A backbone with a method `dense_places()` says itself where they are: a mapping of names to the activation that it
    applies to a linear layer's output, or None for a whole network.
    """
    root = home(model)
    found: dict[str, Form] = {}
    declared = getattr(root, "dense_places", None)
    if callable(declared):
        places: Mapping[str, str | None] = declared()
        for name, module in root.named_modules():
            if name not in places or _inside(root, name):
                continue
            activation = places[name]
            form = _form(module) if activation is None else linear_form(module, activation)
            if form is not None:
                found[name] = form
        return found
    for name, module in root.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found) or _inside(root, name)
        if name and not inside and not isinstance(module, MoELayer | Bare) and (form := _form(module)) is not None:
            found[name] = form
    return found


def _inside(root: nn.Module, name: str) -> bool:
    """Whether a module is part of a layer of experts, or of what one became."""
    parts = name.split(".")[:-1]
    outer = (root.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts)))
    return any(isinstance(module, MoELayer | Dense) for module in outer)


def _form(module: nn.Module) -> Form | None:
    if isinstance(module, Dense):
        what = module.described
        if what["expert"] is None or module.shared is not None or module.base is not None:
            return None
        rows: dict[str, Row] = {name: (Part(p, 0),) for name, p in module.expert.named_parameters()}
        return Form(
            what["expert"], what["dim"], what["hidden"], what["out_dim"], rows, module.channels_first, what["after"]
        )
    return recognise(module)


def upcycle(
    model: nn.Module,
    experts: int = 4,
    router: Spec | None = None,
    *,
    where: Where = "all",
    noise: float = 0.0,
    split: bool = False,
    dispatch: Path = "auto",
    seeded: Seeded = unseeded,
    generator: torch.Generator | None = None,
) -> Surgery:
    """Make layers of experts of a model's feed-forward networks.

    Each expert is a copy. Where the router's weights sum to 1 (`topk`: yes) the model computes the same as before, up to
    rounding; each copy learns from its own tokens from then on. A model whose blocks call `mlp(x)` and expect a tensor (a
    bare timm or transformers model) gets layers that do just that; hear what they decide by `routings`. The state of an
    optimizer is copied along.

    Args:
        model: a model of cmoe, or any module with feed-forward networks inside: timm's `Mlp` in any of its forms without
            a norm, gated ones (SwiGLU), those of transformers, `nn.Sequential(Linear, activation, Linear)`.
        experts: in each layer.
        router: as in `MoELayer`; default is 'topk', or with `split` all experts with weights that are equal at first.
        where: 'all', names, patterns of names such as `blocks.*.mlp`, or a function of name and module.
        noise: added to each copy, so that they do not stay equal where they get the same tokens: N(0, 1) times this, times
            the standard deviation of each parameter's values.
        split: instead of copies, divide the hidden units into groups of equal size whose input weights are alike. The sum
            of all experts is the dense network; its second map is scaled by the experts per token to make up for weights
            that sum to 1. With fewer experts per token than experts it is an approximation.
        dispatch: as in `MoELayer`.
        seeded: a context manager for a layer's name, inside which its router is drawn.
        generator: for the groups of `split`.

    Returns:
        Events 'upcycled' with the new layers' names and ids.

    Raises:
        ValueError: nothing that can be upcycled is there, or is not what `where` names; the hidden units cannot be divided.
    """
    root = home(model)
    known = dense_networks(model)
    chosen = _chosen(root, known, where)
    bare = not hasattr(
        root, "moe_layers"
    )  # else the model hands its layers a context, and knows what to do with a routing
    done = Surgery()
    options: dict[str, Any] = {"noise": noise, "split": split, "dispatch": dispatch, "generator": generator}
    for name in chosen:
        module, form = root.get_submodule(name), known[name]
        with seeded(name):
            layer, change = layer_of(form, experts, router, routers=getattr(model, "routers", None), **options)
        if isinstance(module, Dense):  # ids are for life, also of the experts that it was made of
            _continue_ids(layer, module.described["next_expert"])
        what = layer.described or {}
        what |= {"bare": int(bare), "channels_first": int(form.channels_first), "after": form.after}
        new: nn.Module = layer
        if bare:
            layer.described = None
            new = Bare(layer, what, channels_first=form.channels_first, after=form.after)
        change.removed += list(module.parameters())
        replace(root, module, new.train(module.training))
        full = f"{name}.layer" if bare else name
        done.change += change
        done.new[full] = list(layer.ids)
        done.note("upcycled", full, layer.ids)
    return done


def _chosen(root: nn.Module, known: Mapping[str, Form], where: Where) -> list[str]:
    if not known:
        raise ValueError(f"upcycle: expected a model with feed-forward networks, found none in {type(root).__name__}")
    if callable(where):
        return [name for name in known if where(name, root.get_submodule(name))]
    patterns = [where] if isinstance(where, str) else list(where)
    if patterns == ["all"]:
        return list(known)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"upcycle: where: expected feed-forward networks among {list(known)}, got {pattern!r}")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _continue_ids(layer: MoELayer, first: int) -> None:
    layer.new_ids(first)
    layer.set_cohorts({key: tuple(expert + first for expert in ids) for key, ids in layer.cohort_ids.items()})


def layer_of(
    network: nn.Module | Form,
    experts: int = 4,
    router: Spec | None = None,
    *,
    noise: float = 0.0,
    split: bool = False,
    dispatch: Path = "auto",
    generator: torch.Generator | None = None,
    routers: Routers | None = None,
) -> tuple[MoELayer, ParameterChange]:
    """The layer of experts that one feed-forward network becomes; arguments as for `upcycle`.

    `routers` makes what a router's name and options mean; default are the built-in ones.

    Returns:
        The layer, which shares nothing with the network, and where its parameters come from.

    Raises:
        ValueError: it is no feed-forward network that is known, or its hidden units cannot be divided.
    """
    form = network if isinstance(network, Form) else _form(network)
    if form is None:
        raise ValueError(f"upcycle: expected a feed-forward network of known form, got {type(network).__name__}")
    if noise < 0:
        raise ValueError(f"noise: expected a number from 0, got {noise}")
    hidden = form.hidden
    if split:
        if hidden is None or hidden % experts:
            raise ValueError(f"split: expected hidden units that {experts} experts can share equally, got {hidden}")
        hidden //= experts
    spec = router or (SPLIT if split else "topk")
    like = next(part.old for parts in form.rows.values() for part in parts)
    named: Any = {"name": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else None
    layer = MoELayer(
        form.dim,
        hidden,
        form.out_dim,
        experts=experts,
        expert=form.expert,
        router=spec if routers is None or named is None else routers(named),
        dispatch=dispatch,
    ).to(like)
    layer.described = {  # completed by whoever puts it into a model
        "is": "experts",
        "dim": form.dim,
        "hidden": hidden,
        "out_dim": form.out_dim,
        "experts": experts,
        "expert": dict(form.expert),
        "router": named,
        "dispatch": dispatch,
    }
    cohort = layer.cohorts["0"]
    if split:
        return layer, _divide(layer, form, noise, generator or torch.Generator().manual_seed(0))
    fill(cohort, form.rows, noise)
    return layer, ParameterChange(mixed={p: [form.rows[name]] * experts for name, p in cohort.named_parameters()})


@torch.no_grad()
def _divide(layer: MoELayer, form: Form, noise: float, generator: torch.Generator) -> ParameterChange:
    """Give each expert its share of the hidden units."""
    cohort, whole = layer.cohorts["0"], form.make()
    units = whole.units()
    groups, centres = splitting.clusters(
        splitting.inputs_of({name: p[0] for name, p in whole.named_parameters()}, units), cohort.n, generator
    )
    scale = layer.router.experts_per_token(layer.view)
    change = ParameterChange()
    for name, parameter in cohort.named_parameters():
        rows = []
        for members in groups:
            if name in units:
                part = partial(splitting.taken, axis=units[name][0], times=units[name][1], units=members)
                rows.append(tuple(_after(p, part) for p in form.rows[name]))
            else:
                rows.append(form.rows[name])
        for row, parts in enumerate(rows):
            parameter[row] = summed(parts)
        if name == "w2":
            parameter *= scale
        elif name != "b2":  # the second map's gradients have another scale from now on: its state begins anew
            change.mixed[parameter] = rows
        if noise:
            parameter += noise * parameter.std() * torch.randn(parameter.shape).to(parameter)
    columns = layer.router.columns
    vectors = getattr(columns["0"], "weight", None) if "0" in columns else None
    if scale < cohort.n and isinstance(vectors, nn.Parameter) and vectors.shape == centres.shape:
        # the expert whose units point where a token does is the one to ask (selection by parameters in the paper)
        size = vectors.norm(dim=1, keepdim=True).mean()
        vectors.copy_((centres * size).to(vectors))
    return change


def _after(part: Part, then: Callable[..., Any]) -> Part:
    first = part.to
    return Part(part.old, part.row, part.weight, then if first is None else lambda value: then(first(value)))
