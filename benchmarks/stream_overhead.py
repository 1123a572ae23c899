"""What the platform costs beside a hand-written loop, beside Avalanche's own, and with tracking on.

    python benchmarks/stream_overhead.py [--json] [--repeats N] [--data DIR]

One process, one thread, the same model, data and batch size; the contestants alternate and the medians are compared.
MNIST is used where it is at hand, random images of its shape elsewhere (the time does not depend on the pixels).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import nn

from cmoe.backbones import MLP
from cmoe.fit import Placement, fit
from cmoe.learners import Head, Learner, Model
from cmoe.learners.objective import Classification
from cmoe.strategies import Context, Replay
from cmoe.streams import BatchScheduler, Experience, Scale, Split, Stream

CPU = Placement("cpu", "32-true")
Timed = Callable[[], float]


def images(data: str | None) -> tuple[torch.Tensor, torch.Tensor, str]:
    """MNIST's training images (N, 1, 28, 28) uint8 and labels, and where they are from."""
    from cmoe.errors import UserError
    from cmoe.streams import data_folder
    from cmoe.streams.readers import mnist

    try:
        (x, y), _ = mnist(data_folder(data))
    except UserError:
        generator = torch.Generator().manual_seed(0)
        x = torch.randint(0, 256, (60_000, 1, 28, 28), dtype=torch.uint8, generator=generator)
        return x, torch.randint(0, 10, (60_000,), generator=generator), "random images"
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    return (x if x.dim() == 4 else x.unsqueeze(1)), y.long(), "MNIST"


def network(hidden: Sequence[int]) -> nn.Sequential:
    """The plain network, 784 to 10."""
    layers: list[nn.Module] = []
    before = 784
    for size in hidden:
        layers += [nn.Linear(before, size), nn.ReLU()]
        before = size
    return nn.Sequential(*layers, nn.Linear(before, 10))


def by_hand(x: torch.Tensor, y: torch.Tensor, hidden: Sequence[int], batch: int, steps: int) -> Timed:
    """What a researcher writes: floats in memory, indexed in batches."""
    inputs = x.flatten(1).float() / 255
    model = network(hidden)
    optimizer = torch.optim.SGD(model.parameters(), 0.03)

    def run() -> float:
        begin = time.perf_counter()
        order = torch.randperm(len(inputs))
        for step in range(steps):
            rows = order[step * batch : (step + 1) * batch]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[rows]), y[rows])
            loss.backward()
            optimizer.step()
        return time.perf_counter() - begin

    return run


def stream_of(x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor) -> Stream:
    """A stream of one experience on these rows."""
    split, empty = Split(x, rows, y), Split(x, rows[:0], y)
    experience = Experience(0, "all", 0, tuple(range(10)), split, empty, empty)
    names = tuple(map(str, range(10)))
    return Stream("bench", "image", "class", (1, 28, 28), 10, names, None, [experience], [(0,)], Scale(), "", None)  # ty: ignore[invalid-argument-type]


def ours(
    x: torch.Tensor,
    y: torch.Tensor,
    hidden: Sequence[int],
    batch: int,
    steps: int,
    memory: int = 0,
    log: Any = None,
    rows: torch.Tensor | None = None,
) -> Timed:
    """A phase as the runner makes it: scheduler, Lightning Trainer, learner, strategies."""
    rows = torch.arange(len(x)) if rows is None else rows
    stream = stream_of(x, y, rows)
    backbone = MLP(list(hidden), input_shape=(1, 28, 28))
    head = Head(backbone.width, "shared")
    head.add(range(10))
    model = Model(backbone, head)
    objective = Classification(head, "all")
    strategies = []
    if memory:
        replay = Replay(size=memory, batch=batch)
        replay.setup(_context(stream, model, objective, batch))
        strategies.append(replay)
    learner = Learner(model, objective, strategies, log=log, log_every=50 if log else 0)
    objective.begin(range(10), range(10))
    count = 0

    def run() -> float:
        nonlocal count
        begin = time.perf_counter()
        count += 1
        loader = BatchScheduler(
            [(stream.experiences[0].train, 0)], stream.transform, batch_size=batch, max_steps=steps, experience=count
        )
        learner.begin_phase(torch.optim.SGD(model.parameters(), 0.03), None)
        fit(learner, loader, CPU, lambda: None)
        return time.perf_counter() - begin

    return run


def _context(stream: Stream, model: Model, objective: Classification, batch: int) -> Context:
    return Context(
        stream,
        model,
        objective,
        seed=lambda purpose: 0,
        fresh_model=lambda purpose: model,
        device=CPU.device,
        event=lambda *_: None,
        options={"trainer": {"batch_size": batch}},
    )


