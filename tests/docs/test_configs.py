"""Every YAML block in the documents is a configuration that passes the check."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmoe.config.study import read_study
from cmoe.errors import UserError
from cmoe.plugins import Catalogue

from .blocks import Block, blocks, write_files

BLOCKS = blocks("yaml")


@pytest.mark.parametrize("block", BLOCKS, ids=[b.name for b in BLOCKS])
def test_a_configuration_in_the_documents_is_valid(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / (block.file or "block.yaml")
    path.write_text(block.text, encoding="utf-8")
    assert read_study(path, (), Catalogue()).plans


def test_there_are_some() -> None:
    assert len(BLOCKS) >= 8


def test_the_error_that_is_shown_is_the_real_one() -> None:
    shown = next(b for b in blocks("") if b.page == "configuration.md" and "trainer.epoch:" in b.text)
    with pytest.raises(UserError) as found:
        read_study("quickstart", ["trainer.epoch=3"], Catalogue())
    assert shown.text.strip() == f"cmoe: {found.value}"
