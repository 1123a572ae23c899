"""`cmoe new-task`: a task plugin and its test, which pass as written."""

from __future__ import annotations

import argparse
import keyword
from pathlib import Path

from cmoe.cli.common import DONE, Parser, catalogue, emit
from cmoe.errors import UserError
from cmoe.plugins.builtin import KINDS, an

PLUGIN = '''"""{title}: say here what the data is and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cmoe.config.types import Positive, PositiveInt
from cmoe.streams.task import Modality, Task

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

    from cmoe.streams.data import DataFolder


@dataclass
class {cls}(Task):
    """Clouds of points, one for each class: replace them with your data.

    Options:
        classes: how many classes there are.
        experiences: in how many groups of classes they come; a divisor of `classes`.
        spread: standard deviation of a cloud.
    """

    modality: ClassVar[Modality] = "vector"

    classes: PositiveInt = 6
    experiences: PositiveInt = 3
    spread: Positive = 0.3

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        # heavy imports stay in here, so that a mistyped option is reported at once
        import torch

        from cmoe.streams import class_incremental

        random = torch.Generator().manual_seed(0)
        centres = torch.randn(self.classes, 8, generator=random)

        def cloud(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
            y = torch.arange(self.classes).repeat_interleave(samples)
            noise = torch.randn(len(y), 8, generator=random)
            return centres.index_select(0, y) + self.spread * noise, y

        return class_incremental(self, seed, train=cloud(50), test=cloud(10), experiences=self.experiences)
'''

TEST = '''"""The task {name}: run with `pytest {test}`."""

from __future__ import annotations

from pathlib import Path

from cmoe.plugins import Catalogue
from cmoe.streams import data_folder, open_stream

TASKS = Path(__file__).resolve().parents[1] / "tasks"


def opened(folder: Path, **options: object):
    entry = Catalogue([TASKS]).find("task", "{name}")
    return open_stream({{"name": "{name}", **options}}, entry.load(), data_folder(folder), seed=0)


def test_its_options_are_read_without_importing_it() -> None:
    entry = Catalogue([TASKS]).find("task", "{name}")
    assert entry.options()["classes"].default == 6
    assert entry.options()["classes"].meaning


def test_every_class_comes_once(tmp_path: Path) -> None:
    stream = opened(tmp_path)
    assert sorted(c for e in stream.experiences for c in e.classes) == list(range(6))
    assert all(len(e.train) and len(e.validation) and len(e.test) for e in stream.experiences)


def test_options_change_the_stream(tmp_path: Path) -> None:
    assert len(opened(tmp_path, classes=4, experiences=2).experiences) == 2


def test_the_same_options_give_the_same_data(tmp_path: Path) -> None:
    assert opened(tmp_path).fingerprint == opened(tmp_path).fingerprint
'''


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="the task's name: lower-case letters, digits and underscores")
    parser.add_argument(
        "--dir", metavar="DIR", default=".", help="folder that gets tasks/ and tests/; default is this one"
    )


def main(args: argparse.Namespace) -> int:
    name, folder = args.name, Path(args.dir).expanduser()
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_") or name != name.lower():
        raise UserError(f"new-task: expected a name of lower-case letters, digits and underscores, got '{name}'")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"new-task: expected a folder, got '{folder}'")
    plugin, test = folder / "tasks" / f"{name}.py", folder / "tests" / f"test_{name}.py"
    for path in (plugin, test):
        if path.exists():
            raise UserError(f"new-task: expected a new name, '{path}' is there already")
    known = catalogue(args)
    for kind in KINDS:
        if name in known.entries(kind):  # `cmoe show NAME` tells components by their names alone
            raise UserError(f"new-task: expected a new name, there is {an(kind)} '{name}' already")
    words = {"name": name, "cls": class_name(name), "title": name.replace("_", " ").capitalize(), "test": str(test)}
    for path, text in ((plugin, PLUGIN), (test, TEST)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text.format(**words))
    emit(args, {"plugin": str(plugin), "test": str(test)})
    if not args.json:
        print(f"wrote {plugin} and {test}")
        print(f"next: put your data into {plugin}, then: pytest {test}; cmoe show {name}")
    return DONE


def class_name(name: str) -> str:
    """`my_task` as `MyTask`; a name that would clash with the base gets another."""
    words = "".join(part.capitalize() for part in name.split("_"))
    return words if words not in ("Task", "") and words.isidentifier() else f"{words}Stream"
