"""From files as people have them to a model's raw samples, and to predictions."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmoe.errors import UserError, nearest
from cmoe.inputs import full_scale
from cmoe.restored import Restored
from cmoe.streams import Stream
from cmoe.streams.text import hash_words

Note = Callable[[str], None]
ARRAYS = (".npz", ".npy")
TEXTS = (".txt",)
LONGEST = 60  # characters of a text that are shown


@dataclass
class Samples:
    """What one file holds.

    Attributes:
        names: what each sample is called in a table.
        raw: (N, ...) samples as the stream stores them.
        targets: (N,) class ids, where the file has them.
    """

    names: list[str]
    raw: Tensor
    targets: list[int] | None = None


@dataclass
class Prediction:
    """One input's answer: the most probable classes with their probabilities, best first."""

    input: str
    top: list[tuple[int, float]]
    target: int | None = None


@dataclass
class Measured:
    """How well a language model knows a text: bits per byte, and the share of bytes it had right."""

    input: str
    bytes: int
    bits_per_byte: float
    accuracy: float


def classify(restored: Restored, files: Sequence[str | Path], task: int | None, top: int, note: Note) -> list[Prediction]:  # fmt: skip
    """Predictions for every input in `files`, in order.

    Raises:
        UserError: a file is not there, cannot be read, or does not fit the stream's inputs.
    """
    # all files first: a wrong one is reported before anything is computed, and many images make one batch
    samples = [read(Path(f), restored.stream, note, task or 0) for f in files]
    found = []
    for _, group in groupby(samples, key=lambda s: s.raw.dtype):
        together = list(group)
        answers = restored.classes(torch.cat([s.raw for s in together]), task, top)
        names = [n for s in together for n in s.names]
        targets = [t for s in together for t in s.targets or [None] * len(s.names)]
        found += [Prediction(n, a, t) for n, a, t in zip(names, answers, targets, strict=True)]
    return found


def measure(restored: Restored, files: Sequence[str | Path], task: int | None) -> list[Measured]:
    """Bits per byte of each file.

    Raises:
        UserError: a file cannot be read or is empty.
    """
    texts = [(str(f), _bytes(Path(f))) for f in files]
    found = []
    for name, text in texts:
        if not text:
            raise UserError(f"{name}: expected at least one byte, it is empty")
        found.append(Measured(name, len(text), *restored.language(text, task)))
    return found


def read(path: Path, stream: Stream, note: Note, task: int = 0) -> Samples:
    """The samples of a file, which belong to experience `task`.

    Raises:
        UserError: as `classify`.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.is_dir():
        raise UserError(f"{path}: expected a file, got a folder; name its files, for example {path}/*")
    suffix = path.suffix.lower()
    if suffix in ARRAYS:
        return _arrays(path, stream, note, task)
    if stream.modality == "text":
        if suffix in TEXTS:
            return _texts(path, stream, note)
        raise UserError(f"{path}: expected .txt (one text a line) or .npz (token ids) for a model of texts")
    if stream.modality == "vector":
        raise UserError(f"{path}: expected .npz with an array x (N, {_shape(stream)[0]}) for a model of vectors")
    return Samples([str(path)], _image(path, stream, note, task))


# -- images -----------------------------------------------------------------------------------------------------


def _image(path: Path, stream: Stream, note: Note, task: int) -> Tensor:
    """One image file as raw samples (1, C, H, W)."""
    import warnings

    from PIL import Image, ImageOps

    channels, height, width = _shape(stream)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(channels)
    if mode is None:
        raise UserError(f"{path}: expected .npz, as this model's images have {channels} channels")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = _plain(ImageOps.exif_transpose(file), mode)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: expected a smaller image ({error})") from error
    except (OSError, ValueError, SyntaxError, EOFError, zlib.error) as error:
        kinds = "an image, .npz or .npy"
        raise UserError(f"{path}: expected {kinds}, got what cannot be read as an image") from error
    if image.size != (width, height):
        note(f"{path}: resized from {image.width} x {image.height} to {width} x {height} pixels")
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).reshape(height, width, channels).permute(2, 0, 1)
    return _as_stored(pixels.unsqueeze(0), 255.0, stream, task)


def _plain(image: Any, mode: str) -> Any:
    """An image with 8 bits a channel in `mode`; what is transparent becomes black, the background of most data."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":  # 16 bits or more a pixel: PIL would cut, not scale
        values = np.asarray(image, dtype=np.float64)
        highest = 65535.0 if image.mode.startswith("I") else max(1.0, float(values.max()))
        image = Image.fromarray((values * (255.0 / highest)).round().clip(0, 255).astype(np.uint8))
    if mode != "RGBA" and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return image.convert(mode)


