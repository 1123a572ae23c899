"""A data folder with a few samples of every data set, in its published form, so that every task runs in no time."""

from __future__ import annotations

import gzip
import json
import random
import struct
from pathlib import Path

import numpy as np
from PIL import Image

INTENTS, DOMAINS = 6, 3
LETTERS = {"a": "aeinrst ", "b": "(){}=+01 \n", "c": "ABCdef,. "}


def write(root: Path) -> None:
    """Write everything below `root`, always the same."""
    root.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    _arrays(root, draw)
    _pictures(root / "pictures", draw)
    for name in ("MNIST", "FashionMNIST"):
        _idx(root / name / "raw", draw)
    _cifar(root / "cifar100", draw)
    words = random.Random(0)
    _clinc(root / "clinc150", words)
    for name, letters in LETTERS.items():
        (root / f"{name}.txt").write_text("".join(words.choices(letters, k=1200)))


def _arrays(root: Path, draw: np.random.Generator) -> None:
    y = np.arange(96) % 6
    np.savez(root / "vectors.npz", x=(draw.normal(size=(96, 6)) + y[:, None]).astype(np.float32), y=y)
    np.savez(root / "grey.npz", x=draw.integers(0, 256, (96, 8, 8), dtype=np.uint8), y=y)
    np.savez(root / "colour.npz", x=draw.integers(0, 256, (96, 8, 8, 3), dtype=np.uint8), y=y.astype(str))
    # each class in every task, as in domains
    np.savez(
        root / "tasks.npz", x=draw.integers(0, 256, (96, 1, 8, 8), dtype=np.uint8), y=y % 3, task=np.arange(96) // 32
    )


def _pictures(root: Path, draw: np.random.Generator) -> None:
    for label in "abcd":
        (root / label).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(draw.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(root / label / f"{i}.png")


def _idx(root: Path, draw: np.random.Generator) -> None:
    root.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        x = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        y = (np.arange(count) % 10).astype(np.uint8)
        for kind, header, content in (
            ("images-idx3-ubyte", struct.pack(">HBBIII", 0, 8, 3, count, 28, 28), x),
            ("labels-idx1-ubyte", struct.pack(">HBBI", 0, 8, 1, count), y),
        ):
            (root / f"{part}-{kind}.gz").write_bytes(gzip.compress(header + content.tobytes(), 1))


def _cifar(root: Path, draw: np.random.Generator) -> None:
    names = ["apple", "bear"]
    for part, rows, columns in (("train", 20, 25), ("test", 10, 10)):
        (root / part).mkdir(parents=True)
        for label, name in enumerate(names):
            sheet = np.full((32 * rows, 32 * columns, 3), 40 * label, dtype=np.uint8)
            sheet[::5, ::7] = draw.integers(0, 256, 3)
            Image.fromarray(sheet).save(root / part / f"{label:02d}_{name}.webp", lossless=True, method=0, quality=0)
    (root / "meta.json").write_text(json.dumps({"fine_label_names": names}))


def _clinc(root: Path, words: random.Random) -> None:
    intents = [f"intent_{i}" for i in range(INTENTS)]

    def texts(count: int) -> list[list[str]]:
        return [
            [" ".join([f"w{i % INTENTS}", *(f"x{words.randrange(30)}" for _ in range(words.randrange(1, 8)))]), intents[i % INTENTS]]
            for i in range(count)
        ]  # fmt: skip

    root.mkdir(parents=True)
    (root / "data_full.json").write_text(json.dumps({"train": texts(96), "val": texts(24), "test": texts(36)}))
    groups = {f"domain {d}": intents[d * INTENTS // DOMAINS : (d + 1) * INTENTS // DOMAINS] for d in range(DOMAINS)}
    (root / "domains.json").write_text(json.dumps(groups))
