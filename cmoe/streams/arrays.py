"""From users' arrays to raw storage, labels, class orders and held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cmoe.errors import UserError
from cmoe.streams.seeding import generator

if TYPE_CHECKING:
    from cmoe.streams.task import Modality, Task


def storage(x: Any, modality: Modality, what: str) -> Tensor:
    """Samples as raw storage, sharing memory with `x` where its type allows.

    uint8 stays; token ids stay int16 or int32; all else becomes float32. Images without channels, (N, H, W), get one.

    Args:
        x: (N, ...) array or tensor.
        modality: what the samples are.
        what: for error messages, such as 'training samples'.

    Raises:
        UserError: not numbers, not finite, or not the number of dimensions that the modality has.
    """
    array = x if isinstance(x, Tensor) else np.require(np.asarray(x), requirements=["C", "W"])
    if not isinstance(array, Tensor):
        if array.dtype.kind not in "buif":
            raise UserError(f"{what}: expected numbers, got dtype {array.dtype}")
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:
            array = array.astype(np.int64)
        array = torch.from_numpy(array)
    tokens = modality in ("text", "bytes")
    dimensions = {"image": (3, 4), "vector": (2,), "text": (2,), "bytes": (2,)}[modality]
    if array.ndim not in dimensions:
        raise UserError(
            f"{what}: expected {' or '.join(map(str, dimensions))} dimensions for modality '{modality}', "
            f"got shape {tuple(array.shape)}"
        )
    if tokens:
        if array.dtype.is_floating_point:
            raise UserError(f"{what}: expected integer token ids, got {array.dtype}")
        return array if array.dtype in (torch.int16, torch.int32) else array.to(torch.int32)
    if array.dtype != torch.uint8:
        array = array.to(torch.float32)
        if not bool(torch.isfinite(array).all()):
            raise UserError(f"{what}: expected finite numbers, got NaN or infinity")
    return array.unsqueeze(1) if modality == "image" and array.ndim == 3 else array


def labels(y: Any, rows: int, what: str) -> Tensor:
    """Class labels as int64, (N,).

    Raises:
        UserError: not one non-negative integer a sample.
    """
    array = y if isinstance(y, Tensor) else torch.from_numpy(np.array(y))
    if array.dtype.is_floating_point or array.dtype.is_complex or array.ndim != 1:
        raise UserError(f"{what}: expected one integer label a sample, got {array.dtype} of shape {tuple(array.shape)}")
    if array.shape[0] != rows:
        raise UserError(f"{what}: expected {rows} labels, one a sample, got {array.shape[0]}")
    if rows and int(array.min()) < 0:
        raise UserError(f"{what}: expected labels 0, 1, 2 ..., got {int(array.min())}")
    return array.to(torch.int64)


def hold_out(y: Tensor, share: float, salt: str = "validation", among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Split rows in two, class by class, the same way in every run.

    Args:
        y: (N,) labels.
        share: of each class's rows that is held out, rounded; at least one where there are two.
        salt: tells one split from another.
        among: (n,) ascending rows to split; default is all.

    Returns:
        Kept and held-out rows, both ascending.
    """
    rows = torch.arange(y.shape[0]) if among is None else among
    held = torch.zeros(y.shape[0], dtype=torch.bool)
    if share > 0:
        here = y.index_select(0, rows)
        for label in torch.unique(here).tolist():
            own = rows[here == label]
            count = min(max(1, round(share * len(own))), len(own) - 1)
            held[own[torch.randperm(len(own), generator=generator(salt, label))[:count]]] = True
    chosen = held.index_select(0, rows)
    return rows[~chosen], rows[chosen]


def ordering(task: Task, count: int, seed: int, what: str) -> list[int]:
    """The order that `class_order` asks for, of `count` things.

    Raises:
        UserError: a list that does not hold each once.
    """
    wanted = task.class_order
    if wanted == "natural":
        return list(range(count))
    if wanted == "shuffled":
        return torch.randperm(count, generator=generator("order", seed)).tolist()
    if isinstance(wanted, str):
        raise UserError(f"stream.class_order: expected 'natural', 'shuffled' or a list, got '{wanted}'")
    if sorted(wanted) != list(range(count)):
        wrong = [c for c in wanted if not 0 <= c < count] or [c for c in set(wanted) if list(wanted).count(c) > 1]
        missed = sorted(set(range(count)) - set(wanted))
        fault = f"{wrong[0]} is wrong or twice there" if wrong else f"{missed[0]} is missing"
        raise UserError(f"stream.class_order: expected each of the {count} {what} 0..{count - 1} once; {fault}")
    return list(wanted)


def grouped(count: int, experiences: int) -> list[list[int]]:
    """0 .. count-1 in `experiences` equal runs.

    Raises:
        UserError: they do not divide evenly.
    """
    if experiences < 1 or count % experiences:
        divisors = ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)
        raise UserError(
            f"stream.experiences: expected a divisor of the {count} classes ({divisors}), got {experiences}"
        )
    size = count // experiences
    return [list(range(i, i + size)) for i in range(0, count, size)]


def named(names: Sequence[str] | None, count: int, prefix: str) -> tuple[str, ...]:
    """`names`, or made-up ones; as many as `count`."""
    if names is None:
        return tuple(f"{prefix}{i}" for i in range(count))
    if len(names) < count:
        raise UserError(f"class_names: expected {count} names, got {len(names)}")
    return tuple(names)
