"""Reading and fetching files."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cmoe.errors import UserError
from cmoe.streams import data_folder, fetch
from cmoe.streams.readers import mnist, read_idx
from cmoe.streams.text import BEGIN, PADDING, hash_words, thirds, windows


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def test_idx_with_and_without_gzip(tmp_path: Path) -> None:
    array = np.arange(24).reshape(4, 3, 2)
    (tmp_path / "a").write_bytes(idx(array))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
    assert (read_idx(tmp_path / "a") == array).all()
    assert (read_idx(tmp_path / "a.gz") == array).all()
    torch.from_numpy(read_idx(tmp_path / "a"))


@pytest.mark.parametrize(
    "content", [b"", b"\0\0", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x0d\x01\0\0\0\x01abcd", b"PK34"]
)
def test_damaged_idx(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match="delete the file and get it again"):
        read_idx(tmp_path / "a")


def test_mnist_is_downloaded_where_a_network_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.datasets

    def download(root: str, download: bool) -> None:
        print("progress")  # noqa: T201
        raw = Path(root) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for part in ("train", "t10k"):
            (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(np.zeros((3, 28, 28))))
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(3)))

    monkeypatch.setattr(fetch, "reachable", lambda *_: True)
    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    (x, y), _ = mnist(data_folder(tmp_path))
    assert x.shape == (3, 28, 28)
    assert y.tolist() == [0, 1, 2]


def test_a_failed_download_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    import torchvision.datasets

    def download(root: str, download: bool) -> None:
        print("progress")  # noqa: T201
        raise RuntimeError("the disk\nis full")

    monkeypatch.setattr(fetch, "reachable", lambda *_: True)
    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    with pytest.raises(UserError, match=r"the download failed: the disk is full; get it with: python -c"):
        mnist(data_folder(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_folders_that_cannot_be_written_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(fetch, "reachable", lambda *_: pytest.fail("asked the network"))
    with pytest.raises(UserError, match="the folder cannot be written"):
        mnist(data_folder(tmp_path / "file" / "below"))


def test_nothing_answers_on_a_closed_port() -> None:
    assert not fetch.reachable("http://127.0.0.1:9", seconds=2)


def test_words() -> None:
    ids = hash_words(["What's my BALANCE?", "what's", ""], vocabulary=50, length=4)
    assert ids.shape == (3, 4)
    assert ids[0, 0] == ids[1, 0]
    assert (ids[0] > 0).all()
    assert (ids[1, 1:] == 0).all()
    assert (ids[2] == 0).all()
    assert ids.max() < 50


@pytest.mark.parametrize("n", [1, 4, 5, 8, 9])
def test_windows(n: int) -> None:
    w = windows(bytes(range(n)), 4)
    assert w[0, 0] == BEGIN
    targets = w[:, 1:].reshape(-1)
    assert targets[:n].tolist() == list(range(n))
    assert (targets[n:] == PADDING).all()
    assert (w[1:, 0] == w[:-1, -1]).all()


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.1), (0.0, 0.1), (0.2, 0.3), (0.0, 0.02)])
def test_thirds(validation: float, test: float) -> None:
    text = bytes(i % 256 for i in range(10_000))
    fit, held, tested = thirds(text, validation, test)
    assert sorted(fit + held + tested) == sorted(text)
    assert abs(len(tested) / 10_000 - test) <= 0.02
    assert abs(len(held) / (10_000 - len(tested)) - validation) <= 0.02


def test_options_are_read_without_heavy_imports() -> None:
    code = (
        "import sys, cmoe.streams, cmoe.streams.task, cmoe.streams.data;"
        "print([m for m in ('torch', 'numpy', 'avalanche', 'omegaconf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
