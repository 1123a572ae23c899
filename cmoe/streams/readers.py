"""Reading published data sets from the data folder, in torchvision's layout where there is one.

Nothing is unpickled but by torchvision's own class after its checksum.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cmoe.streams.data import DataFolder
from cmoe.streams.fetch import damaged, download_file, obtain

Images = tuple[np.ndarray, np.ndarray]

_CLINC = "https://raw.githubusercontent.com/clinc/oos-eval/master/data"


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes, gzipped or not (http://yann.lecun.com/exdb/mnist, "the idx file format").

    Raises:
        UserError: damaged, or not such a file.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, dimensions = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        start = 4 + 4 * dimensions
        if zeros or kind != 8 or len(content) - start != int(np.prod(shape)):
            raise ValueError("not an idx file of bytes, or cut short")
        # bytearray: torch wants memory that may be written
        return np.frombuffer(bytearray(content), np.uint8, offset=start).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise damaged(path, str(error) or "cut short") from error


def mnist(data: DataFolder, name: str = "MNIST") -> tuple[Images, Images]:
    """MNIST or FashionMNIST: uint8 images (N, 28, 28) and labels (N,), for training and test.

    Raises:
        UserError: not there and not to be had, or damaged.
    """
    stems = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]

    def found() -> list[Path | None]:
        return [data.first(f"{name}/raw/{s}", f"{name}/raw/{s}.gz") for s in stems]

    def lacking() -> str:
        return f"{name}/raw/{stems[found().index(None)]}.gz"

    if None in found():
        command = f"python -c \"from torchvision.datasets import {name}; {name}('{data.root}', download=True)\""

        def download(root: Path) -> None:
            import torchvision.datasets

            getattr(torchvision.datasets, name)(str(root), download=True)

        mirror = {"MNIST": "https://ossci-datasets.s3.amazonaws.com/mnist/train-labels-idx1-ubyte.gz"}.get(
            name, "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/train-labels-idx1-ubyte.gz"
        )
        obtain(data, name, [lacking()], command, mirror, download)
    x, y, x_test, y_test = (read_idx(path) for path in found() if path is not None)
    return (x, y), (x_test, y_test)


def cifar100(data: DataFolder) -> tuple[Images, Images, list[str]]:
    """CIFAR-100: uint8 images (N, 3, 32, 32), fine labels (N,) and their names.

    Read from `cifar-100-python/` (torchvision) or from `cifar100/` (lossless WebP sheets: `train/NN_name.webp` of
    20 x 25 tiles and `test/` of 10 x 10, row by row).

    Raises:
        UserError: not there and not to be had, or damaged.
    """
    sheets = data.first("cifar100/meta.json")
    if sheets is not None:
        return _cifar_sheets(sheets.parent)
    from torchvision.datasets import CIFAR100

    def download(root: Path) -> None:
        CIFAR100(str(root), download=True)

    if data.first("cifar-100-python/train") is None:
        command = f"python -c \"from torchvision.datasets import CIFAR100; CIFAR100('{data.root}', download=True)\""
        looked = ["cifar-100-python/train", "cifar100/meta.json"]
        obtain(data, "CIFAR-100", looked, command, "https://www.cs.toronto.edu/~kriz/cifar.html", download)
    try:
        parts = [CIFAR100(str(data.root), train=train) for train in (True, False)]
    except RuntimeError as error:
        raise damaged(data.root / "cifar-100-python", "its checksums are not those of CIFAR-100") from error
    (x, y), (x_test, y_test) = (
        (np.ascontiguousarray(p.data.transpose(0, 3, 1, 2)), np.array(p.targets, dtype=np.int64)) for p in parts
    )
    return (x, y), (x_test, y_test), list(parts[0].classes)


def _cifar_sheets(folder: Path) -> tuple[Images, Images, list[str]]:
    from PIL import Image

    names = list(read_json(folder / "meta.json")["fine_label_names"])

    def read(part: str, rows: int, columns: int) -> Images:
        images = np.empty((len(names), rows * columns, 3, 32, 32), dtype=np.uint8)
        for label, name in enumerate(names):
            path = folder / part / f"{label:02d}_{name}.webp"
            try:
                with Image.open(path) as sheet:
                    pixels = np.asarray(sheet.convert("RGB"))
                tiles = pixels.reshape(rows, 32, columns, 32, 3).transpose(0, 2, 4, 1, 3)
            except (OSError, ValueError) as error:
                raise damaged(path, str(error)) from error
            images[label] = tiles.reshape(rows * columns, 3, 32, 32)
        return images.reshape(-1, 3, 32, 32), np.repeat(np.arange(len(names)), rows * columns)

    return read("train", 20, 25), read("test", 10, 10), names


def clinc150(data: DataFolder) -> tuple[dict[str, list[tuple[str, str]]], dict[str, list[str]]]:
    """CLINC150 (Larson et al. 2019): (text, intent) pairs of 'train', 'val' and 'test', and each domain's intents.

    Raises:
        UserError: not there and not to be had, or damaged.
    """
    files = ("data_full.json", "domains.json")

    def download(root: Path) -> None:
        for file in files:
            if data.first(f"clinc150/{file}") is None:
                download_file(f"{_CLINC}/{file}", root / "clinc150" / file)

    lacking = [f"clinc150/{file}" for file in files if data.first(f"clinc150/{file}") is None]
    if lacking:
        target = data.root / "clinc150"
        command = "; ".join(f"curl -L --create-dirs -o {target / file} {_CLINC}/{file}" for file in files)
        obtain(data, "CLINC150", lacking[:1], command, f"{_CLINC}/{files[1]}", download)
    full, domains = (read_json(data.root / "clinc150" / file) for file in files)
    try:
        texts = {part: [(str(t), str(intent)) for t, intent in full[part]] for part in ("train", "val", "test")}
        # some copies write blanks where the texts have underscores
        groups = {str(d): [str(i).replace(" ", "_") for i in intents] for d, intents in domains.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(data.root / "clinc150", f"not the published form ({error})") from error
    return texts, groups


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        UserError: damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
