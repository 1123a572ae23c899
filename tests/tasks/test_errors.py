"""Wrong options and wrong data: one line that says what was expected."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmoe.errors import UserError
from cmoe.streams import DataFolder, data_folder, fetch, open_stream

from .conftest import CATALOGUE


def refused(name: str, data: DataFolder, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        open_stream({"name": name, **options}, CATALOGUE.find("task", name).load(), data, 0)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"task {name}: ")
    return message


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("split_digits", {"experiences": 3}, "stream.experiences: expected a divisor of the 10 classes (1, 2, 5, 10)"),
        (
            "split_digits",
            {"class_order": [0, 1, 2]},
            "stream.class_order: expected each of the 10 classes 0..9 once; 3 is",
        ),
        ("split_digits", {"class_order": [0, 0, 2, 3, 4, 5, 6, 7, 8, 9]}, "0 is wrong or twice"),
        ("split_digits", {"class_order": [10, 1, 2, 3, 4, 5, 6, 7, 8, 9]}, "10 is wrong or twice"),
        ("split_digits", {"class_order": "random"}, "expected 'natural', 'shuffled' or a list"),
        ("split_digits", {"scenario": "domian"}, "(did you mean 'domain'?)"),
        ("digit_attributes", {"scenario": "class"}, "expected one of joint, task, online"),
        ("text_domains", {"domains": {}}, "expected at least one domain"),
        ("text_domains", {"domains": {"x": "nowhere"}}, "stream.domains.x: expected an existing file or folder"),
        ("text_domains", {"domains": {"x": "no/*.where"}}, "stream.domains.x: no file in"),
        ("text_domains", {"bytes_per_domain": 10}, "expected text for training, validation and test, got 10 bytes"),
        ("text_domains", {"test": 0.0}, "expected text for training, validation and test"),
        ("arrays", {"path": "nothing.npz"}, "stream.path: expected an existing file"),
        ("arrays", {"path": "arrays.npz", "experiences": 3}, "a divisor of the 4 classes (1, 2, 4), got 3"),
        ("arrays", {"path": "arrays.npz", "scenario": "domain"}, "stream.experiences: expected how many"),
        ("image_folder", {"path": "arrays.npz"}, "expected a folder, got the file"),
        ("image_folder", {"path": "images/a"}, "Couldn't find any class folder"),
    ],
)
def test_options(name: str, options: dict, said: str, made_data: DataFolder) -> None:
    assert said in refused(name, made_data, **options)


def _npz(path: Path, **arrays: Any) -> None:
    np.savez(path, **arrays)


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, X)
    return buffer.getvalue()


X, Y = np.zeros((8, 3)), np.arange(8) % 2


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda p: p.write_bytes(b"not an archive"), "not a .npz file that can be read"),
        (lambda p: p.write_bytes(b""), "not a .npz file that can be read"),
        (lambda p: p.write_bytes(pickle.dumps({"x": 1})), "not a .npz file that can be read"),
        (lambda p: p.write_bytes(_npy()), "not a .npz file"),
        (lambda p: _npz(p, x=np.array([{}, {}], dtype=object), y=[0, 1]), "it holds Python objects"),
        (lambda p: _npz(p, x=X), "no array 'y'; expected x, y"),
        (lambda p: _npz(p, x=X, label=Y), "'label' is not one of"),
        (lambda p: _npz(p, x_train=X, y_train=Y), "no array 'x_test'"),
        (lambda p: _npz(p, x=X, y=Y[:5]), "expected one value a sample (8)"),
        (lambda p: _npz(p, x=X, y=Y + 0.5), "expected integers or strings, got float64"),
        (lambda p: _npz(p, x=X * np.nan, y=Y), "expected finite numbers"),
        (lambda p: _npz(p, x=X.astype(str), y=Y), "expected numbers, got dtype"),
        (lambda p: _npz(p, x=np.zeros((8, 2, 2, 2, 2)), y=Y), "expected 3 or 4 dimensions"),
        (lambda p: _npz(p, x=X[:0], y=Y[:0]), "no samples"),
        (lambda p: _npz(p, x_train=X, y_train=Y, x_test=X[:, :2], y_test=Y), "expected shape (3,)"),
        (lambda p: _npz(p, x_train=X, y_train=Y, x_test=X, y_test=Y * 0), "test samples: class 1 of 2 has none"),
        (lambda p: _npz(p, x=X, y=Y, task=np.arange(8) // 4), "'class' needs classes of each experience's own"),
        (lambda p: _npz(p, x=np.float64(3), y=Y), "x: expected one entry a sample, got a single value"),
    ],
)
def test_array_files(write: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    write(tmp_path / "a.npz")
    assert said in refused("arrays", data_folder(tmp_path), path="a.npz")


def test_task_arrays_make_the_experiences(tmp_path: Path) -> None:
    y = np.repeat(["cat", "dog", "bird", "fish"], 10)
    _npz(tmp_path / "a.npz", x=np.ones((40, 6, 6, 3), np.uint8), y=y, task=np.arange(40) // 20)
    task = CATALOGUE.find("task", "arrays").load()
    stream = open_stream({"path": "a.npz"}, task, data_folder(tmp_path), 0)
    assert stream.class_names == ("bird", "cat", "dog", "fish")
    assert [e.classes for e in stream.experiences] == [(1, 2), (0, 3)]
    assert stream.input_shape == (3, 6, 6)
    _npz(tmp_path / "b.npz", x=np.ones((40, 6)), y=np.arange(40) % 2, task=np.arange(40) // 20)
    stream = open_stream({"path": "b.npz", "scenario": "domain"}, task, data_folder(tmp_path), 0)
    assert [e.classes for e in stream.experiences] == [(0, 1), (0, 1)]


def test_damaged_image_is_named(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / "x.png").write_bytes(b"\x89PNG broken")
    assert "x.png: not an image that can be read" in refused("image_folder", data_folder(tmp_path), path=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "file", "command"),
    [
        ("split_mnist", "MNIST/raw/train-images-idx3-ubyte.gz", "from torchvision.datasets import MNIST"),
        ("split_fashion_mnist", "FashionMNIST/raw/train-images", "import FashionMNIST"),
        ("split_cifar100", "cifar-100-python/train or cifar100/meta.json", "import CIFAR100"),
        ("clinc150", "clinc150/data_full.json", "curl -L"),
    ],
)
def test_missing_data(name: str, file: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "reachable", lambda *_: False)
    message = refused(name, data_folder(tmp_path / "none"))
    assert f"no {file}" in message
    assert str(tmp_path / "none") in message
    assert "(--data)" in message
    assert "no answer from http" in message
    assert f"get it with: {command}" in message or command in message.split("get it with: ")[1]
    assert not (tmp_path / "none").exists()


def test_damaged_mnist(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(b"\x1f\x8b cut short")
    message = refused("split_mnist", data_folder(tmp_path))
    assert "train-images-idx3-ubyte.gz" in message
    assert "delete the file and get it again" in message
