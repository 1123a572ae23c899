"""Bad input, through the command line itself: one line that says what is wrong, the right exit code, nothing left over.

What can be seen before a run begins gives exit code 2 and leaves nothing behind; what shows later gives 1 and a run that
`cmoe resume` takes up.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmoe import checkpoint
from cmoe.cli import main
from cmoe.rundir import runs
from cmoe.streams import fetch

from .drawing import undrawn

PROGRESS = ("cmoe: reading ", "cmoe: experiment ", "cmoe: importing ", "cmoe: resuming ")
DIGITS = "stream: split_digits\ntracking: {enabled: false}\ntrainer: {max_steps: 2}\n"
Content = str | bytes | Callable[[Path], object]


@dataclass
class Case:
    """One mistake.

    Attributes:
        config: text of `c.yaml`.
        said: what the line must hold: the file or key, and what was expected.
        files: other files by path; text, bytes, or a function that writes.
        args: further arguments of `cmoe run c.yaml`.
    """

    config: str | bytes
    said: tuple[str, ...]
    files: Mapping[str, Content] = field(default_factory=dict)
    args: tuple[str, ...] = ()


def over(*args: str, said: tuple[str, ...]) -> Case:
    """A mistake on the command line."""
    return Case(DIGITS, said, args=args)


CONFIGS: dict[str, Case] = {
    # the file
    "empty file": Case("", ("c.yaml", "empty")),
    "not UTF-8": Case(b"stream: t\xf6y\n", ("c.yaml", "UTF-8")),
    "tab": Case("stream:\n\tname: split_digits\n", ("c.yaml", "line 2", "tab")),
    "key twice": Case(DIGITS + "seed: 1\nseed: 2\n", ("c.yaml", "line 5", "'seed' stands twice")),
    "a list": Case("- a\n", ("c.yaml", "mapping")),
    "no task": Case("seed: 1\n", ("stream.name", "name of a task")),
    "extends nothing": Case("extends: base.yaml\n" + DIGITS, ("c.yaml: extends", "base.yaml", "no such file")),
    "a mistake in the base": Case(
        "extends: base.yaml\n" + DIGITS, ("base.yaml: seed", "integer"), {"base.yaml": "seed: x\n"}),
    "variants is a list": Case(DIGITS + "variants: [a, b]\n", ("c.yaml", "variants", "mapping")),
    "a variant's mistake": Case(
        DIGITS + "variants: {a: {strategy: naive}, b: {strategy: repaly}}\n", ("strategy", "'replay'")),
    "a variant is a word": Case(DIGITS + "variants: {a: replay}\n", ("variants.a", "mapping")),
    "seeds is a word": Case(DIGITS + "seeds: many\n", ("seeds", "how many")),
    # sections, keys, types
    "unknown section": Case(DIGITS + "modle: mlp\n", ("c.yaml: modle", "did you mean 'model'")),
    "unknown stream option": Case("stream: {name: split_digits, experience: 2}\n", ("stream.experience", "'experiences'")),
    "unknown task": Case("stream: split_digit\n", ("c.yaml: stream", "did you mean 'split_digits'")),
    "task option type": over("stream.experiences=five", said=("command line: stream.experiences", "integer")),
    "model key": over("model.width=3", said=("command line: model.width", "option of backbone 'mlp'")),
    "model type": over("model.hidden=[a]", said=("model.hidden.0", "integer", "'a'")),
    "backbone": over("model=mpl", said=("model", "did you mean 'mlp'")),
    "head": over("model.head=multy", said=("model.head", "did you mean 'multi'")),
    "router": over("model.moe={router: topc}", said=("model.moe.router", "did you mean 'topk'")),
    "expert": over("model.moe={expert: nothing}", said=("model.moe.expert", "expert")),
    "no experts": over("model.moe={experts: 0}", said=("model.moe.experts", ">= 1")),
    "layers that are not there": over("model.moe={layers: [7]}", said=("model.moe.layers", "0 to 1")),
    "strategy": over("strategy=repaly", said=("strategy.0", "did you mean 'replay'")),
    "strategy option": over("strategy={name: replay, siez: 3}", said=("strategy.0.siez", "did you mean 'size'")),
    "strategy range": over("strategy={name: replay, size: 0}", said=("strategy.0.size", ">= 1")),
    "optimizer": over("optimizer=adma", said=("optimizer", "did you mean 'adam'")),
    "learning rate": over("optimizer.lr=0", said=("optimizer.lr", "> 0")),
    "optimizer reset": over("optimizer.reset=always", said=("optimizer.reset", "'never'")),
    "scheduler": over("scheduler=cosin", said=("scheduler", "did you mean 'cosine'")),
    "trainer": over("trainer.epochs=0", said=("trainer.epochs", ">= 1")),
    "precision": over("trainer.precision=16", said=("trainer.precision", "'32-true'")),
    "checkpoint": over("checkpoint.keep=0", said=("checkpoint.keep", ">= 1")),
    "checkpoint interval": over("checkpoint.every_seconds=-1", said=("checkpoint.every_seconds", "> 0")),
    "evaluation": over("evaluation.rows=most", said=("evaluation.rows", "'seen'")),
    "tracking": over("tracking.enabled=perhaps", said=("tracking.enabled", "true or false")),
    "seed": over("seed=-1", said=("command line: seed", ">= 0")),
    "not an override": over("trainer.epochs", said=("key=value",)),
    "no such variant": over("--only", "replay", said=("--only", "the file has none")),
    # combinations
    "scenario of the task": Case("stream: {name: digit_attributes, scenario: class}\n", ("stream.scenario", "joint")),
    "modality": over("model=byte_lm", said=("model", "image", "bytes")),
    "dense expand": over("strategy=expand", said=("model.moe", "expand")),
    "label for a router": over("model.moe={router: task_table}", said=("model.moe.router", "task label")),
    "isolated, shared head": over(
        "stream.scenario=task", "strategy=expand", "model.head=shared", "model.moe={router: task_table}",
        said=("model.head", "growing")),
    "isolated, learned router": over(
        "stream.scenario=task", "strategy={name: expand, isolate: true}", "model.moe={router: topk}",
        said=("expand", "isolat", "topk")),
    "multi head without label": over("model.head=multi", said=("model.head", "'multi'")),
    "online, many passes": over("stream.scenario=online", "trainer.epochs=2", said=("trainer.epochs", "one pass")),
    "two owners": over("strategy=[joint, cumulative]", said=("strategy.1", "one strategy")),
    "avalanche in company": over("strategy=[avalanche, replay]", said=("strategy.0", "alone")),
    "validation of nothing": over("evaluation.split=validation", "stream.validation=0", said=("evaluation.split", "'test'")),
    "two clippings": over("trainer.clip_norm=1", "trainer.clip_value=1", said=("trainer.clip_value",)),
    "load without noise": over(
        "model.moe={router: {name: topk, load: 0.1}}", said=("command line: model.moe.router.load", "noise: shazeer")),
    "a loss of task labels that are not given": over(
        "model.moe={router: {name: topk, mutual_information: 0.1}}", "strategy={name: avalanche, strategy: Naive}", "trainer.max_steps=0",
        said=("command line: model.moe.router.mutual_information", "expected 0 with 'avalanche'")),
    "tasks without experts": over(
        "model.moe={router: {name: task_table, unassigned: error}}", "stream.scenario=task",
        said=("model.moe.router.unassigned", "'modulo' or 'latest'")),
    "an option of a router": over(
        "model.moe={router: {name: cosine, noise: shazeer}}", said=("model.moe.router", "noise", "'gaussian'")),
    "an option of an expert": over(
        "model.moe={expert: {name: conv, kernel: 2}}", "model={name: convnet, patch: 1}", said=("model.moe.expert", "kernel", "odd")),
    "experts of another width": over(
        "model.moe={more: [{expert: copy}]}", said=("model.moe.more.0.expert", "copy", "64", "100")),
    "grouped products of odd sizes": over(
        "model={hidden: [6], moe: {dispatch: grouped}}", said=("model.moe.dispatch", "'loop'", "multiples of 16 bytes")),
    "fewer labels than experiences": over(
        "model.moe={router: {name: per_task, tasks: 2}}", "stream.scenario=task", said=("model.moe.router.tasks", "at least")),
    "convolutions on tokens": over(
        "model.moe={expert: conv}", said=("model.moe.expert", "tokens", "'conv', on feature maps")),
    "separate networks that expand": over(
        "strategy=[expand, separate]", "model.moe={experts: 2}", said=("strategy.1", "'separate' beside 'expand'")),
    "restarts that expand": over(
        "strategy=[expand, {name: cumulative, restart: true}]", "model.moe={experts: 2}",
        said=("strategy.1.restart", "beside 'expand'")),
    "a task behind that does not fit": Case(
        "stream: {name: split_digits, scenario: domain, then: [text_domains]}\ntracking: {enabled: false}\n", ("stream.then.0", "modality", "image")),
    "a wrong task behind": Case(
        "stream: {name: split_digits, then: [{name: split_digits, experiences: 3}]}\ntracking: {enabled: false}\n",
        ("stream.then.0", "experiences", "divisor")),
    "a GPU that is not there": over("trainer.accelerator=gpu", said=("trainer.accelerator", "GPU")),
    "native strategy": over(
        "strategy={name: avalanche, strategy: Repaly}", "trainer.max_steps=0", said=("avalanche.strategy", "did you mean 'Replay'")),
    "no divisor": over("stream.experiences=3", said=("stream.experiences", "divisor of the 10 classes")),
    "class order": over("stream.class_order=[0, 1]", said=("stream.class_order", "each of the 10 classes")),
    "heads": over("model={name: vit, dim: 30, heads: 4}", said=("model.heads", "divisor of dim 30")),
    "patch": over("model={name: vit, patch: 3}", said=("model.patch", "divisor of 8")),
    "a layer of negative width": over("model.hidden=[-5]", said=("model.hidden.0", ">= 1")),
    "a layer without units": over("model.hidden=[0]", said=("model.hidden.0", ">= 1")),
    "pictures too small": over("model=convnet", said=("model", "8")),
    "momentum that is missing": over("optimizer={name: sgd, nesterov: true}", said=("optimizer.nesterov", "momentum")),
    "threads that no machine has": over("trainer.threads=100000", said=("trainer.threads", "at most")),
    "native option": over(
        "strategy={name: avalanche, strategy: Replay, options: {mem: 3}}", "trainer.max_steps=0",
        said=("avalanche.options.mem", "did you mean 'mem_size'")),
    "no name": over("experiment=''", said=("experiment", "a name")),
    "unknown tracking": over("tracking.uri=ftp://x", said=("tracking.uri", "http", "ftp://x")),
    "more experiences than there are": over("stream.limit=99", said=("stream.limit", "at most 5", "99")),
    "more memory than there is": over("model.hidden=[99999999999]", said=("model", "memory")),
    "restricted without a label": over(
        "model.moe={router: {name: topk, restrict: task}}", said=("model.moe.router", "needs no task label")),
    "hash without words": over("model.moe={router: hash}", said=("model.moe.router", "hash", "token_ids")),
    "capacity by weight in a decoder": over(
        "stream=text_domains", "model={name: byte_lm, moe: {router: {name: topk, capacity: 1, drop: weight}}}",
        said=("model.moe.router", "causal")),
    "boundaries online": over("stream.scenario=online", "strategy=lwf", said=("strategy.0", "boundaries")),
    "output where none can be": over("tracking={enabled: true, root: /proc/none}", said=("tracking.root", "folder")),
    "native option of another type": over(
        "strategy={name: avalanche, strategy: Replay, options: {mem_size: many}}", "trainer.max_steps=0", said=("avalanche.options.mem_size", "int", "many")),
    "native option that is missing": over(
        "strategy={name: avalanche, strategy: EWC}", "trainer.max_steps=0", said=("avalanche.options", "ewc_lambda")),
    "timm's name": over("model={name: vit, model: vit_tinny}", said=("model.model", "did you mean")),
    # folders and names
    "data folder of plugins": over("--plugins", "nowhere", said=("plugins", "expected a folder", "nowhere")),
    "output in a file": Case(DIGITS, ("tracking.root", "folder"), {"taken": ""}, ("tracking.root=taken/below",)),
    "mistyped option": over("--plugin", "x", said=("--plugin", "did you mean '--plugins'")),
    "unknown resume": Case(DIGITS, ("no runs in",), args=("RESUME", "last")),
}  # fmt: skip


def npz(**arrays: Any) -> bytes:
    """The bytes of an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def png(path: Path) -> None:
    """A small picture."""
    from PIL import Image

    Image.new("L", (8, 8), 100).save(path)


