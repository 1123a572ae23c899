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
        "ewc": "cmoe.strategies.ewc:EWC",
        "si": "cmoe.strategies.si:SI",
        "mas": "cmoe.strategies.mas:MAS",
        "rwalk": "cmoe.strategies.rwalk:RWalk",
        "lwf": "cmoe.strategies.lwf:LwF",
        "der": "cmoe.strategies.der:DER",
        "er_ace": "cmoe.strategies.er_ace:ERACE",
        "a_gem": "cmoe.strategies.a_gem:AGEM",
        "gem": "cmoe.strategies.gem:GEM",
        "fdr": "cmoe.strategies.fdr:FDR",
        "mir": "cmoe.strategies.mir:MIR",
        "gdumb": "cmoe.strategies.gdumb:GDumb",
        "icarl": "cmoe.strategies.icarl:ICaRL",
        "ncm": "cmoe.strategies.ncm:NCM",
        "slda": "cmoe.strategies.slda:SLDA",
        "packnet": "cmoe.strategies.packnet:PackNet",
        "hat": "cmoe.strategies.hat:HAT",
        "xdg": "cmoe.strategies.xdg:XdG",
        "pnn": "cmoe.strategies.pnn:PNN",
        "infer_gaussian": "cmoe.strategies.infer_gaussian:InferGaussian",
        "infer_prototype": "cmoe.strategies.infer_prototype:InferPrototype",
        "infer_autoencoder": "cmoe.strategies.infer_autoencoder:InferAutoencoder",
        "infer_entropy": "cmoe.strategies.infer_entropy:InferEntropy",
        "consistency": "cmoe.strategies.consistency:Consistency",
        "expand": "cmoe.strategies.expand:Expand",
        "seed": "cmoe.strategies.seed:SEED",
        "prune": "cmoe.strategies.prune:Prune",
        "merge_experts": "cmoe.strategies.merge_experts:MergeExperts",
        "upcycle": "cmoe.strategies.upcycle:Upcycle",
        "collapse": "cmoe.strategies.collapse:Collapse",
        "separate": "cmoe.strategies.separate:Separate",
        "avalanche": "cmoe.strategies.avalanche:Avalanche",
    },
    "router": {
        "topk": "cmoe.moe.routers.topk:TopK",
        "noisy_topk": "cmoe.moe.routers.presets:NoisyTopK",
        "switch": "cmoe.moe.routers.presets:Switch",
        "gshard": "cmoe.moe.routers.presets:GShard",
        "dense": "cmoe.moe.routers.presets:Dense",
        "hierarchical": "cmoe.moe.routers.hierarchical:Hierarchical",
        "prototypes": "cmoe.moe.routers.presets:Prototypes",
        "cosine": "cmoe.moe.routers.presets:Cosine",
        "perturbed_cosine": "cmoe.moe.routers.presets:PerturbedCosine",
        "gaussian": "cmoe.moe.routers.presets:Gaussian",
        "student_t": "cmoe.moe.routers.presets:StudentT",
        "laplace": "cmoe.moe.routers.presets:Laplace",
        "quadratic": "cmoe.moe.routers.presets:Quadratic",
        "sigmoid_bias": "cmoe.moe.routers.presets:SigmoidBias",
        "relu": "cmoe.moe.routers.adaptive:ReLU",
        "top_p": "cmoe.moe.routers.presets:TopP",
        "null_experts": "cmoe.moe.routers.adaptive:NullExperts",
        "threshold": "cmoe.moe.routers.adaptive:Threshold",
        "hash": "cmoe.moe.routers.presets:Hash",
        "random": "cmoe.moe.routers.presets:Random",
        "frozen_random": "cmoe.moe.routers.presets:FrozenRandom",
        "base": "cmoe.moe.routers.balanced:Base",
        "sinkhorn": "cmoe.moe.routers.balanced:Sinkhorn",
        "sparsemixer": "cmoe.moe.routers.sparsemixer:SparseMixer",
        "attention": "cmoe.moe.routers.contextual:Attention",
        "recurrent": "cmoe.moe.routers.contextual:Recurrent",
        "kmeans": "cmoe.moe.routers.contextual:KMeans",
        "expert_choice": "cmoe.moe.routers.expert_choice:ExpertChoice",
        "dselect_k": "cmoe.moe.routers.dselect:DSelectK",
        "stable_moe": "cmoe.moe.routers.stable:StableMoE",
        "product_keys": "cmoe.moe.routers.product_keys:ProductKeys",
        "soft": "cmoe.moe.routers.soft:Soft",
        "smear": "cmoe.moe.routers.smear:Smear",
        "task_table": "cmoe.moe.routers.table:TaskTable",
        "task_embedding": "cmoe.moe.routers.labelled:TaskEmbedding",
        "per_task": "cmoe.moe.routers.labelled:PerTask",
    },
    "expert": {
        "ffn": "cmoe.moe.experts.ffn:FFN",
        "linear": "cmoe.moe.experts.linear:Linear",
        "lora": "cmoe.moe.experts.lora:LoRA",
        "adapter": "cmoe.moe.experts.adapter:Adapter",
        "conv": "cmoe.moe.experts.conv:Conv",
        "zero": "cmoe.moe.experts.zero:Zero",
        "copy": "cmoe.moe.experts.copy:Copy",
        "constant": "cmoe.moe.experts.constant:Constant",
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
    "Scored": "router",
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