def _as_stored(values: Tensor, highest: float, stream: Stream, task: int) -> Tensor:
    """Numbers 0..`highest` in the range and type of the stream's raw samples."""
    first = stream.experiences[0].train.x
    if first.is_floating_point():
        return values.to(torch.float32) / highest
    scale = full_scale(stream.transform, task) or 255.0
    if scale == highest:
        return values.to(first.dtype)
    return (values.to(torch.float64) * (scale / highest)).round().to(first.dtype)


# -- arrays -----------------------------------------------------------------------------------------------------


def _arrays(path: Path, stream: Stream, note: Note, task: int) -> Samples:
    """`x` and perhaps `y` of an .npz file, or all of an .npy file."""
    found = _load(path)
    unknown = sorted(found.keys() - {"x", "y"})
    if "x" not in found:
        has = f"it has {', '.join(unknown)}" if unknown else "it has none"
        raise UserError(f"{path}: expected an array x (and y, where the classes are known), {has}")
    if unknown:
        note(f"{path}: only x and y are used, not {', '.join(unknown)}")
    raw = fitting(path, found["x"], stream, note, task)
    targets = None if "y" not in found else _targets(path, found["y"], len(raw), stream)
    return Samples([f"{path}[{i}]" for i in range(len(raw))], raw, targets)


def _load(path: Path) -> dict[str, np.ndarray]:
    """The file's arrays; objects, which would have to be unpickled, are refused."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"x": loaded}
            return {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = "it holds Python objects" if "allow_pickle" in str(error) else "it cannot be read"
        raise UserError(f"{path}: expected plain arrays saved with numpy.savez, {reason}") from error


def fitting(path: Path | str, x: np.ndarray, stream: Stream, note: Note, task: int) -> Tensor:
    """Samples in the stream's shape and type; one sample alone, and channels behind, are understood."""
    shape = _shape(stream)
    if x.dtype.kind not in "buif":
        raise UserError(f"{path}: x: expected numbers, got {x.dtype}")
    if stream.modality == "image":
        channels, height, width = shape
        behind = (height, width, channels)
        if x.shape[-3:] == behind and x.shape[-3:] != shape and x.ndim in (3, 4):
            x = np.moveaxis(x, -1, -3)
        if x.shape[-2:] == (height, width) and x.shape[-3:] != shape and channels == 1:
            x = np.expand_dims(x, -3)
    if x.shape == shape:
        x = x[None]
    if x.shape[1:] != shape:
        raise UserError(f"{path}: x: expected shape {_words(shape)}, got {tuple(x.shape)}")
    if not len(x):
        raise UserError(f"{path}: x: expected at least one sample, got none")
    first = stream.experiences[0].train.x
    if stream.vocabulary is not None:
        return _tokens(path, x, stream)
    if not np.isfinite(x).all():
        raise UserError(f"{path}: x: expected finite numbers, got NaN or infinity")
    if first.is_floating_point():
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return _pixels(path, x, stream, note, task)


