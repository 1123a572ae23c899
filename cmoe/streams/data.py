"""Where data sets are looked for, and what is said when they are not there. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cmoe.errors import UserError


@dataclass(frozen=True)
class DataFolder:
    """Where data sets are looked for: `--data DIR`, else `$CMOE_DATA`, else `~/.cache/cmoe`.

    Attributes:
        root: the folder; it need not exist.
        origin: which of the three named it, for error messages.
    """

    root: Path
    origin: str

    def first(self, *candidates: str) -> Path | None:
        """The first of these files or folders (relative to the root) that exists, else None."""
        return next((path for path in (self.root / c for c in candidates) if path.exists()), None)

    def file(self, path: str, key: str = "stream.path") -> Path:
        """A file or folder that a user named: as given, else below the root.

        Raises:
            UserError: it is in neither place.
        """
        given = Path(path).expanduser()
        for candidate in (given, self.root / given):
            if candidate.exists():
                return candidate
        raise UserError(f"{key}: expected an existing file or folder, got '{path}' (also looked in {self.root})")

    @property
    def writable(self) -> bool:
        """Whether a download could be written here."""
        here = self.root
        while not here.exists() and here != here.parent:
            here = here.parent
        return here.is_dir() and os.access(here, os.W_OK | os.X_OK)


def data_folder(option: str | Path | None = None, environ: Mapping[str, str] = os.environ) -> DataFolder:
    """The data folder that `--data` (here `option`), `$CMOE_DATA` or the default names."""
    if option:
        return DataFolder(Path(option).expanduser(), "--data")
    if environ.get("CMOE_DATA"):
        return DataFolder(Path(environ["CMOE_DATA"]).expanduser(), "$CMOE_DATA")
    return DataFolder(Path("~/.cache/cmoe").expanduser(), "the default; --data or $CMOE_DATA name another")


def missing(data: DataFolder, what: str, files: Sequence[str], command: str, reason: str = "") -> UserError:
    """The error for data that is not there: which files were looked for, where, and the command that gets them.

    Args:
        data: the folder that was looked in.
        what: the data set's name.
        files: paths relative to the root, any one of which would have done.
        command: a shell command that fetches the data.
        reason: why it was not downloaded just now.
    """
    looked = " or ".join(files)
    because = f"; {reason}" if reason else ""
    return UserError(f"{what}: no {looked} in {data.root} ({data.origin}){because}; get it with: {command}")
