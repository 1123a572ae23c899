"""Components by name: read from source exactly as Python would have them, and imported only on demand."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from cmoe.config.where import ConfigError, Where
from cmoe.errors import UserError
from cmoe.plugins import BUILTIN, KINDS, PLURALS, REQUIRED, Catalogue, builtin_folder
from cmoe.plugins.schema import Option, options_of, plain
from cmoe.plugins.source import Class, Unreadable, read
from cmoe.plugins.types import Choice, Flag, ListOf, MapOf, Nothing, Number, OneComponent, Sequence, Text, Type, Union

ENTRIES = [(kind, name) for kind in KINDS for name in Catalogue().entries(kind)]


def options(tmp_path: Path, body: str, cls: str = "X") -> dict[str, Option]:
    path = tmp_path / "module.py"
    path.write_text(body)
    module = read(path)
    return options_of(Class(module, module.classes[cls]))


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_what_is_read_is_what_python_has(kind: str, name: str) -> None:
    entry = Catalogue().find(kind, name)
    cls = entry.load()
    supplied = getattr(cls, "supplied", ())
    signature = {n: p for n, p in inspect.signature(cls).parameters.items() if n not in supplied}
    signature = {n: p for n, p in signature.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    assert list(entry.options()) == list(signature)
    fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    for option in entry.options().values():
        default = signature[option.name].default
        factory = fields[option.name].default_factory if option.name in fields else dataclasses.MISSING
        if factory is not dataclasses.MISSING:
            default = factory()
        assert option.default == (REQUIRED if default is inspect.Parameter.empty else plain(default))


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_component_says_what_it_and_its_options_are(kind: str, name: str) -> None:
    entry = Catalogue().find(kind, name)
    assert entry.summary.endswith((".", ":")), entry.summary
    for option in entry.options().values():
        assert option.meaning, f"{kind} {name}: option {option.name} has no line in the docstring's `Options:`"


def test_every_built_in_of_the_table_is_there() -> None:
    for kind, table in BUILTIN.items():
        assert set(table) <= set(Catalogue().entries(kind))
    assert "split_digits" in Catalogue().entries("task")


@pytest.mark.parametrize("kind", KINDS)
def test_class_attributes_are_read(kind: str) -> None:
    for entry in Catalogue().entries(kind).values():
        cls = entry.load()
        for name in (
            "owns_data",
            "owns_predict",
            "owns_loop",
            "modalities",
            "modality",
            "causal",
            "needs",
            "supplied",
            "scenarios",
        ):
            read_value = entry.attribute(name, "absent")
            if read_value != "absent":
                assert read_value == getattr(cls, name), f"{entry.name}.{name}"


ANNOTATIONS: dict[str, Type] = {
    "int": Number(True),
    "'int'": Number(True),
    "float": Number(False),
    "str": Text(),
    "bool": Flag(),
    "Any": Type(),
    "int | None": Union((Number(True), Nothing())),
    "Optional[int]": Union((Number(True), Nothing())),
    "typing.Union[int, str, None]": Union((Number(True), Text(), Nothing())),
    "list[int]": ListOf(Number(True)),
    "list": ListOf(),
    "tuple[int, ...]": Sequence(Number(True)),
    "dict[str, float]": MapOf(Text(), Number(False)),
    "Literal['a', 1, True, None]": Choice(("a", 1, True, None)),
    "Mine": Choice(("p", "q")),
    "list[Mine] | None": Union((ListOf(Choice(("p", "q"))), Nothing())),
    "RouterSpec": OneComponent("router"),
    "types.RouterSpec": OneComponent("router"),
    "cmoe.config.types.ExpertSpec": OneComponent("expert"),
    "InitVar[int]": Number(True),
}


@pytest.mark.parametrize("annotation", ANNOTATIONS)
def test_annotations(annotation: str, tmp_path: Path) -> None:
    found = options(
        tmp_path,
        "import typing, cmoe.config.types\nfrom dataclasses import InitVar, dataclass\nfrom typing import Any, Literal, Optional\n"
        "from cmoe.config import types\nfrom cmoe.config.types import RouterSpec\nMine = Literal['p', 'q']\n"
        f"@dataclass\nclass X:\n    a: {annotation}\n",
    )
    assert found["a"].type == ANNOTATIONS[annotation]
    assert found["a"].default is REQUIRED


def test_ranges_come_with_their_alias(tmp_path: Path) -> None:
    found = options(
        tmp_path,
        "from typing import Annotated\nfrom cmoe.config.types import Fraction, Range\n"
        "Small = Annotated[int, Range(ge=1, lt=1 + 2)]\nclass X:\n    def __init__(self, a: Fraction = 0.5, *, b: Small): ...\n",
    )
    assert found["a"].type.describe() == "a number >= 0 and < 1"
    assert found["b"].type.describe() == "an integer >= 1 and < 3"
    assert list(found) == ["a", "b"]


def test_fields_are_inherited_in_the_order_of_dataclasses(tmp_path: Path) -> None:
    body = (
        "from dataclasses import dataclass, field\nfrom typing import ClassVar\n"
        "@dataclass\nclass A:\n    a: int = 1\n    b: int = 2\n    c: int = 3\n"
        "class Plain(A):\n    x: int = 5\n"
        "@dataclass\nclass X(Plain):\n    d: int = 4\n    b: int = 20\n    kind: ClassVar[str] = 'k'\n    c: int = field(default=9, init=False)\n"
    )
    found = options(tmp_path, body)
    space: dict[str, object] = {"__name__": __name__}
    exec(compile(body, "body", "exec", dont_inherit=True), space)
    assert list(found) == list(inspect.signature(space["X"]).parameters)  # ty: ignore[invalid-argument-type]
    assert found["b"].default == 20


def test_the_nearest_constructor_counts(tmp_path: Path) -> None:
    body = (
        "class A:\n    supplied = ('dim',)\n    def __init__(self, dim: int, size: int = 1, *args, **more): ...\n"
        "class X(A):\n    '''X.\n\n    Options:\n        size: how large,\n            or small.\n        odd: no option.\n\n    More: text.\n    '''\n"
    )
    found = options(tmp_path, body)
    assert list(found) == ["size"]
    assert found["size"].meaning == "how large, or small."


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("class X:\n    def __init__(self, a: np.ndarray): ...\n", "annotation 'np.ndarray' is not understood"),
        ("class X:\n    def __init__(self, a: int = compute()): ...\n", "default of option a must be a literal"),
        ("A = A\nclass X:\n    def __init__(self, a: A): ...\n", "not understood"),
        ("A = list[A]\nclass X:\n    def __init__(self, a: A): ...\n", "refers to itself"),
        ("B = B + 1\nclass X:\n    def __init__(self, a: int = B): ...\n", "must be a literal"),
        ("class X:\n    def __init__(self, a: int = 9**9**9): ...\n", "must be a literal"),
        ("class X:\n    def __init__(self, a: int = 1 / 0): ...\n", "must be a literal"),
        ("class X(X): ...\n", "derives from itself"),
    ],
)
def test_what_cannot_be_read(body: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(Unreadable, match=reason.replace("*", r"\*")):
        options(tmp_path, body)


TASK = "from dataclasses import dataclass\nfrom cmoe.streams import Task\n\n@dataclass\nclass {0}(Task):\n    '''{0}.'''\n    size: int = 1\n"

BROKEN = {
    "syntax": ("class (:\n", "line 1"),
    "encoding": (b"x = '\xff'\n", "line"),
    "two": (TASK.format("A") + TASK.format("B").partition("\n\n")[2], "one public task class"),
    "plain": (TASK.format("A").replace("@dataclass\n", ""), "needs @dataclass"),
    "named": (TASK.format("A") + "    name: str = ''\n", "cannot be called 'name'"),
    "odd": (TASK.format("A") + "    other: Unknown = None\n", "option other"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_and_breaks_no_other(case: str, tmp_path: Path) -> None:
    text, reason = BROKEN[case]
    (tmp_path / f"{case}.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "fine.py").write_text(TASK.format("Fine"))
    found = Catalogue([tmp_path])
    assert "fine" in found.entries("task")
    assert [p.name for p, _ in found.broken] == [f"{case}.py"]
    assert reason in found.broken[0][1]
    with pytest.raises(ConfigError, match=f"{case}.py"):
        found.find("task", case, Where("f.yaml", "stream"))


def test_folders_win_over_what_is_built_in_and_other_files_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, given = tmp_path / "work", tmp_path / "given"
    (work / "tasks").mkdir(parents=True)
    given.mkdir()
    for folder in (work / "tasks", given):
        (folder / "split_digits.py").write_text(TASK.format("Mine"))
    (work / "tasks" / "celery.py").write_text("def job(): ...\n")
    (work / "tasks" / "_private.py").write_text("not python")
    monkeypatch.chdir(work)
    assert Catalogue().find("task", "split_digits").origin == str(work / "tasks")
    assert Catalogue([given]).find("task", "split_digits").origin == str(given)
    assert Catalogue([given]).find("task", "split_digits").folder == given
    assert Catalogue().broken == []
    assert Catalogue().find("task", "split_mnist").origin == "built-in"
    assert Catalogue().find("task", "split_mnist").folder is None
    with pytest.raises(ConfigError, match="has no public class"):
        Catalogue().find("task", "celery")


def test_a_folder_holds_other_kinds_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from cmoe.strategies.replay import Replay\nfrom cmoe.moe.routers import TopK\n\n"
        "class Better(Replay):\n    '''Better.'''\n\nclass Finer(TopK):\n    '''Finer.'''\n"
    )
    found = Catalogue([tmp_path])
    assert found.broken == []
    assert found.find("strategy", "mine").attr == "Better"
    assert list(found.find("router", "mine").options()) == list(found.find("router", "topk").options())


def test_nearest_names(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^c.yaml: strategy.0: expected a strategy \(.+\), got 'repaly' \(did you mean 'replay'\?\)$",
    ):
        Catalogue().find("strategy", "repaly", Where("c.yaml", "strategy.0"))
    with pytest.raises(ConfigError, match="'sgd' is an optimizer"):
        Catalogue().find("scheduler", "sgd")
    with pytest.raises(UserError, match="expected a folder"):
        Catalogue([tmp_path / "nowhere"])


def test_a_file_is_loaded_once_under_a_fixed_name_and_anew_when_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "stable_name.py"
    path.write_text(TASK.format("Stable"))
    entry = Catalogue([tmp_path]).find("task", "stable_name")
    cls = entry.load()
    assert cls.__module__ == "cmoe_plugins.task.stable_name"
    assert entry.load() is cls
    assert type(pickle.loads(pickle.dumps(cls(size=3)))) is cls
    made = entry.create({"name": "stable_name", "size": 7, "unrelated": 1})
    assert made.size == 7
    path.write_text(TASK.format("Renamed"))
    assert Catalogue([tmp_path]).find("task", "stable_name").load().__name__ == "Renamed"


@pytest.mark.parametrize("fault", ["import nothing_of_this_name", "1 / 0", "raise SystemExit(3)"])
def test_a_plugin_that_cannot_be_imported(fault: str, tmp_path: Path) -> None:
    (tmp_path / "bad_import.py").write_text(f"{TASK.format('Bad')}\n{fault}\n")
    entry = Catalogue([tmp_path]).find("task", "bad_import")
    with pytest.raises(UserError, match=r"bad_import\.py: cannot be imported: \w+: ") as caught:
        entry.load()
    assert "\n" not in str(caught.value)
    assert "cmoe_plugins.task.bad_import" not in sys.modules


def test_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_package_of_tasks"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import Thing\nraise RuntimeError('imported')\n")
    (package / "inner.py").write_text(TASK.format("Thing"))
    info = tmp_path / "some_package_of_tasks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package-of-tasks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[cmoe.tasks]\nthing = some_package_of_tasks:Thing\ndirect = some_package_of_tasks.inner:Thing\n"
        "gone = some_package_of_tasks.gone:Thing\nabsent = not_installed_anywhere:Thing\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Catalogue()
    for name in ("thing", "direct"):
        entry = found.find("task", name)
        assert entry.origin == "entry point of some-package-of-tasks"
        assert "size" in entry.options()
        assert "scenario" in entry.options()
    assert {"gone", "absent"} <= {reason[0].name.split(" ")[1] for reason in found.broken}
    with pytest.raises(UserError, match="cannot be imported: RuntimeError: imported"):
        found.find("task", "thing").load()


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from cmoe.plugins import Catalogue, KINDS\n"
        "c = Catalogue()\nfor k in KINDS:\n    for e in c.entries(k).values(): e.options()\n"
        "print([m for m in ('torch', 'numpy', 'omegaconf', 'avalanche', 'rich', 'yaml', 'sklearn') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_folders_of_the_installation() -> None:
    assert (builtin_folder("tasks") / "split_digits.py").is_file()
    assert set(PLURALS) == set(KINDS)
