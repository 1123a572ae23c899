"""A folder of plugins that no other test depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmoe.plugins import Catalogue

TOY = '''
from __future__ import annotations
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal
from cmoe.config.types import Count, Fraction, Positive, PositiveInt, Probability, RouterSpec
from cmoe.streams import Task
import a_package_that_is_not_installed  # reading options must not import

SIZES = (2, 3)

@dataclass
class Toy(Task):
    """A toy.

    Options:
        size: how large.
        rate: how fast,
            or how slow.
    """
    scenarios: ClassVar[tuple[str, ...]] = ("class", "task", "online")
    size: PositiveInt = 4
    rate: Positive = 1e-3
    ratio: Probability = 0.5
    word: str = "x"
    note: str | None = None
    flag: bool = False
    mode: Literal["slow", "fast", "steady"] = "fast"
    sizes: tuple[int, ...] = SIZES
    pair: tuple[int, float] = (1, 2.0)
    items: list[int] = field(default_factory=list)
    table: dict[str, float] = field(default_factory=lambda: {"a": 1.0})
    mixed: Literal["auto"] | list[PositiveInt] = "auto"
    folder: Path = Path("somewhere")
    router: RouterSpec | None = None
    anything: Any = None
'''
NEEDY = '''
from dataclasses import dataclass
from cmoe.streams.task import Task

@dataclass
class Needy(Task):
    """Needs a path."""
    modality = "bytes"
    path: str = None
    file: "str" = ""

@dataclass
class _Helper(Task):
    """Not a component."""
'''
OWNERS = {
    "owner": "owns_data = True", "rival": "owns_data = True", "seer": "owns_predict = True",
    "oracle": "owns_predict = True", "hermit": "owns_loop = True", "labelled": 'needs = ("task",)',
}  # fmt: skip
REQUIRED = '''
from dataclasses import dataclass, field
from cmoe.streams.task import Task

@dataclass(kw_only=True)
class Demanding(Task):
    """Has a required option."""
    path: str
    hidden: int = field(default=3, init=False)
'''
FUTURE = '''
from cmoe.moe.routing import Router

class Future(Router):
    """Looks at later tokens."""
    causal = False
    def __init__(self, dim: int, width: int = 3) -> None: ...
'''


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    folder = tmp_path / "plugins"
    folder.mkdir()
    files = {"toy": TOY, "needy": NEEDY, "demanding": REQUIRED, "future": FUTURE, "broken": "def (:\n"}
    for name, declaration in OWNERS.items():
        files[name] = (
            "from cmoe.strategies.base import Strategy\n\n"
            f'class {name.capitalize()}(Strategy):\n    """A strategy."""\n    {declaration}\n'
        )
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def catalogue(plugins: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Catalogue:
    monkeypatch.chdir(tmp_path)
    return Catalogue([plugins])
