"""The two kinds of routing that assign nothing: slots that mix tokens, and experts that are merged.

Soft MoE: Puigcerver et al. 2023, https://arxiv.org/abs/2308.00951. SMEAR: Muqeeth et al. 2023,
https://arxiv.org/abs/2306.03745.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cmoe.moe.experts.base import Expert, batched_linear, dense_linear
from cmoe.moe.grouped import Rows
from cmoe.moe.routing import MergeRouting, Routing, SoftRouting
from cmoe.moe.view import ExpertView

if TYPE_CHECKING:
    from cmoe.moe.experts.base import Cohorts


def mix(x_TD: Tensor, routing: SoftRouting, view: ExpertView, cohorts: Cohorts) -> Tensor:
    """Each expert on its slots, which are weighted means of tokens; each token gets a weighted mean of slots, (T, O)."""
    groups, length, _ = routing.dispatch_GLS.shape
    x_TD = without_padding(x_TD, routing)
    flat_TD, unit = x_TD.flatten(1), x_TD.shape[1:]
    if routing.place_T is None:
        x_GLD = flat_TD.view(groups, length, flat_TD.shape[1])
    else:
        padded = flat_TD.new_zeros(groups * length, flat_TD.shape[1])
        x_GLD = padded.index_copy(0, routing.place_T, flat_TD).view(groups, length, flat_TD.shape[1])
    slots_GSD = torch.bmm(routing.dispatch_GLS.to(x_TD.dtype).transpose(1, 2), x_GLD)
    outputs, first, out_shape = [], 0, unit
    for key, rows in view.slice(routing.columns or None).parts:
        n = cohorts[key].n if rows is None else len(rows)
        own_GSD = slots_GSD[:, first : first + n * routing.slots]
        first += n * routing.slots
        own_EGSD = own_GSD.unflatten(1, (n, routing.slots)).transpose(0, 1)
        out_ENO = cohorts[key].blocks(own_EGSD.flatten(1, 2).unflatten(2, unit), rows)
        out_shape = (*unit[:-1], out_ENO.shape[-1])
        out_EGSO = out_ENO.flatten(2).unflatten(1, (groups, routing.slots))
        outputs.append(out_EGSO.transpose(0, 1).flatten(1, 2))
    y_GLO = torch.bmm(routing.combine_GLS.to(x_TD.dtype), torch.cat(outputs, 1))
    y = y_GLO.reshape(groups * length, *out_shape)
    return y if routing.place_T is None else y.index_select(0, routing.place_T)


def merge(x_TD: Tensor, routing: MergeRouting, view: ExpertView, cohorts: Cohorts) -> Tensor:
    """Each group's tokens through the one expert that its weights make of all, (T, O).

    Raises:
        ValueError: the experts are not of one kind and size.
    """
    columns = view.slice(routing.columns or None)
    x_TD = without_padding(x_TD, routing)
    parts, first = [], 0
    for key, rows in columns.parts:
        cohort = cohorts[key]
        n = cohort.n if rows is None else len(rows)
        parts.append((cohort, rows, routing.weights_GE[:, first : first + n]))
        first += n
    head = parts[0][0]
    shapes = {tuple(None if p is None else p.shape[1:] for p in cohort.stacked()) for cohort, _, _ in parts}
    if len(shapes) > 1 or len({type(cohort) for cohort, _, _ in parts}) > 1:
        raise ValueError("merging needs experts of one kind and size in a layer")
    merged: list[Tensor | None] = []
    for position, own in enumerate(head.stacked()):
        if own is None:
            merged.append(None)
            continue
        total: Tensor | None = None
        for cohort, rows, weights_GE in parts:
            stack = cohort.stacked()[position]
            assert stack is not None
            if rows is not None:
                stack = stack.index_select(0, torch.tensor(rows, device=stack.device))
            share = (weights_GE.to(stack.dtype) @ stack.flatten(1)).view(len(weights_GE), *stack.shape[1:])
            total = share if total is None else total + share
        merged.append(total)
    return without_padding(_through(x_TD, routing.group_T, len(routing.weights_GE), merged, head), routing)


def without_padding(x_TD: Tensor, routing: Routing) -> Tensor:
    """0 where padding is, which may be anything: infinity times a weight of 0 would not be 0."""
    if routing.valid is None:
        return x_TD
    return x_TD.masked_fill(~routing.valid.view(-1, *[1] * (x_TD.dim() - 1)), 0.0)


def _through(x_TD: Tensor, group_T: Tensor | None, groups: int, merged: list[Tensor | None], head: Expert) -> Tensor:
    if group_T is None:
        return head.compute(x_TD, dense_linear, *(None if p is None else p.squeeze(0) for p in merged))
    counts = torch.bincount(group_T, minlength=groups).tolist()
    order_T = group_T.argsort(stable=True)
    x_sorted = x_TD.index_select(0, order_T)
    if counts and min(counts) == max(counts):
        blocks = head.compute(x_sorted.unflatten(0, (groups, counts[0])), batched_linear, *merged)
        out = blocks.flatten(0, 1)
    else:
        out = head.on_rows(x_sorted, Rows(counts, None, len(x_TD), x_TD.device, "loop"), merged)
    return torch.zeros_like(out).index_copy(0, order_T, out)