X, Y = np.arange(240, dtype=np.float32).reshape(40, 6), np.arange(40) % 4
ARRAYS = "stream: {name: arrays, path: a.npz}\ntracking: {enabled: false}\n"
IMAGES = "stream: {name: image_folder, path: pictures}\ntracking: {enabled: false}\n"
TEXT = "stream: {name: text_domains, domains: {a: texts}}\nmodel: byte_lm\ntracking: {enabled: false}\n"
MNIST = "stream: split_mnist\ntracking: {enabled: false}\n"
CLINC = "stream: clinc150\nmodel: text_encoder\ntracking: {enabled: false}\n"
RAW = "data/MNIST/raw"
IDX = {
    f"{RAW}/{part}-{kind}.gz": gzip.compress(content)
    for part in ("train", "t10k")
    for kind, content in (
        ("images-idx3-ubyte", struct.pack(">HBBIII", 0, 8, 3, 20, 28, 28) + bytes(20 * 784)),
        ("labels-idx1-ubyte", struct.pack(">HBBI", 0, 8, 1, 20) + bytes(i % 10 for i in range(20))),
    )
}
LABELS = f"{RAW}/train-labels-idx1-ubyte.gz"


def _a(content: bytes, *said: str) -> Case:
    return Case(ARRAYS, said, {"a.npz": content})


