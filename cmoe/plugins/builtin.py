"""What comes with cmoe: name -> "module:Class" for every kind but tasks, which are files in a folder."""

from __future__ import annotations

from pathlib import Path

from cmoe.plugins.source import PACKAGE

KINDS = ("task", "strategy", "router", "expert", "backbone", "optimizer", "scheduler")
PLURALS = {k: k[:-1] + "ies" if k.endswith("y") else k + "s" for k in KINDS}

BUILTIN: dict[str, dict[str, str]] = {
    "task": {},
    "strategy": {
        "naive": "cmoe.strategies.naive:Naive",
        "joint": "cmoe.strategies.joint:Joint",
        "cumulative": "cmoe.strategies.cumulative:Cumulative",
        "replay": "cmoe.strategies.replay:Replay",
        "online_ewc": "cmoe.strategies.online_ewc:OnlineEWC",
        "lwf": "cmoe.strategies.lwf:LwF",
        "expand": "cmoe.strategies.expand:Expand",
        "separate": "cmoe.strategies.separate:Separate",
        "avalanche": "cmoe.strategies.avalanche:Avalanche",
    },
    "router": {
        "topk": "cmoe.moe.routers.topk:TopK",
        "task_table": "cmoe.moe.routers.table:TaskTable",
    },
    "expert": {
        "ffn": "cmoe.moe.experts.ffn:FFN",
        "linear": "cmoe.moe.experts.linear:Linear",
    },
    "backbone": {
        "mlp": "cmoe.backbones.mlp:MLP",
        "vit": "cmoe.backbones.vit:ViT",
        "convnet": "cmoe.backbones.convnet:ConvNet",
        "text_encoder": "cmoe.backbones.text_encoder:TextEncoder",
        "byte_lm": "cmoe.backbones.byte_lm:ByteLM",
    },
    "optimizer": {
        "sgd": "cmoe.learners.optimizers:SGD",
        "adam": "cmoe.learners.optimizers:Adam",
        "adamw": "cmoe.learners.optimizers:AdamW",
    },
    "scheduler": {
        "constant": "cmoe.learners.schedulers:Constant",
        "cosine": "cmoe.learners.schedulers:Cosine",
        "linear_warmup": "cmoe.learners.schedulers:LinearWarmup",
        "step": "cmoe.learners.schedulers:Step",
    },
}

# a class of a plugin file belongs to the kind whose base is among its ancestors
BASES = {
    "Task": "task",
    "Strategy": "strategy",
    "Router": "router",
    "Expert": "expert",
    "Experts": "expert",
    "Backbone": "backbone",
}

# installed packages announce components of these kinds in the entry point group `cmoe.<plural>`
GROUPS = {f"cmoe.{PLURALS[k]}": k for k in ("task", "strategy", "router", "expert", "backbone")}


def an(kind: str) -> str:
    """The kind with its article."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def builtin_folder(name: str) -> Path:
    """The folder `tasks` or `configs` that comes with cmoe: beside the package in a checkout, inside it in a wheel."""
    assert name in ("tasks", "configs"), name
    inside = PACKAGE / "_builtin" / name
    return inside if inside.is_dir() else PACKAGE.parent / name
