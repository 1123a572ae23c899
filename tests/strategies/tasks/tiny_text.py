"""Short texts of made-up words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from cmoe.streams.task import Modality, Task


@dataclass
class TinyText(Task):
    """Six classes, each with words of its own among common ones."""

    modality: ClassVar[Modality] = "text"

    def benchmark(self, data: Any, seed: int) -> Any:
        import torch

        from cmoe.streams.builders import class_incremental

        generator = torch.Generator().manual_seed(0)

        def texts(n: int) -> tuple[Any, Any]:
            y = torch.arange(n) % 6
            x = torch.randint(1, 40, (n, 8), generator=generator)
            x[:, 0] = 40 + y
            lengths = torch.randint(2, 9, (n, 1), generator=generator)
            return x.where(torch.arange(8) < lengths, 0).int().numpy(), y

        return class_incremental(self, seed, train=texts(180), test=texts(36), experiences=3, vocabulary=50)
