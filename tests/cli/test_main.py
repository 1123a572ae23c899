"""Exit codes, one-line errors, one JSON document, and a light start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from cmoe.cli import commands, main
from cmoe.errors import RunFailed, UserError

TASK = (
    "from dataclasses import dataclass\nfrom cmoe.streams.task import Task\nprint('imported')\n\n"
    "@dataclass\nclass Mine(Task):\n    '''A task of mine.\n\n    Options:\n        size: how large.\n    '''\n    size: int = 1\n"
)


def cmoe(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cmoe.cli.main", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A command `try` whose `main` each test sets."""
    module = ModuleType("a_command_of_the_tests")
    module.add_arguments = lambda parser: parser.add_argument("rest", nargs="*")  # ty: ignore[missing-attribute]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(commands.COMMANDS, "try", (module.__name__, "try something"))
    return module


def fails_with(error: BaseException):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list", "tasks"], ["list", "--help"], ["lst"], ["list"], ["show", "replay"]]
)
def test_light_start(arguments: list[str], folder: Path) -> None:
    code = (
        f"import sys; from cmoe.cli.main import main; main({arguments!r})\n"
        "print([m for m in ('torch', 'numpy', 'omegaconf', 'rich', 'yaml') if m in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["list", "tasks"]])
def test_the_first_answer_comes_at_once(arguments: list[str], folder: Path) -> None:
    def once() -> float:
        start = time.perf_counter()
        assert cmoe(*arguments).returncode == 0
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) <= 0.3


def test_a_run_says_something_within_half_a_second(folder: Path) -> None:
    """Before anything heavy is imported; the run itself is not waited for."""

    def once() -> float:
        start = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, "-m", "cmoe.cli.main", "run", "quickstart"], stderr=subprocess.PIPE, text=True, cwd=folder
        ) as process:
            assert process.stderr is not None
            line = process.stderr.readline()
            seconds = time.perf_counter() - start
            process.kill()
        assert line == "cmoe: reading quickstart\n"
        return seconds

    assert min(once() for _ in range(3)) <= 0.5


def test_a_mistyped_key_is_reported_within_a_second(folder: Path) -> None:
    start = time.perf_counter()
    (folder / "c.yaml").write_text("stream: split_digits\ntrainer: {epoch: 1}\n")
    result = cmoe("validate", "c.yaml")
    assert time.perf_counter() - start <= 1
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("cmoe: c.yaml: trainer.epoch: expected an option of section trainer ")
    assert result.stderr.endswith("got 'epoch' (did you mean 'epochs'?)\n")


USAGE = {
    "lst": "did you mean 'list'",
    "list taks": "did you mean 'tasks'",
    "list tasks --jsn": "did you mean '--json'",
    "--jsno list tasks": "did you mean '--json'",
    "list tasks more": "unexpected argument 'more'",
    "show": "the following arguments are required",
    "show repaly": "did you mean 'replay'",
    "show stratgy/replay": "did you mean 'strategy'",
    "show strategy/repaly": "did you mean 'replay'",
    "validate": "the following arguments are required",
    "validate nothing.yaml": "nothing.yaml: no such file",
    "validate nothing": "expected a configuration file",
    "list tasks --plugins nowhere": "expected a folder, got 'nowhere'",
    "list tasks --plugins": "expected one argument",
    "new-task 3d": "expected a name",
    "new-task class": "expected a name",
    "new-task ../up": "expected a name",
    "new-task split_digits": "a task 'split_digits' already",
}


@pytest.mark.parametrize("line", USAGE)
@pytest.mark.parametrize("as_json", [False, True])
def test_wrong_input_is_one_line_and_exit_code_2(
    line: str, as_json: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert main.main([*(["--json"] if as_json else []), *line.split()]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    assert err.startswith("cmoe: ")
    assert USAGE[line] in err
    assert sorted(folder.rglob("*")) == before
    if as_json:
        assert json.loads(out) == {"error": err.strip().removeprefix("cmoe: "), "exit": 2}
    else:
        assert out == ""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a: expected b"), 2, "cmoe: a: expected b\n"),
        (UserError("two\nlines"), 2, "cmoe: two lines\n"),
        (RunFailed("no space; go on with: cmoe resume r"), 1, "cmoe: no space; go on with: cmoe resume r\n"),
        (KeyboardInterrupt(), 130, "cmoe: interrupted\n"),
        (KeyboardInterrupt("stopped; go on with: cmoe resume r"), 130, "cmoe: stopped; go on with: cmoe resume r\n"),
        (ValueError("first\nsecond"), 1, "cmoe: ValueError: first (--debug shows where)\n"),
        (AssertionError(), 1, "cmoe: AssertionError (--debug shows where)\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, text: str, command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main = fails_with(error)  # ty: ignore[missing-attribute]
    assert main.main(["try"]) == code
    assert capsys.readouterr().err == text
    assert main.main(["try", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_json_is_one_document_whatever_is_printed(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def run(args):
        sys.stdout.write("noise\n")
        args.document = {"nan": float("nan"), "path": Path("x"), "list": [float("inf"), 1.5], 3: "ü"}
        return 0

    command.main = run  # ty: ignore[missing-attribute]
    assert main.main(["try", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"nan": None, "path": "x", "list": [None, 1.5], "3": "ü"}
    assert err == "noise\n"


def test_json_keeps_out_what_child_processes_print(folder: Path) -> None:
    code = (
        "import os, sys, types\nfrom cmoe.cli import commands, main\nm = types.ModuleType('m')\nm.add_arguments = lambda p: None\n"
        "def run(args):\n    os.system('echo child'); os.write(1, b'raw'); print('text'); args.document = [1]; return 0\n"
        "m.main = run\nsys.modules['m'] = m\ncommands.COMMANDS['try'] = ('m', '')\nsys.exit(main.main(['try', '--json']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == [1]
    assert all(word in result.stderr for word in ("child", "raw", "text"))


def test_common_options_stand_before_and_after(command: ModuleType) -> None:
    seen = []
    command.main = lambda args: seen.append((args.rest, args.plugins, args.data, args.json)) or 0  # ty: ignore[missing-attribute]
    assert main.main(["--plugins", "a", "--data=d", "try", "x", "--plugins", "b", "k=v"]) == 0
    assert main.main(["try", "x", "k=v", "--data", "d", "--plugins", "b", "--plugins", "a"]) == 0
    assert [s[0] for s in seen] == [["x", "k=v"]] * 2
    assert [sorted(s[1]) for s in seen] == [["a", "b"]] * 2
    assert [s[2] for s in seen] == ["d"] * 2


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "cmoe.cli.main", "list"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert result.stderr == b""
    assert result.returncode == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"], ["help"]):
        assert main.main(arguments) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in commands.COMMANDS)
    assert main.main([]) == 2
    assert main.main(["--version"]) == 0
    assert "cmoe 0" in capsys.readouterr().out
    for arguments in (["list", "--help"], ["help", "list"]):
        assert main.main(arguments) == 0
        assert "usage: cmoe list" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
