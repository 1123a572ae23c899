"""Opened streams of every built-in task, each opened once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmoe.plugins import Catalogue
from cmoe.streams import DataFolder, Stream, data_folder, open_stream

ROOT = Path(__file__).resolve().parents[2]
CATALOGUE = Catalogue()

# what is enough to see every property and quick
OPTIONS: dict[str, dict] = {
    "split_digits": {},
    "digit_attributes": {},
    "arrays": {"path": "arrays.npz", "experiences": 2},
    "image_folder": {"path": "images", "experiences": 2, "size": 8},
    "text_domains": {"bytes_per_domain": 20_000, "length": 64},
    "split_mnist": {},
    "permuted_mnist": {"experiences": 3},
    "rotated_mnist": {"experiences": 3},
    "split_fashion_mnist": {},
    "split_cifar100": {"augment": False},
    "clinc150": {},
}
NEEDS = {
    "split_mnist": "MNIST",
    "permuted_mnist": "MNIST",
    "rotated_mnist": "MNIST",
    "split_fashion_mnist": "FashionMNIST",
    "split_cifar100": "cifar100",
    "clinc150": "clinc150",
}


@pytest.fixture(scope="session")
def made_data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """A data folder with a small array file and a few images."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    y = np.arange(120) % 4
    np.savez(root / "arrays.npz", x=random.normal(size=(120, 6)) + y[:, None], y=y)
    for label in "abcd":
        (root / "images" / label).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 256, (9, 7, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / label / f"{i}.png")
    return data_folder(root)


def real_data(folder: str) -> DataFolder:
    """The data folder that holds this data set; skips where there is none."""
    for root in filter(None, (os.environ.get("CMOE_DATA"), ROOT.parent / "shared" / "data")):
        if (Path(root) / folder).exists():
            return data_folder(root)
    pytest.skip(f"no {folder} in $CMOE_DATA")


@pytest.fixture(scope="session")
def opened(made_data: DataFolder) -> Callable[..., Stream]:
    """`opened(name, seed, **options)`: the stream of a task, opened once."""
    known: dict[str, Stream] = {}

    def get(name: str, seed: int = 0, **options: object) -> Stream:
        key = f"{name} {seed} {options}"
        if key not in known:
            data = real_data(NEEDS[name]) if name in NEEDS else made_data
            spec = {"name": name, **OPTIONS[name], **options}
            known[key] = open_stream(spec, CATALOGUE.find("task", name).load(), data, seed)
        return known[key]

    return get


@pytest.fixture(params=OPTIONS, scope="session")
def stream(request: pytest.FixtureRequest, opened: Callable[..., Stream]) -> Stream:
    """Every built-in task's stream in turn."""
    return opened(request.param)
