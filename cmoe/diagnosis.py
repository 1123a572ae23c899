"""What a row says about the model's experts: a document of plain containers, see `diagnose`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmoe import checkpoint
from cmoe.evaluation import Evaluator
from cmoe.learners.answers import Answers
from cmoe.learners.evaluate import Traffic
from cmoe.learners.examine import Examination, LayerAnswers, Sample, evenly, examine
from cmoe.learners.reading import read_bytes, read_classes
from cmoe.moe import MoELayer, diagnostics
from cmoe.moe.diagnostics import Flow
from cmoe.streams import Experience

LOGITS = 2**22  # of a batch of texts: 256 for each byte fill the memory sooner than the layers do

Document = dict[str, Any]


def diagnose(
    evaluator: Evaluator, row: int, seen: Sequence[int], drift: Mapping[int, float], seed: int
) -> Document | None:
    """What was measured of the experts in the row that `evaluator` has just evaluated; None without any to measure.

    Lists stand in the order of `experiences` (those learned) or of a layer's `experts` (ids); what is not defined is None,
    and `reasons` say why.

    Args:
        evaluator: with its last row's traffic.
        row: its index.
        seen: classes known so far.
        drift: share of tokens with another best expert than in the row before, by experience.
        seed: of what a router draws while it is asked; the global generators stay as they are.
    """
    level, layers = evaluator.plan.evaluation["diagnostics"], evaluator.model.moe_layers()
    if level == "none" or not layers or not evaluator.traffic:
        return None
    experiences = sorted(evaluator.traffic)
    document: Document = {
        "row": row,
        "level": level,
        "experiences": experiences,
        "names": [evaluator.stream.experiences[j].name for j in experiences],
        "drift": [drift.get(j) for j in experiences],
        "layers": {name: _routing(name, layer, evaluator.traffic) for name, layer in layers.items()},
        "reasons": {},
    }
    if level != "all":
        return document
    own = [s for s in evaluator.strategies if s.owns_predict or s.infers_task]
    if own:
        document["reasons"]["experts"] = f"strategy {type(own[0]).__name__} has its own way to predict"
        return document
    samples = [_sample(evaluator, evaluator.stream.experiences[j], seen) for j in experiences]
    document["view"] = samples[0][1]
    document["samples"] = [sum(len(x) for x, _ in sample.batches) for sample, _ in samples]
    found = _examined(evaluator, [sample for sample, _ in samples], seed)
    document["model"] = _answers(found.model, experiences)
    for name, entry in document["layers"].items():
        if name in found.left_out:
            entry["reasons"]["experts"] = found.left_out[name]
        elif name in found.layers:
            _of_experts(entry, found.layers[name], experiences)
    return document


def _examined(evaluator: Evaluator, samples: Sequence[Sample], seed: int) -> Examination:
    held = checkpoint.generators()
    checkpoint.seed_generators(seed)
    evaluator.model.eval()
    try:
        with evaluator.placement.forward():
            return examine(evaluator.model, samples, evaluator.placement.device)
    finally:
        evaluator.model.train()
        checkpoint.restore_generators(held)


def _sample(evaluator: Evaluator, experience: Experience, seen: Sequence[int]) -> tuple[Sample, str]:
    """Samples evenly over an experience's split, and the view in which predictions on them are made."""
    split, evaluation, head = evaluator.split(experience), evaluator.plan.evaluation, evaluator.model.head
    split = split.subset(evenly(len(split), min(len(split), evaluation["diagnostics_samples"])))
    size, j = evaluation["batch_size"], experience.index
    if evaluator.stream.language:
        blocks = head.block_tasks
        read = read_bytes(blocks.index(j) if j in blocks else 0, len(blocks))
        size = min(size, max(LOGITS // (256 * evaluator.stream.input_shape[0]), 1))
        return Sample(j, evaluator.batches(experience, split, size), read), "next_byte"
    outputs = evaluator.outputs(experience, seen)
    # a multi-head may have an output for the same class in each task, which only the label tells apart
    labelled = not outputs.report_free or evaluator.model.needs_task() or head.kind == "multi"
    read = read_classes(head.unit_classes(), outputs.task if labelled else outputs.free)
    return Sample(j, evaluator.batches(experience, split, size), read), "task_il" if labelled else "class_il"


def _routing(name: str, layer: MoELayer, traffic: Mapping[int, Traffic]) -> Document:
    """A layer's load and what follows from it."""
    entry: Document = {"experts": list(layer.ids), "reasons": {}}
    kind = next((t.kinds[name] for t in traffic.values() if name in t.kinds), None)
    flows = [traffic[j].flows.get(name, Flow()) for j in sorted(traffic)]
    total = sum(flows[1:], flows[0])
    if kind or not total.tokens:
        entry["reasons"]["router"] = f"routing of kind '{kind}'" if kind else "no token came to its router"
        return entry
    counts = dict.fromkeys(layer.ids, 0) | total.load
    counts_ME = torch.tensor([[flow.load.get(e, 0) for e in layer.ids] for flow in flows])
    entry |= {
        "load": counts_ME.tolist(),
        "load_cv": _number(diagnostics.load_cv(counts)),
        "load_max_over_mean": _number(diagnostics.max_over_mean(counts)),
        "load_entropy": _number(diagnostics.load_entropy(counts)),
        "dead": diagnostics.dead(counts),
        "entropy": total.mean_entropy,
        "dropped_share": total.dropped_share,
        "unserved_share": total.unserved_share,
        "flops_per_token": _number(diagnostics.active_flops(layer, total.load, total.tokens)),
        "task_information": _number(diagnostics.mutual_information(counts_ME)),
        "task_information_normalised": _number(diagnostics.normalised_mutual_information(counts_ME)),
        "task_purity": _number(diagnostics.purity(counts_ME)),
        "purity_of_experts": _numbers(diagnostics.purity_of_experts(counts_ME)),
    }
    return entry


def _of_experts(entry: Document, found: LayerAnswers, experiences: Sequence[int]) -> None:
    """Adds to a layer's document what its experts were asked."""
    outputs_ETO = torch.stack([torch.cat(found.outputs[e]) for e in found.experts])
    choices_EN = torch.stack([found.alone[e].choices() for e in found.experts])
    pairs = {
        "cosine": diagnostics.pairwise_cosine(outputs_ETO),
        "cka": diagnostics.linear_cka(outputs_ETO),
        "disagreement": diagnostics.disagreement(choices_EN),
    }
    entry["pairs"] = {name: _numbers(matrix) for name, matrix in pairs.items()}
    entry |= {name: diagnostics.mean_of_pairs(matrix) for name, matrix in pairs.items()}
    entry["alone"] = [_answers(found.alone[e], experiences) for e in found.experts]
    entry["without"] = [_answers(found.without[e], experiences) for e in found.experts if e in found.without]
    entry["pools"] = {name: _answers(pool, experiences) for name, pool in found.pools.items()}
    entry["reasons"] |= found.reasons


def _answers(answers: Answers, experiences: Sequence[int]) -> Document:
    table = answers.to_dict()
    if table:
        by_experience = table["accuracies"]
        table |= {name: _number(table[name]) for name in ("ece", "nll", "brier")}
        table["accuracies"] = [by_experience.get(j) for j in experiences]
        table["reliability"] = [[n, _number(c), _number(a)] for n, c, a in table["reliability"]]
    return table


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _numbers(values: Tensor) -> list[Any]:
    return [_numbers(v) if v.dim() else _number(float(v)) for v in values]
