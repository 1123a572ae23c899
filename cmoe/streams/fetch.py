"""Getting data sets: by the usual libraries where a network is there, quickly and silently given up where not."""

from __future__ import annotations

import contextlib
import io
import threading
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cmoe.errors import UserError
from cmoe.streams.data import DataFolder, missing


def reachable(url: str, seconds: float = 4.0) -> bool:
    """Whether the address answers within `seconds`; asked in a thread, as a name look-up may hang without limit."""
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        with contextlib.suppress(Exception), urllib.request.urlopen(request, timeout=seconds):
            answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return bool(answers)


def obtain(
    data: DataFolder, what: str, files: Sequence[str], command: str, url: str, download: Callable[[Path], Any]
) -> None:
    """Download into the data folder, printing nothing.

    Args:
        data: where to.
        what: the data set's name.
        files: what was looked for, any one of which would have done.
        command: what a user can type instead.
        url: an address that must answer before anything is tried.
        download: puts the files below the folder that it is given.

    Raises:
        UserError: the folder cannot be written, there is no network, or the download failed.
    """
    if not data.writable:
        raise missing(data, what, files, command, "the folder cannot be written")
    if not reachable(url):
        raise missing(data, what, files, command, f"no answer from {url}")
    try:
        data.root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            download(data.root)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise missing(data, what, files, command, f"the download failed: {reason}") from error


def download_file(url: str, path: Path) -> None:
    """One file; it appears under its name only when it is whole."""
    from torch.hub import download_url_to_file

    path.parent.mkdir(parents=True, exist_ok=True)
    download_url_to_file(url, str(path), progress=False)


def damaged(path: Path, reason: str) -> UserError:
    """The error for a file that is there and cannot be read."""
    return UserError(f"{path}: {reason}; delete the file and get it again")