def _pixels(path: Path | str, x: np.ndarray, stream: Stream, note: Note, task: int) -> Tensor:
    """Pixels for a stream that stores bytes; floats up to 1 are what the transform makes of bytes and stay so."""
    whole = x.dtype.kind in "bui" or (float(x.max()) > 1.0 and bool((x == np.round(x)).all()))
    if not whole:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    low, high = int(x.min()), int(x.max())
    if low < 0 or high > 255:
        raise UserError(f"{path}: x: expected pixels 0..255, got {low}..{high}")
    values = torch.from_numpy(np.ascontiguousarray(x, dtype=np.uint8))
    scale = full_scale(stream.transform, task)
    if scale is not None and high > scale:
        note(f"{path}: pixels up to {high} were scaled to 0..{scale:g}, the range of this stream")
        return _as_stored(values, 255.0, stream, task)
    return values


def _tokens(path: Path | str, x: np.ndarray, stream: Stream) -> Tensor:
    if x.dtype.kind not in "ui":
        raise UserError(f"{path}: x: expected integer token ids, got {x.dtype}")
    assert stream.vocabulary is not None
    if int(x.min()) < 0 or int(x.max()) >= stream.vocabulary:
        raise UserError(f"{path}: x: expected token ids 0..{stream.vocabulary - 1}, got {x.min()}..{x.max()}")
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32))


def _targets(path: Path, y: np.ndarray, rows: int, stream: Stream) -> list[int]:
    """Class ids of an array of ids or of class names."""
    if y.ndim == 0 and rows == 1:
        y = y[None]
    if y.shape != (rows,) or y.dtype.kind not in "uiU":
        raise UserError(
            f"{path}: y: expected {rows} class ids or names, one a sample, got {y.dtype} of shape {y.shape}"
        )
    names = list(stream.class_names)
    if y.dtype.kind == "U":
        for name in y.tolist():
            if name not in names:
                raise UserError(f"{path}: y: expected names of classes, got '{name}'{nearest(name, names)}")
        return [names.index(name) for name in y.tolist()]
    wrong = [int(v) for v in y if not 0 <= int(v) < len(names)]
    if wrong:
        raise UserError(f"{path}: y: expected classes 0..{len(names) - 1}, got {wrong[0]}")
    return [int(v) for v in y]


# -- texts ------------------------------------------------------------------------------------------------------


def encode(texts: Sequence[str], stream: Stream) -> Tensor:
    """Texts as token ids (N, L), words hashed as the built-in text streams do."""
    assert stream.vocabulary is not None
    return torch.from_numpy(hash_words(texts, stream.vocabulary, _shape(stream)[0]))


def _texts(path: Path, stream: Stream, note: Note) -> Samples:
    try:
        lines = _bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected text in UTF-8, byte {error.start} is not") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"{path}: expected one text a line, there is none")
    if set(stream.name.split("+")) != {"clinc150"}:
        note(f"{path}: words are hashed into {stream.vocabulary} ids; a task that makes its ids otherwise needs .npz")
    return Samples([_short(t) for t in texts], encode(texts, stream))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected a file, got a folder; name its files, for example {path}/*") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _shape(stream: Stream) -> tuple[int, ...]:
    """One raw sample."""
    return tuple(stream.experiences[0].train.x.shape[1:])


def _words(shape: tuple[int, ...]) -> str:
    return f"(N, {', '.join(map(str, shape))})"


def accuracy(predictions: Sequence[Prediction]) -> float | None:
    """The share that is right, among those whose class is known; None where none is."""
    known = [p for p in predictions if p.target is not None]
    return sum(p.top[0][0] == p.target for p in known) / len(known) if known else None


def documents(predictions: Sequence[Prediction], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One mapping for each prediction, for JSON."""
    for p in predictions:
        best, confidence = p.top[0]
        answer = {"input": p.input, "class": names[best], "id": best, "confidence": confidence}
        if p.target is not None:
            answer |= {"target": p.target, "right": p.target == best}
        if len(p.top) > 1:
            answer["top"] = [{"class": names[c], "id": c, "confidence": s} for c, s in p.top]
        yield answer
