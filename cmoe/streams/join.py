"""Streams one after the other: a run that is finished goes on with another task."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.streams.stream import Experience, Layout, Split, Stream
from cmoe.streams.transforms import BatchTransform, is_stochastic
from cmoe.streams.view import avalanche_benchmark


class Joined:
    """Each experience's own transform, also where a batch mixes experiences of several streams.

    Args:
        transforms: one for each stream.
        counts: experiences of each stream.
    """

    def __init__(self, transforms: Sequence[BatchTransform], counts: Sequence[int]) -> None:
        self.transforms = list(transforms)
        self.ends = list(accumulate(counts))
        self.stochastic = any(is_stochastic(t) for t in transforms)

    def __call__(
        self, x: Tensor, experience: Tensor | int, *, train: bool, generator: torch.Generator | None = None
    ) -> Tensor:
        if isinstance(experience, int):
            k = bisect_right(self.ends, experience)
            return self.transforms[k](x, experience - self._start(k), train=train, generator=generator)
        whose = torch.bucketize(experience, torch.tensor(self.ends, device=experience.device), right=True)
        out: Tensor | None = None
        for k in whose.unique().tolist():
            rows = (whose == k).nonzero().squeeze(1)
            own = experience.index_select(0, rows) - self._start(k)
            part = self.transforms[k](x.index_select(0, rows), own, train=train, generator=generator)
            if out is None:
                out = part.new_empty((x.shape[0], *part.shape[1:]))
            out.index_copy_(0, rows, part)
        assert out is not None
        return out

    def _start(self, k: int) -> int:
        return self.ends[k - 1] if k else 0


def join(streams: Sequence[Stream], online_size: int) -> Stream:
    """One stream of all experiences in order.

    Classes of later streams are new ones, numbered behind those before; in the domain scenario with equally many
    classes they are the same ones.

    Args:
        streams: at least one, of the same kind of input.
        online_size: samples in a small experience of the online scenario, for Avalanche's view.

    Raises:
        UserError: the inputs do not fit together.
    """
    joined = streams[0]
    for stream in streams[1:]:
        joined = _two(joined, stream)
    if len(streams) == 1:
        return joined
    layout = Layout(
        joined.modality,
        joined.scenario,
        joined.experiences,
        joined.segments,
        joined.transform,
        joined.class_names,
        joined.vocabulary,
    )
    return replace(joined, benchmark=avalanche_benchmark(layout, online_size))


def _two(first: Stream, second: Stream) -> Stream:
    _same(first, second)
    count = len(first.experiences)
    shared = first.scenario == "domain" and first.n_classes == second.n_classes
    shift = 0 if shared or first.language else first.n_classes
    labels: dict[int, Tensor] = {}  # each storage's labels are shifted once, so that splits go on sharing them
    moved = [_moved(e, count, labels, shift, first.scenario == "task") for e in second.experiences]
    experiences = _one_storage([*first.experiences, *moved])
    digest = hashlib.sha256(f"{first.fingerprint} {second.fingerprint}".encode()).hexdigest()
    return replace(
        first,
        name=f"{first.name}+{second.name}",
        n_classes=first.n_classes if shared else first.n_classes + second.n_classes,
        class_names=first.class_names if shared else (*first.class_names, *second.class_names),
        experiences=experiences,
        segments=[*first.segments, *(tuple(e + count for e in group) for group in second.segments)],
        transform=Joined((first.transform, second.transform), (count, len(moved))),
        fingerprint=digest,
        prefixes=(*first.prefixes, first.fingerprint),
    )


def _same(first: Stream, second: Stream) -> None:
    """Refuse streams whose samples cannot stand in one batch."""
    a, b = first.experiences[0].train.x, second.experiences[0].train.x
    facts = (
        ("modality", first.modality, second.modality),
        ("scenario", first.scenario, second.scenario),
        ("shape of a sample", tuple(a.shape[1:]), tuple(b.shape[1:])),
        ("input shape", first.input_shape, second.input_shape),
        ("type of a sample", str(a.dtype), str(b.dtype)),
        ("vocabulary", first.vocabulary, second.vocabulary),
    )
    for what, wanted, got in facts:
        if wanted != got:
            raise UserError(f"task {second.name}: expected the {what} of '{first.name}', {wanted}, got {got}")


def _moved(experience: Experience, places: int, labels: dict[int, Tensor], classes: int, labelled: bool) -> Experience:
    def shifted(split: Split) -> Split:
        if split.y is None:
            return split
        if id(split.y) not in labels:
            labels[id(split.y)] = split.y + classes
        return Split(split.x, split.index, labels[id(split.y)])

    return replace(
        experience,
        index=experience.index + places,
        task_label=experience.task_label + (places if labelled else 0),
        classes=tuple(c + classes for c in experience.classes),
        train=shifted(experience.train),
        validation=shifted(experience.validation),
        test=shifted(experience.test),
    )


def _one_storage(experiences: list[Experience]) -> list[Experience]:
    """The same experiences over one training and one test storage, as schedulers want them."""
    made: list[dict[str, Split]] = [{} for _ in experiences]
    for group in (("train", "validation"), ("test",)):
        storages: dict[tuple[int, int], tuple[Tensor, Tensor | None, int]] = {}
        end = 0
        for experience in experiences:
            for name in group:
                split: Split = getattr(experience, name)
                key = (id(split.x), id(split.y))
                if key not in storages:
                    storages[key] = (split.x, split.y, end)
                    end += split.x.shape[0]
        x = torch.cat([s[0] for s in storages.values()])
        labels = [s[1] for s in storages.values()]
        y = None if labels[0] is None else torch.cat([t for t in labels if t is not None])
        for place, experience in zip(made, experiences, strict=True):
            for name in group:
                split = getattr(experience, name)
                start = storages[id(split.x), id(split.y)][2]
                place[name] = Split(x, split.index + start, y)
    return [replace(e, **splits) for e, splits in zip(experiences, made, strict=True)]
