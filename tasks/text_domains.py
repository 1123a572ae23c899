"""Byte-level language modelling over domains of text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cmoe.config.types import Fraction, PositiveInt
from cmoe.errors import UserError
from cmoe.streams.task import Modality, Task

if TYPE_CHECKING:
    from pathlib import Path

    from avalanche.benchmarks import CLScenario

    from cmoe.streams.data import DataFolder


@dataclass
class TextDomains(Task):
    """Next-byte prediction; a domain is a folder, a file or a glob of text. The default needs no download.

    The default domains are found in the running installation: Python (the standard library), C++ (PyTorch's headers),
    English (the Python language reference, package documentation) and JavaScript (inside installed packages; readable
    files first, then minified ones). Fifty blocks of each text are dealt to training, validation and test.

    Options:
        scenario: 'domain' (the domain is unknown), 'task' (it is given), 'joint' or 'online'.
        domains: name -> folder, file or glob of your own text; default is the four domains of the installation.
        bytes_per_domain: how much of each domain is used; files are taken in the order of their names.
        length: predictions in one window.
        test: share of each domain that becomes the test set.
    """

    modality: ClassVar[Modality] = "bytes"
    scenarios: ClassVar[tuple[str, ...]] = ("domain", "task", "joint", "online")

    scenario: Literal["domain", "task", "joint", "online"] = "domain"  # ty: ignore[incompatible-mutable-override] - fewer than the base has
    domains: dict[str, str] | None = None
    bytes_per_domain: PositiveInt = 300_000
    length: PositiveInt = 128
    test: Fraction = 0.1

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        from cmoe.streams.builders import language
        from cmoe.streams.text import BYTE_VOCABULARY, thirds, windows

        if self.domains is None:
            sources = {name: find() for name, find in _INSTALLED.items()}
        else:
            sources = {str(name): _texts(_user_files(data, name, where)) for name, where in self.domains.items()}
        if not sources:
            raise UserError("stream.domains: expected at least one domain, got none")
        parts = {}
        for name, texts in sources.items():
            text = _up_to(texts, self.bytes_per_domain)
            split = thirds(text, self.validation, self.test)
            if not split[0] or not split[2] or (self.validation and not split[1]):
                raise UserError(
                    f"stream.domains.{name}: expected text for training, validation and test, got {len(text)} bytes"
                    f" and shares {self.validation:g} and {self.test:g}"
                )
            fit, held, test = (windows(t, self.length) for t in split)
            parts[name] = fit, held, test
        return language(self, seed, domains=parts, vocabulary=BYTE_VOCABULARY)


def _up_to(texts: Iterable[bytes], limit: int) -> bytes:
    """Texts joined by a line break until there is enough; a text that came before is left out."""
    joined, seen = bytearray(), set()
    for text in texts:
        if text not in seen and text:
            seen.add(text)
            joined += text if text.endswith(b"\n") else text + b"\n"
        if len(joined) >= limit:
            break
    return bytes(joined[:limit])


def _texts(files: Iterable[Path]) -> Iterator[bytes]:
    """What the files hold; those with zero bytes are not text."""
    for file in files:
        try:
            text = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from error
        if b"\0" not in text:
            yield text


def _user_files(data: DataFolder, name: str, where: str) -> list[Path]:
    """The files of a folder, a file or a glob, by name; hidden ones are left out."""
    import glob
    from pathlib import Path

    key = f"stream.domains.{name}"
    if glob.has_magic(where):
        pattern = str(Path(where).expanduser())
        roots = [Path(), data.root]
        found = next((hits for root in roots if (hits := sorted(glob.glob(str(root / pattern), recursive=True)))), [])
        files = [Path(f) for f in found if Path(f).is_file()]
    else:
        path = data.file(where, key)
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not files:
        raise UserError(f"{key}: no file in '{where}' (also looked in {data.root})")
    return files


def _packages() -> Path:
    """Where packages are installed; torch lies there."""
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


def _python() -> Iterator[bytes]:
    """The standard library without its tests and without what is not code."""
    import sysconfig
    from pathlib import Path

    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "site-packages", "dist-packages", "pydoc_data", "encodings", "idlelib", "turtledemo"}
    files = (p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    return _texts(sorted(files))


def _cpp() -> Iterator[bytes]:
    """PyTorch's headers."""
    return _texts(sorted((_packages() / "torch" / "include").rglob("*.h")))


def _english() -> Iterator[bytes]:
    """The Python language reference, then scikit-learn's data set descriptions, then packages' descriptions."""
    import importlib

    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # distributions may leave it out
        topics = {}
    yield from (topics[name].encode() for name in sorted(topics))
    yield from _texts(sorted((_packages() / "sklearn" / "datasets" / "descr").glob("*.rst")))
    for text in _texts(sorted(_packages().glob("*.dist-info/METADATA"))):
        yield text.partition(b"\n\n")[2]


def _javascript() -> Iterator[bytes]:
    """JavaScript inside packages that are always installed: files as people write them, then bundles."""
    folders = ("matplotlib", "sklearn", "torch/utils", "werkzeug", "urllib3", "mlflow/server/js/build/static/js")
    texts = [t for folder in folders for t in _texts(sorted((_packages() / folder).rglob("*.js")))]
    written = [text for text in texts if len(text) < 200 * (1 + text.count(b"\n"))]
    yield from written
    yield from (text for text in texts if text not in set(written))


_INSTALLED = {"python": _python, "cpp": _cpp, "english": _english, "javascript": _javascript}
