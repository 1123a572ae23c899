"""The fixed sections of a configuration, as typed options with defaults and meanings.

Components (`stream`, `strategy`, `optimizer`, `scheduler`, and the model's backbone, router and expert) add the options
of the class that their `name:` picks; these here are the ones every run has. The docstrings are what `cmoe show`
prints, the annotations what the check holds a value to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from cmoe.config.types import Count, ExpertSpec, NonNegative, Positive, PositiveInt, RouterSpec


@dataclass
class Run:
    """The top level of a configuration.

    Options:
        experiment: name under which runs are compared; one MLflow experiment.
        seed: fixes initial weights, batch order, buffers and every other random choice.
        label: name of this variant in tables; default is the strategies joined by '+'.
    """

    experiment: str = "default"
    seed: Count = 0
    label: str | None = None


@dataclass
class Model:
    """The model around a backbone; the backbone's own options stand beside these.

    Options:
        name: the backbone (`cmoe list backbones`).
        head: 'shared' (all outputs from the start), 'multi' (one head per task label), 'growing' (outputs added as
            classes arrive); 'auto' is 'multi' in the task scenario and for tasks on the same samples
            (`digit_attributes`), 'shared' elsewhere.
        train_outputs: outputs that the training loss sees: 'all', those of classes 'seen' so far, or of the 'current'
            experience.
        eval_outputs: outputs that a prediction without task label chooses from: 'all', 'seen', or 'task' (only
            predictions with the task label are reported).
        moe: Mixture-of-Experts layers where the feed-forward networks are; empty for a dense model.
    """

    name: str = "mlp"
    head: Literal["auto", "shared", "multi", "growing"] = "auto"
    train_outputs: Literal["all", "seen", "current"] = "all"
    eval_outputs: Literal["all", "seen", "task"] = "all"
    moe: MoE | None = None


@dataclass
class MoE:
    """Mixture-of-Experts layers in place of the backbone's feed-forward networks.

    Options:
        experts: experts in each layer at the start.
        router: how tokens choose experts (`cmoe list routers`).
        expert: what an expert is (`cmoe list experts`); default is the backbone's own: 'linear' in `mlp`, 'ffn'
            elsewhere.
        hidden: hidden units of one expert; default is the feed-forward network's own.
        layers: 'all', 'last', 'alternate', or the indices of the layers that get experts; 'none' where only `attention`
            has any.
        more: further experts of a kind or size of their own (different sizes in one layer; `zero`, `copy`, `constant`).
        shared: experts that work on every token beside those that the router chooses.
        base: whether the feed-forward network itself stays and the experts add to it: 'none', 'frozen' (LoRA and
            adapters on a pretrained network), or 'trained'.
        distillation: weight of the loss that draws the experts of a token together (mutual distillation, MoDE).
        dispatch: how tokens reach experts: 'auto' picks by shape and device.
        recompute: hidden units are computed again for the backward pass instead of kept: less memory, more time.
        attention: attention heads as experts too, in place of a transformer block's self-attention.
    """

    experts: PositiveInt = 4
    router: RouterSpec = field(default_factory=lambda: {"name": "topk"})
    expert: ExpertSpec | None = None
    hidden: PositiveInt | None = None
    layers: Literal["all", "last", "alternate", "none"] | list[int] = "all"
    more: list[MoreExperts] = field(default_factory=list)
    shared: Count = 0
    base: Literal["none", "frozen", "trained"] = "none"
    distillation: NonNegative = 0.0
    dispatch: Literal["auto", "grouped", "loop", "bmm", "dense"] = "auto"
    recompute: bool = False
    attention: Heads | None = None


@dataclass
class MoreExperts:
    """Experts that differ from the layer's first ones.

    Options:
        experts: how many.
        expert: what they are; default is as the first ones.
        hidden: hidden units of one; default is as the first ones.
    """

    experts: PositiveInt = 1
    expert: ExpertSpec | None = None
    hidden: PositiveInt | None = None


@dataclass
class Heads:
    """Attention heads as experts: each token is told by a router which heads to ask with.

    Options:
        kind: 'moa' (Zhang et al. 2022: heads own queries and outputs, keys and values are one for all) or 'moh' (Jin et
            al. 2024: the heads of ordinary attention, weighted).
        heads: heads that the router chooses from.
        router: how tokens choose heads.
        shared: heads that every token uses beside those ('moh').
        size: of a head; default is the backbone's own, dim / heads.
        layers: 'all', 'last', 'alternate', or the indices of the blocks.
    """

    kind: Literal["moa", "moh"] = "moh"
    heads: PositiveInt = 4
    router: RouterSpec = field(default_factory=lambda: {"name": "topk"})
    shared: Count = 0
    size: PositiveInt | None = None
    layers: Literal["all", "last", "alternate"] | list[int] = "all"


@dataclass
class Trainer:
    """How training runs; the loop is Lightning's Trainer.

    Options:
        epochs: passes over each experience.
        batch_size: samples of the experience in one step.
        max_steps: stop each experience after this many steps; 0 is no limit.
        accelerator: 'auto', 'cpu' or 'gpu'.
        devices: how many devices; only 1 so far.
        precision: '32-true', 'bf16-mixed', 'bf16-true' or '64-true'.
        clip_norm: gradients are scaled to at most this Euclidean norm; 0 is off.
        clip_value: gradients are clipped to this absolute value; 0 is off.
        threads: CPU threads; 0 lets cmoe choose (1 for small models).
        chunk: mini-batches handed to one Lightning call.
        log_every: steps between two points of the training curve; 0 is off.
    """

    epochs: PositiveInt = 1
    batch_size: PositiveInt = 32
    max_steps: Count = 0
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: PositiveInt = 1
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "64-true"] = "32-true"
    clip_norm: NonNegative = 0.0
    clip_value: NonNegative = 0.0
    threads: Count = 0
    chunk: PositiveInt = 32
    log_every: Count = 50


@dataclass
class Checkpoint:
    """The exact state of a run on disk.

    Options:
        every_seconds: at most this much work is lost by a kill; each experience's end is always saved.
        keep: how many checkpoints stay; the one before the last is the fall-back.
    """

    every_seconds: Positive = 30.0
    keep: PositiveInt = 2


@dataclass
class Evaluation:
    """When and on what a row of the matrix is evaluated.

    Options:
        batch_size: samples in one evaluation batch; batches never cross experiences.
        split: 'test', or 'validation' to choose hyper-parameters without reading the test set.
        rows: experiences whose test sets a row holds: 'all' (needed for forward transfer) or 'seen'.
        every: evaluate after every n-th experience; the last one always is.
        initial: also evaluate the freshly initialised model (the baseline of forward transfer).
        diagnostics: what each row measures of Mixture-of-Experts layers, on the learned experiences: 'routing' (load, dead
            experts, entropy, dropped tokens, active FLOPs, mutual information of task and expert; from the row's own
            forward passes, nearly free), 'all' (also how alike experts are, accuracy and calibration of each alone and
            joined in other ways, accuracy without each; two more passes for each expert), or 'none'. No weight depends
            on it.
        diagnostics_samples: samples of each learned experience that 'all' asks single experts about.
    """

    batch_size: PositiveInt = 512
    split: Literal["test", "validation"] = "test"
    rows: Literal["all", "seen"] = "all"
    every: PositiveInt = 1
    initial: bool = True
    diagnostics: Literal["none", "routing", "all"] = "routing"
    diagnostics_samples: PositiveInt = 512


@dataclass
class Tracking:
    """Where metrics, figures and artifacts go.

    Options:
        root: folder of all run output.
        uri: MLflow tracking server; default is $MLFLOW_TRACKING_URI, else SQLite under `root`.
        enabled: false keeps everything in the run folder only.
    """

    root: str = "mlruns"
    uri: str | None = None
    enabled: bool = True


@dataclass
class Optimizer:
    """Options that every optimizer has beside its own.

    Options:
        reset: 'experience' starts each experience with a fresh optimizer, 'never' keeps its state for surviving
            parameters.
    """

    reset: Literal["experience", "never"] = "experience"


SECTIONS: dict[str, type] = {
    "model": Model,
    "optimizer": Optimizer,
    "trainer": Trainer,
    "checkpoint": Checkpoint,
    "evaluation": Evaluation,
    "tracking": Tracking,
}


def defaults() -> dict[str, Any]:
    """The components that a configuration which names none gets."""
    return {
        "strategy": ["naive"],
        "optimizer": {"name": "sgd", "lr": 0.1},
        "scheduler": {"name": "constant"},
    }
