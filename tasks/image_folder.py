"""Anybody's images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from cmoe.config.types import Count, Fraction, PositiveInt
from cmoe.errors import UserError
from cmoe.streams.task import Modality, Task

if TYPE_CHECKING:
    from pathlib import Path

    from avalanche.benchmarks import CLScenario

    from cmoe.streams.data import DataFolder


@dataclass(kw_only=True)
class ImageFolder(Task):
    """Your own images in torchvision's ImageFolder layout: one folder for each class.

    The class folders lie in `train/` and `test/`, or directly in the folder; then a share becomes the test set.

    Options:
        path: the folder, as given or below the data folder.
        size: images are scaled to this many pixels in height and width.
        grey: one channel instead of three.
        experiences: in how many equal groups the classes come; 0 is one experience for each class.
        test: share of each class that becomes the test set where there is no `test/`.
    """

    modality: ClassVar[Modality] = "image"

    path: str
    size: PositiveInt = 32
    grey: bool = False
    experiences: Count = 0
    test: Fraction = 0.2

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        from cmoe.streams.arrays import hold_out
        from cmoe.streams.builders import class_incremental

        root = data.file(self.path)
        if not root.is_dir():
            raise UserError(f"stream.path: expected a folder, got the file {root}")
        if (root / "train").is_dir():
            if not (root / "test").is_dir():
                raise UserError(f"{root}: expected a folder 'test' beside 'train'")
            x, y, names = self._read(root / "train")
            x_test, y_test, names_test = self._read(root / "test")
            if names != names_test:
                odd = sorted(set(names) ^ set(names_test))[0]
                raise UserError(f"{root}: the class '{odd}' is in only one of train and test")
            train, test = (x, y), (x_test, y_test)
        else:
            x, y, names = self._read(root)
            fit, held = hold_out(y, self.test, "images test")
            train, test = (x[fit], y[fit]), (x[held], y[held])
        count = self.experiences or len(names)
        return class_incremental(self, seed, train=train, test=test, experiences=count, class_names=names)

    def _read(self, folder: Path) -> tuple[Any, Any, list[str]]:
        """uint8 images (N, C, size, size), labels (N,), class names."""
        import numpy as np
        import torch
        from PIL import Image
        from torchvision.datasets import ImageFolder as Folder

        try:
            found = Folder(str(folder))
        except FileNotFoundError as error:
            raise UserError(f"{folder}: {' '.join(str(error).split())}") from error
        channels = 1 if self.grey else 3
        x = np.empty((len(found.samples), channels, self.size, self.size), dtype=np.uint8)
        for row, (path, _) in enumerate(found.samples):
            try:
                with Image.open(path) as image:
                    small = image.convert("L" if self.grey else "RGB").resize((self.size, self.size))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise UserError(f"{path}: not an image that can be read ({type(error).__name__})") from error
            x[row] = np.asarray(small).reshape(self.size, self.size, channels).transpose(2, 0, 1)
        return torch.from_numpy(x), torch.tensor(found.targets), list(found.classes)
