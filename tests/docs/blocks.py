"""What the documents say, cut out of them: fenced blocks, commands, links, headings.

A block's info string is its language, then marks: `run` (the code is executed), `file=PATH` (it is that file of the
example, all of one document in one folder).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("cli.md", "components.md")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its document, line, language, marks and text."""

    page: str
    line: int
    language: str
    marks: tuple[str, ...]
    text: str

    @property
    def file(self) -> str | None:
        return next((m.removeprefix("file=") for m in self.marks if m.startswith("file=")), None)

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str | None = None) -> list[Block]:
    """The fenced blocks of all documents."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            words = match[1].split()
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page.name, line, words[0] if words else "", tuple(words[1:]), match[2]))
    return [b for b in found if language is None or b.language == language]


def write_files(folder: Path, page: str | None = None) -> list[Path]:
    """The example files of a document (default: of all) as a reader would make them."""
    written = []
    for block in blocks():
        if block.file and page in (None, block.page):
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            written.append(path)
    return written


def prose(page: Path) -> str:
    """A document without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def commands() -> list[tuple[str, str]]:
    """(document, command line) for everything that begins with `cmoe `, in shell blocks and in the text."""
    found = [(b.page, line.strip()) for b in blocks("sh") for line in b.text.splitlines()]
    for page in PAGES:
        if page.name != "cli.md":
            found += [(page.name, code) for code in re.findall(r"`([^`\n]+)`", prose(page))]
    return [(page, line) for page, line in dict.fromkeys(found) if line.startswith("cmoe ")]


def links(page: Path) -> list[str]:
    """Targets of a document's links and images, those into the web left out."""
    return [t for t in _LINK.findall(prose(page)) if not t.startswith(("http://", "https://", "mailto:"))]


def anchors(page: Path) -> set[str]:
    """The names under which a document's headings can be linked to."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
