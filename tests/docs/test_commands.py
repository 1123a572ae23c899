"""Every command line in the documents is one that cmoe takes, with those options and keys."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from cmoe.cli.commands import COMMANDS
from cmoe.cli.common import Parser
from cmoe.cli.show import look_up
from cmoe.config.study import grid, read_study
from cmoe.plugins import Catalogue

from .blocks import PAGES, ROOT, commands, write_files

LINES = commands()


def parsed(line: str) -> tuple[str, argparse.Namespace]:
    """The command and its arguments."""
    _, name, *arguments = shlex.split(line, comments=True)
    module = import_module(COMMANDS[name][0])
    parser = Parser(name, "")
    module.add_arguments(parser)
    return name, parser.parse(arguments)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every example file of the documents, to work in."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page}: {line}" for page, line in LINES])
def test_the_command_line_is_understood(page: str, line: str, reader: Path) -> None:
    if len(shlex.split(line)) == 2:  # the command is spoken of, not called
        assert line.split()[1] in COMMANDS
        return
    name, args = parsed(line)
    config = getattr(args, "config", None)
    if config is not None and not config.isupper():  # CONFIG and FILE stand for any
        for combination in grid(args.overrides):
            assert read_study(config, combination, Catalogue(), getattr(args, "only", ())).plans
    if name == "show" and not args.name.isupper():
        assert look_up(args.name, Catalogue())
    if name == "reproduce" and not args.name.isupper():
        assert read_study(f"reproduce/{args.name}", (), Catalogue()).published


def test_the_documents_have_commands_in_them() -> None:
    assert len(LINES) > 30


def test_the_readme_names_every_command() -> None:
    named = {shlex.split(line)[1] for page, line in LINES if page == "README.md"}
    assert named >= set(COMMANDS)


def test_the_makefile_has_the_targets_that_documents_name() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("setup", "demo", "test", "lint", "format", "chaos", "bench", "routers", "docs", "lock"):
        assert f"\n{target}:" in makefile


def test_the_programs_that_documents_name_are_there_and_know_the_options() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = re.findall(r"python (benchmarks/\w+\.py)((?: +[-\w/]+)*)", text)
    assert "benchmarks/routers.py" in {program for program, _ in named}
    for program, arguments in named:
        source = (ROOT / program).read_text(encoding="utf-8")
        if "\nimport measure" in source:  # has an option of its own
            source += (ROOT / "benchmarks" / "measure.py").read_text(encoding="utf-8")
        assert all(f'"{option}"' in source for option in re.findall(r"--[a-z-]+", arguments)), (program, arguments)