def avalanche(
    x: torch.Tensor, y: torch.Tensor, hidden: Sequence[int], batch: int, memory: int, rows: torch.Tensor
) -> Timed:
    """Avalanche's native Naive or Replay over its usual pipeline: a torchvision data set of PIL images, ToTensor and
    Normalize for each sample, its own data loader without worker processes. The first run fills the buffer."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training import Naive
    from avalanche.training import Replay as NativeReplay
    from avalanche.training.plugins import EvaluationPlugin
    from PIL import Image
    from torch.utils.data import Dataset
    from torchvision import transforms

    class Images(Dataset):
        """As torchvision's MNIST: a PIL image at each access."""

        def __init__(self) -> None:
            self.data, self.targets = x.index_select(0, rows).squeeze(1), y.index_select(0, rows).tolist()

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return Image.fromarray(self.data[i].numpy()), self.targets[i]

    to_input = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    groups = {"train": (to_input, None), "eval": (to_input, None)}
    data = as_classification_dataset(Images(), transform_groups=groups)  # ty: ignore[invalid-argument-type]
    experience = benchmark_from_datasets(train=[data]).streams["train"][0]
    model = nn.Sequential(nn.Flatten(), *network(hidden))
    common: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.03),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": batch,
        "train_epochs": 1,
        "evaluator": EvaluationPlugin(),
    }
    strategy = NativeReplay(mem_size=memory, **common) if memory else Naive(**common)

    def run() -> float:
        begin = time.perf_counter()
        strategy.train(experience, num_workers=0)
        return time.perf_counter() - begin

    return run


def compare(first: Timed, second: Timed, repeats: int) -> tuple[float, float]:
    """Medians of alternating repeats, after one of each to warm up."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(repeats):
        for k in (0, 1) if i % 2 == 0 else (1, 0):
            times[k].append((first, second)[k]())
    return statistics.median(times[0]), statistics.median(times[1])


def tracked(folder: Path) -> tuple[Callable[[dict[str, float], int], None], Callable[[], None]]:
    """A log callback into a tracker that delivers to a SQLite store, and what ends it."""
    from cmoe.tracking.store import client, locate
    from cmoe.tracking.tracker import Tracker

    location = locate(folder / "mlruns")
    client(location)  # the migrations of a new database are no steady state
    (folder / "run").mkdir()
    tracker = Tracker(folder / "run", "bench", "bench", location)
    offset = 0

    def log(values: dict[str, float], step: int) -> None:
        nonlocal offset
        offset += 1
        tracker.metrics(values, offset)
        if offset % 200 == 0:  # about what a checkpoint every 30 s would commit
            tracker.commit(tracker.sync())

    return log, lambda: print("delivered:", tracker.finish("FINISHED"), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--data", help="folder of data sets")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    x, y, source = images(args.data)
    wide, narrow = (400, 400), (100, 100)
    rows: list[dict[str, Any]] = []

    def add(what: str, bar: str, ratio: float, ok: bool, reference: float, own: float, steps: int) -> None:
        per = 1e3 / steps
        rows.append(
            {"what": what, "bar": bar, "ratio": round(ratio, 3), "ok": ok, "reference_ms_per_step": round(reference * per, 4), "cmoe_ms_per_step": round(own * per, 4)}
        )  # fmt: skip

    for batch, hidden, steps in ((128, wide, 400), (10, narrow, 2000)):
        hand, own = compare(by_hand(x, y, hidden, batch, steps), ours(x, y, hidden, batch, steps), args.repeats)
        add(
            f"time beside a hand-written loop, batch {batch}", "<= 1.3", own / hand, own / hand <= 1.3, hand, own, steps
        )
    first_two = (y < 2).nonzero().squeeze(1)
    for batch, bar in ((128, 4.0), (10, 2.0)):
        for memory in (0, 500):
            steps = -(-len(first_two) // batch)
            native, own = compare(
                avalanche(x, y, narrow, batch, memory, first_two),
                ours(x, y, narrow, batch, 0, memory, rows=first_two),
                max(3, args.repeats // 3),
            )
            name = "Replay" if memory else "Naive"
            add(
                f"speed over Avalanche's {name}, batch {batch}",
                f">= {bar:g}",
                native / own,
                native / own >= bar,
                native,
                own,
                steps,
            )
    with tempfile.TemporaryDirectory() as folder:
        log, finish = tracked(Path(folder))
        off, on = compare(ours(x, y, narrow, 10, 6000), ours(x, y, narrow, 10, 6000, log=log), args.repeats)
        finish()
    add("tracking on beside off, batch 10", "<= 1.03", on / off, on / off <= 1.03, off, on, 6000)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, 1 thread, {source}"
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}, indent=1))
        return
    print(f"{machine}\n\n| what | bar | measured | reference ms/step | cmoe ms/step | |\n|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['what']} | {r['bar']} | {r['ratio']:.2f} | {r['reference_ms_per_step']:.3f} | {r['cmoe_ms_per_step']:.3f} | {'met' if r['ok'] else 'missed'} |"
        )


if __name__ == "__main__":
    main()
