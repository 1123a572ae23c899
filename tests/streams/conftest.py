"""A small task and its streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from cmoe.streams import Stream, Task, class_incremental, data_folder, open_stream


@dataclass
class Cells(Task):
    """Six classes of 3x4 images, 20 training and 5 test samples each; a pixel tells the row of the storage.

    Options:
        experiences: in how many groups.
        shift: added to the first pixel.
    """

    experiences: int = 3
    shift: int = 0

    def benchmark(self, data: Any, seed: int) -> Any:
        y, y_test = torch.arange(120) % 6, torch.arange(30) % 6
        x = torch.arange(120 * 12).remainder(251).to(torch.uint8).reshape(120, 3, 4)
        x[0, 0, 0] += self.shift
        return class_incremental(
            self, seed, train=(x, y), test=(x[:30], y_test), experiences=self.experiences, transform=self.transform()
        )


def cells(seed: int = 0, task: type[Task] = Cells, **options: Any) -> Stream:
    return open_stream({"name": "cells", **options}, task, data_folder("nowhere"), seed)


@pytest.fixture(scope="session")
def stream() -> Stream:
    return cells()
