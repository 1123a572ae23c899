"""From a plan to the objects of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from cmoe.backbones import Backbone, ExpertLayers, HeadLayers
from cmoe.backbones.mlp import glorot
from cmoe.config.plan import Plan
from cmoe.errors import UserError, one_line
from cmoe.learners import Head, Model
from cmoe.learners.objective import Classification, Language, Objective
from cmoe.moe.dispatch import grouped_refusal
from cmoe.moe.experts import Expert
from cmoe.plugins import Catalogue
from cmoe.streams import DataFolder, Stream, open_stream
from cmoe.streams.join import join

BYTES = 256  # outputs of a byte language model


def seed_for(seed: int, purpose: str) -> int:
    """A seed for a named purpose, so that one use of randomness never shifts another (63 bits)."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def component(catalogue: Catalogue, kind: str, spec: dict[str, Any], **supplied: Any) -> Any:
    """The object that a checked `name:` with options stands for."""
    return catalogue.find(kind, spec["name"]).create(spec, **supplied)


def make_stream(plan: Plan, catalogue: Catalogue, data: DataFolder) -> Stream:
    """The opened stream of a plan, with the tasks that follow it."""
    further = [{**spec, "scenario": plan.stream["scenario"]} for spec in plan.stream["then"]]
    streams: list[Stream] = []
    for i, spec in enumerate([plan.stream, *further]):
        entry = catalogue.find("task", spec["name"])
        options = {"name": spec["name"], **entry.pick(spec)}
        try:
            opened = open_stream(options, entry.load(), data, plan.seed)
            streams = [join([*streams, opened], plan.stream["online_size"])]
        except UserError as error:
            raise UserError(f"stream.then.{i - 1}: {error}" if i else str(error)) from error
    return streams[0]


def head_kind(plan: Plan, stream: Stream) -> str:
    """The kind of head, with 'auto' decided."""
    kind = plan.model["head"]
    labelled = stream.scenario == "task" or stream.many_labels
    return kind if kind != "auto" else "multi" if labelled else "shared"


def make_model(plan: Plan, catalogue: Catalogue, stream: Stream, purpose: str = "model") -> Model:
    """A newly initialised model; the same plan and purpose give the same weights.

    Raises:
        UserError: the backbone does not take this stream's inputs.
    """
    entry = catalogue.find("backbone", plan.model["name"])
    backbone_class = entry.load()
    assert issubclass(backbone_class, Backbone)
    if stream.modality not in backbone_class.modalities:
        raise UserError(
            f"model.name: expected a backbone for {stream.modality} inputs, got '{entry.name}' "
            f"(for {', '.join(backbone_class.modalities)})"
        )
    experts = _experts(plan, catalogue)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(plan.seed, purpose))
        try:
            backbone = entry.create(
                plan.model, input_shape=stream.input_shape, vocabulary=stream.vocabulary, experts=experts
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"model: {error}") from error
        except Exception as error:  # a plugin's constructor, or more memory than there is
            raise UserError(f"model: {one_line(error)}") from error
        head = Head(backbone.width, head_kind(plan, stream))
        if head.kind == "shared":
            head.add(range(BYTES if stream.language else stream.n_classes))
        model = Model(backbone, head, lambda spec: lambda **given: component(catalogue, "router", dict(spec), **given))
        if plan.model.get("init") == "xavier":
            head.apply(glorot)  # the protocol's initial weights hold for the outputs too
    if experts is not None and backbone.causal:
        _refuse_future(model)
    _refuse_grouped(model, plan.trainer["precision"])
    _refuse_few_labels(model, plan.stream.get("limit") or len(stream.experiences))
    return model


def _experts(plan: Plan, catalogue: Catalogue) -> ExpertLayers | None:
    moe = plan.model.get("moe")
    if not moe:
        return None

    def maker(kind: str, spec: dict[str, Any], key: str) -> Callable[..., Any]:
        entry = catalogue.find(kind, spec["name"])

        def make(**supplied: Any) -> Any:
            try:
                return entry.create(spec, **supplied)
            except ValueError as error:
                raise UserError(f"model.moe.{key}: {error}") from error

        return make

    def kind(spec: dict[str, Any] | None, key: str) -> Callable[..., Any] | None:
        return maker("expert", spec, key) if spec else None

    options: dict[str, Any] = {
        **moe,
        "router": maker("router", moe["router"], "router"),
        "expert": kind(moe["expert"], "expert"),
        "more": [{**m, "expert": kind(m["expert"], f"more.{i}.expert")} for i, m in enumerate(moe["more"])],
    }
    if heads := moe["attention"]:
        own: dict[str, Any] = {**heads, "router": maker("router", heads["router"], "attention.router")}
        options["attention"] = HeadLayers(**own)
    return ExpertLayers(**options)


def _refuse_future(model: Model) -> None:
    """A decoder whose router sees later tokens would report losses that are not true."""
    for name, layer in model.moe_layers().items():
        if not layer.router.causal:
            raise UserError(f"model.moe.router: expected a causal router in a decoder, {name} has one that looks ahead")


def _refuse_grouped(model: Model, precision: str) -> None:
    """`dispatch: grouped` by name must be able to run every expert, not fail at the first that gets a token."""
    dtype = {"64-true": torch.float64, "32-true": torch.float32}.get(precision, torch.bfloat16)
    for name, layer in model.moe_layers().items():
        for cohort in layer.cohorts.values() if layer.dispatch == "grouped" else ():
            refusal = grouped_refusal(cohort, dtype)
            if refusal and type(cohort).work is Expert.work:  # others have no products to group
                raise UserError(
                    f"model.moe.dispatch: expected 'auto', 'loop' or 'bmm', as 'grouped' {refusal} ({name})"
                )


def _refuse_few_labels(model: Model, experiences: int) -> None:
    """A router with something of its own for each task label needs one for each experience."""
    for layer in model.moe_layers().values():
        tasks = getattr(layer.router, "tasks", experiences)
        if "task" in layer.router.needs and tasks < experiences:
            raise UserError(
                f"model.moe.router.tasks: expected at least {experiences}, a label for each experience, got {tasks}"
            )


def make_objective(plan: Plan, stream: Stream, head: Head) -> Objective:
    """The task's loss."""
    return Language(head) if stream.language else Classification(head, plan.model["train_outputs"])