DATA: dict[str, Case] = {
    "no file": Case(ARRAYS, ("stream.path", "existing file", "a.npz")),
    "not an archive": _a(b"x = 1", "a.npz", "not a .npz file"),
    "cut short": _a(npz(x=X, y=Y)[:-60], "a.npz", "not a .npz file"),
    "damaged inside": _a(npz(x=X, y=Y).replace(X[3:9].tobytes(), bytes(144)), "a.npz", "not a .npz file"),
    "pickled objects": _a(npz(x=np.array([{}] * 4, dtype=object), y=Y[:4]), "a.npz", "Python objects"),
    "no labels": _a(npz(x=X), "a.npz", "no array 'y'"),
    "an unknown array": _a(npz(x=X, label=Y), "a.npz", "'label' is not one of"),
    "lengths": _a(npz(x=X, y=Y[:30]), "a.npz: y", "one value a sample (40)"),
    "NaN": _a(npz(x=np.where(X > 50, np.nan, X), y=Y), "finite numbers"),
    "fractions as labels": _a(npz(x=X, y=Y + 0.5), "a.npz: y", "integers or strings"),
    "text as samples": _a(npz(x=X.astype(str), y=Y), "numbers", "dtype"),
    "complex samples": _a(npz(x=X.astype(np.complex64), y=Y), "numbers", "complex64"),
    "no samples": _a(npz(x=X[:0], y=Y[:0]), "a.npz", "no samples"),
    "a sample of each class": _a(npz(x=X[:4], y=Y[:4]), "test samples", "at least one"),
    "five dimensions": _a(npz(x=X.reshape(5, 2, 2, 2, 6), y=Y[:5]), "3 or 4 dimensions"),
    "train without test": _a(npz(x_train=X, y_train=Y), "a.npz", "no array 'x_test'"),
    "train and test differ": _a(npz(x_train=X, y_train=Y, x_test=X[:, :3], y_test=Y), "test samples", "shape (6,)"),
    "a class without test": _a(npz(x_train=X, y_train=Y, x_test=X, y_test=Y * 0), "test samples", "class"),
    "tasks that share classes": _a(npz(x=X, y=Y, task=np.arange(40) // 20), "'class'", "experience"),
    "vectors for pictures": Case(ARRAYS + "model: vit\n", ("model.name", "vector", "'vit'"), {"a.npz": npz(x=X, y=Y)}),
    "no pictures": Case(IMAGES, ("pictures",), {"pictures/readme.txt": "none"}),
    "a class without pictures": Case(
        IMAGES, ("pictures", "b"), {"pictures/a/1.png": png, "pictures/b/readme.txt": "none"}),
    "a broken picture": Case(
        IMAGES, ("2.png", "not an image"), {"pictures/a/1.png": png, "pictures/b/2.png": b"\x89PNG\r\n\x1a\nbroken"}),
    "train without test folder": Case(IMAGES, ("pictures", "'test' beside 'train'"), {"pictures/train/a/1.png": png}),
    "pictures in a file": Case(IMAGES, ("stream.path", "folder"), {"pictures": "x"}),
    "no text folder": Case(TEXT, ("stream.domains.a", "existing file", "texts")),
    "an empty text folder": Case(TEXT, ("stream.domains.a", "no file in"), {"texts/.hidden": "x"}),
    "texts without text": Case(TEXT, ("stream.domains.a", "0 bytes"), {"texts/a.txt": "", "texts/b.txt": b"\0\0"}),
    "too little text": Case(TEXT, ("stream.domains.a", "bytes"), {"texts/a.txt": "ab"}),
    "no domains": Case(TEXT.replace("{a: texts}", "{}"), ("stream.domains", "at least one")),
    "MNIST is not there": Case(MNIST, ("MNIST/raw/train-images-idx3-ubyte.gz", "get it with: python -c")),
    "one file of MNIST is not there": Case(
        MNIST, ("train-labels-idx1-ubyte.gz",), {k: v for k, v in IDX.items() if k != LABELS}),
    "damaged gzip": Case(MNIST, ("train-labels-idx1-ubyte.gz", "delete the file"), {**IDX, LABELS: IDX[LABELS][:-9]}),
    "not an idx file": Case(MNIST, ("train-labels", "delete the file"), {**IDX, LABELS: gzip.compress(b"hello world")}),
    "idx cut short": Case(
        MNIST, ("train-labels", "cut short"), {**IDX, LABELS: gzip.compress(gzip.decompress(IDX[LABELS])[:-3])}),
    "labels and images differ": Case(
        MNIST, ("train", "20"), {**IDX, LABELS: gzip.compress(struct.pack(">HBBI", 0, 8, 1, 9) + bytes(9))}),
    "damaged JSON": Case(
        CLINC, ("data_full.json", "delete the file"), {"data/clinc150/data_full.json": "{", "data/clinc150/domains.json": "{}"}),
    "JSON of another form": Case(
        CLINC, ("clinc150", "published form"), {"data/clinc150/data_full.json": "[1]", "data/clinc150/domains.json": "{}"}),
    "JSON without the domains": Case(
        CLINC, ("clinc150",),
        {"data/clinc150/data_full.json": '{"train": [], "val": [], "test": []}', "data/clinc150/domains.json": "{}"}),
}  # fmt: skip

TASK = """
from dataclasses import dataclass
from cmoe.streams.task import Task
{top}
@dataclass
class Mine(Task):
    {options}
    def benchmark(self, data, seed):
        {body}
"""
PLUGGED = "stream: mine\ntracking: {enabled: false}\n"


def task(
    *said: str, body: str = "return None", options: str = "size: int = 3", top: str = "", config: str = PLUGGED
) -> Case:
    """A task plugin with a mistake."""
    return Case(config, said, {"tasks/mine.py": TASK.format(top=top, options=options, body=body)})


def other(text: str, *said: str, config: str = DIGITS, args: tuple[str, ...] = ()) -> Case:
    """A plugin file with a mistake."""
    return Case(config, said, {"tasks/mine.py": text}, args)


STRATEGY = "from cmoe.strategies import Strategy\nclass Mine(Strategy):\n    '''Mine.'''\n"
PLUGINS: dict[str, Case] = {
    "syntax error": other("def (:\n", "mine.py", "line 1", config=PLUGGED),
    "no class": other("x = 1\n", "mine.py", "no public class", config=PLUGGED),
    "not UTF-8": Case(PLUGGED, ("mine.py",), {"tasks/mine.py": b"# \xf6\n"}),
    "two tasks": other(
        "from cmoe.streams import Task\nclass A(Task): pass\nclass B(Task): pass\n", "mine.py", "A and B", config=PLUGGED),
    "raises at import": task("mine.py", "cannot be imported", "ZeroDivisionError", top="1 / 0"),
    "imports what is not there": task("mine.py", "No module named 'nowhere'", top="import nowhere"),
    "exits at import": task("mine.py", "cannot be imported", "SystemExit", top="raise SystemExit(0)"),
    "an option it lacks": task("stream.siz", "did you mean 'size'", config=PLUGGED.replace("mine", "{name: mine, siz: 2}")),
    "an option's type": task(
        "stream.size", "integer", "'big'", config=PLUGGED.replace("mine", "{name: mine, size: big}")),
    "an option that it needs": task("stream.size", "required", options="size: int"),
    "a default of another type": task("mine.py: stream.size", "integer", options="size: int = 'many'"),
    "an annotation that nobody knows": task("mine", "size", options="size: Quantity = 3"),
    "an option called name": task("mine.py", "'name'", options="name: str = 'x'"),
    "no @dataclass": other(
        "from cmoe.streams import Task\nclass Mine(Task):\n    size: int = 3\n", "mine.py", "@dataclass", config=PLUGGED),
    "no benchmark()": other(
        "from cmoe.streams import Task\nclass Mine(Task):\n    pass\n", "task mine", "must define benchmark", config=PLUGGED),
    "benchmark() raises": task("task mine", "benchmark() failed", "KeyError", body="raise KeyError('x')"),
    "benchmark() raises two lines": task("task mine", "one two", body=r"raise ValueError('one\ntwo')"),
    "benchmark() returns nothing": task("task mine", "Avalanche benchmark", "NoneType"),
    "benchmark() returns a list": task("task mine", "Avalanche benchmark", "list", body="return [1]"),
    "no data at all": task(
        "task mine", "at least one", options="modality = 'vector'",
        body="import torch; from cmoe.streams import class_incremental as c; e = (torch.zeros(0, 3), torch.zeros(0).long());"
             " return c(self, seed, train=e, test=e)"),
    "labels missing": task(
        "task mine", options="modality = 'vector'",
        body="import torch; from cmoe.streams import class_incremental as c; x = torch.zeros(8, 3);"
             " return c(self, seed, train=(x,), test=(x,))"),
    "fewer labels than samples": task(
        "task mine", "8", options="modality = 'vector'",
        body="import torch; from cmoe.streams import class_incremental as c; x = torch.zeros(8, 3);"
             " return c(self, seed, train=(x, torch.arange(4)), test=(x, torch.arange(8)))"),
    "a builtin's name, broken": Case(
        "stream: split_digits\n", ("split_digits.py", "line 1"), {"tasks/split_digits.py": "def (:\n"}),
    "a strategy that fails at once": other(
        STRATEGY + "    def setup(self, context):\n        raise RuntimeError('no')\n",
        "strategy mine", "RuntimeError: no", args=("strategy=mine",)),
    "a strategy as a task": other(STRATEGY, "stream", "expected a task", config=PLUGGED),
    "a strategy's option": other(
        STRATEGY + "    def __init__(self, rate: float = 0.1): pass\n", "strategy.0.rate", "number",
        args=("strategy={name: mine, rate: fast}",)),
    "a transform that fails": task(
        "task mine", "ZeroDivisionError", options="modality = 'vector'",
        body="import torch; from cmoe.streams import class_incremental as c; d = (torch.rand(20, 3), torch.arange(20) % 2);"
             " return c(self, seed, train=d, test=d)\n    def transform(self):\n        return lambda *a, **k: 1 / 0"),
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, "reachable", lambda *_: False)
    undrawn(monkeypatch.setattr)
    return tmp_path


def run(case: Case, here: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the one line of a command line on the case's files."""
    config = case.config
    (here / "c.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
    for name, content in case.files.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if case.args[:1] == ("RESUME",):
        arguments = ["resume", *case.args[1:]]
    else:
        arguments = ["run", "c.yaml", "--data", str(here / "data"), *case.args]
    code = main.main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if not line.startswith((*PROGRESS, "["))]
    assert len(lines) == 1, err
    assert lines[0].startswith("cmoe: ")
    return code, lines[0]


def cases(table: Mapping[str, Case]) -> list[Any]:
    return [pytest.param(c, id=n) for n, c in table.items()]


@pytest.mark.parametrize("case", [*cases(CONFIGS), *cases(DATA), *cases(PLUGINS)])
def test_seen_before_the_run_begins(case: Case, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = run(case, here, capsys)
    assert code == 2, line
    for part in case.said:
        assert part in line, line
    left = [str(p.relative_to(here)) for p in (here / "mlruns").rglob("*") if p.is_file() or p.parent.name == "runs"]
    assert left == []


def test_there_are_enough_cases() -> None:
    assert len(CONFIGS) + len(DATA) + len(PLUGINS) >= 100


def test_the_error_is_a_document_with_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "c.yaml").write_text(DIGITS)
    assert main.main(["run", "c.yaml", "stream.experiences=3", "--json"]) == 2
    out, _ = capsys.readouterr()
    document = json.loads(out)
    assert document["exit"] == 2
    assert "stream.experiences: expected a divisor" in document["error"]


def test_a_traceback_only_with_debug(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "c.yaml").write_text(DIGITS)
    assert main.main(["run", "c.yaml", "stream.experiences=3", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_broken_plugin_that_nobody_names_is_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "tasks").mkdir()
    (here / "tasks" / "bad.py").write_text("def (:\n")
    (here / "tasks" / "loud.py").write_text("raise SystemExit('imported')\n")
    (here / "c.yaml").write_text(DIGITS)
    assert main.main(["run", "c.yaml", "stream.limit=1", "trainer.max_steps=1"]) == 0
    assert "bad.py: line 1" in capsys.readouterr().err


# -- what shows only when the run is under way ------------------------------------------------------------------------


def plugin_strategy(method: str) -> Mapping[str, Content]:
    return {"tasks/mine.py": STRATEGY + f"    {method}\n"}


MINE = ("strategy=mine",)
LATER: dict[str, Case] = {
    "the loss is NaN": over("optimizer.lr=1e30", "trainer.log_every=1", said=("the loss is", "optimizer.lr")),
    "NaN between two points of the curve": over("optimizer.lr=1e30", "trainer.log_every=50", said=("the loss is",)),
    "NaN without a curve": over("optimizer.lr=1e30", "trainer.log_every=0", said=("the loss is",)),
    "after_step raises": Case(DIGITS, ("KeyError",), plugin_strategy(
        "def after_step(self, batch, output): raise KeyError('x')"), MINE),
    "losses of two lines": Case(DIGITS, ("RuntimeError", "one"), plugin_strategy(
        r"def losses(self, output, batch): raise RuntimeError('one\ntwo')"), MINE),
    "after_experience raises": Case(DIGITS, ("ZeroDivisionError",), plugin_strategy(
        "def after_experience(self, segment): 1 / 0"), MINE),
    "a user's mistake shows late": Case(DIGITS, ("too late",), plugin_strategy(
        "def after_experience(self, segment):\n        from cmoe.errors import UserError\n        raise UserError('too late')"),
        MINE),
    "everything is frozen": Case(DIGITS, ("nothing is left to train",), plugin_strategy(
        "def before_experience(self, segment): self.context.model.requires_grad_(False)"), MINE),
    "a state that cannot be loaded": Case(DIGITS, ("strategies.0.x", "tensors and plain containers"), plugin_strategy(
        "def state_dict(self): return {'x': object() if hasattr(self, 'late') else 1}\n"
        "    def after_experience(self, segment): self.late = True"), MINE),
}  # fmt: skip


@pytest.mark.parametrize("case", cases(LATER))
def test_shows_later(case: Case, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = run(case, here, capsys)
    assert code == 1, line
    for part in case.said:
        assert part in line, line
    (folder,) = runs(here / "mlruns")
    assert f"cmoe resume {folder.id}" in line
    facts = folder.facts()
    assert facts["status"] == "FAILED"
    assert facts["error"]
    assert "\n" not in facts["error"]
    assert checkpoint.load(folder.state) is not None
    # resumable: it is taken up, and fails as before
    assert main.main(["resume", folder.id]) == 1
    assert case.said[0] in capsys.readouterr().err


def test_a_full_disk_can_be_resumed_when_there_is_room(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    original, calls = torch.save, []

    def full(*args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        original(*args, **options)

    monkeypatch.setattr(torch, "save", full)
    code, line = run(Case(DIGITS, ()), here, capsys)
    assert code == 1
    assert "No space left on device" in line
    monkeypatch.setattr(torch, "save", original)
    (folder,) = runs(here / "mlruns")
    assert folder.facts()["status"] == "FAILED"
    assert main.main(["resume", folder.id]) == 0
    facts = folder.facts()
    assert facts["status"] == "FINISHED"
    reference = here / "reference"
    assert main.main(["run", "c.yaml", f"tracking.root={reference}"]) == 0
    assert runs(reference)[0].facts()["metrics"] == facts["metrics"]
