"""What inference must know of a stream, as plain containers: with it a trained model predicts where the data is not.

`describe` is written down once when a run begins (`run.json`, key `inputs`); `rebuild` makes of it a stream that has
everything but samples.
"""

from __future__ import annotations

import base64
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from cmoe.streams import Experience, Split, Stream
from cmoe.streams.join import Joined
from cmoe.streams.transforms import Augment, BatchTransform, Chain, Flatten, Permute, Rotate, Scale, Tokens


def describe(stream: Stream) -> dict[str, Any]:
    """A stream without its samples, for JSON.

    `transform` is None where it is not one of cmoe's own: then the stream itself must be opened to predict.
    """
    x = stream.experiences[0].train.x
    return {
        "task": stream.name,
        "modality": stream.modality,
        "scenario": stream.scenario,
        "language": stream.language,
        "raw_shape": list(x.shape[1:]),
        "raw_dtype": str(x.dtype).removeprefix("torch."),
        "input_shape": list(stream.input_shape),
        "class_names": list(stream.class_names),
        "vocabulary": stream.vocabulary,
        "experiences": [
            {"name": e.name, "task_label": e.task_label, "classes": list(e.classes)} for e in stream.experiences
        ],
        "segments": [list(s) for s in stream.segments],
        "transform": transform_spec(stream.transform),
        "fingerprint": stream.fingerprint,
    }


def rebuild(facts: dict[str, Any]) -> Stream:
    """The stream that `describe` saw, with empty splits and no benchmark. Its `transform` must not be None."""
    x = torch.empty((0, *facts["raw_shape"]), dtype=getattr(torch, facts["raw_dtype"]))
    none = torch.empty(0, dtype=torch.int64)
    empty = Split(x, none, None if facts["language"] else none)
    experiences = [
        Experience(i, e["name"], e["task_label"], tuple(e["classes"]), empty, empty, empty)
        for i, e in enumerate(facts["experiences"])
    ]
    return Stream(
        name=facts["task"],
        modality=facts["modality"],
        scenario=facts["scenario"],
        input_shape=tuple(facts["input_shape"]),
        n_classes=len(facts["class_names"]),
        class_names=tuple(facts["class_names"]),
        vocabulary=facts["vocabulary"],
        experiences=experiences,
        segments=[tuple(s) for s in facts["segments"]],
        transform=transform_of(facts["transform"]),
        fingerprint=facts["fingerprint"],
        benchmark=cast(Any, None),
    )


def transform_spec(transform: BatchTransform) -> dict[str, Any] | None:
    """One of cmoe's own transforms in plain containers; None for any other, a derived class included."""
    if isinstance(transform, Chain) and type(transform) is Chain:
        parts = [transform_spec(t) for t in transform.transforms]
        return None if None in parts else {"name": "chain", "transforms": parts}
    if isinstance(transform, Joined) and type(transform) is Joined:
        parts = [transform_spec(t) for t in transform.transforms]
        return None if None in parts else {"name": "joined", "transforms": parts, "ends": transform.ends}
    if isinstance(transform, Scale) and type(transform) is Scale:
        mean, std = (None if v is None else v.tolist() for v in (transform.mean, transform.std))
        return {"name": "scale", "divisor": transform.divisor, "mean": mean, "std": std}
    if isinstance(transform, Permute) and type(transform) is Permute:
        return {"name": "permute", "shape": list(transform.table.shape), "table": _packed(transform.table)}
    if isinstance(transform, Rotate) and type(transform) is Rotate:
        return {"name": "rotate", "angles": transform.angles.tolist(), "divisor": transform.divisor}
    if isinstance(transform, Augment) and type(transform) is Augment:
        return {"name": "augment", "padding": transform.padding, "flip": transform.flip}
    if type(transform) in (Flatten, Tokens):
        return {"name": type(transform).__name__.lower()}
    return None


def transform_of(spec: dict[str, Any]) -> BatchTransform:
    """The transform that `transform_spec` wrote down."""
    options = {k: v for k, v in spec.items() if k != "name"}
    match spec["name"]:
        case "chain":
            return Chain(*(transform_of(s) for s in options["transforms"]))
        case "joined":
            counts = [b - a for a, b in pairwise([0, *options["ends"]])]
            return Joined([transform_of(s) for s in options["transforms"]], counts)
        case "permute":
            return Permute(_unpacked(options["table"], options["shape"]))
        case "scale":
            return Scale(**options)
        case "rotate":
            return Rotate(**options)
        case "augment":
            return Augment(**options)
        case "flatten":
            return Flatten()
        case "tokens":
            return Tokens()
    raise ValueError(f"expected a transform of cmoe, got {spec['name']!r}")


def full_scale(transform: BatchTransform, experience: int = 0) -> float | None:
    """The raw value that stands for full brightness: what bytes are divided by; None where no transform says."""
    if isinstance(transform, Joined):
        own = sum(experience >= end for end in transform.ends)
        return full_scale(transform.transforms[own], experience - (transform.ends[own - 1] if own else 0))
    if isinstance(transform, Chain):
        return next((s for t in transform.transforms if (s := full_scale(t, experience)) is not None), None)
    return float(transform.divisor) if isinstance(transform, (Scale, Rotate)) else None


def tells_experiences_apart(stream: Stream) -> bool:
    """Whether the transform does different things to samples of different experiences (a permutation, a rotation)."""
    x = stream.experiences[0].train.x
    count = int(np.prod(x.shape[1:]))
    probe = (torch.arange(count) * 7 % 13).reshape(1, *x.shape[1:]).to(x.dtype)
    first = stream.transform(probe.clone(), 0, train=False)
    others = (stream.transform(probe.clone(), e.index, train=False) for e in stream.experiences[1:])
    return any(other.shape != first.shape or not torch.equal(other, first) for other in others)


def _packed(table: Tensor) -> str:
    assert int(table.min()) >= 0
    return base64.b64encode(table.numpy().astype("<u4").tobytes()).decode()


def _unpacked(text: str, shape: list[int]) -> Tensor:
    flat = np.frombuffer(base64.b64decode(text), dtype="<u4").astype(np.int64)
    return torch.from_numpy(flat.reshape(shape))
