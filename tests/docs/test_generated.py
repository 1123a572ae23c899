"""The generated pages are what the code says now."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmoe.cli import reference

from .blocks import GENERATED, ROOT


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_page_is_up_to_date(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # plugins of a working folder are no part of the reference
    committed = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert committed == reference.pages()[name], f"docs/{name} is out of date: make docs"


def test_the_generator_writes_all_pages_and_names_its_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reference.main([str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(GENERATED)
    assert reference.main([str(tmp_path / "nowhere")]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_page_says_nothing_of_this_machine(name: str) -> None:
    text = reference.pages()[name]
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
