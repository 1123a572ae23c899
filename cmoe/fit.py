"""One phase as one Lightning fit, watched between chunks."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch

from cmoe.learners import Learner

DTYPES = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


@dataclass(frozen=True)
class Placement:
    """Where and in what precision a run computes.

    Attributes:
        accelerator: 'cpu' or 'gpu'.
        precision: Lightning's name of it.
    """

    accelerator: str
    precision: str

    @property
    def device(self) -> torch.device:
        """The device of weights and batches."""
        return torch.device("cuda" if self.accelerator == "gpu" else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return DTYPES.get(self.precision, torch.float32)

    @contextlib.contextmanager
    def forward(self) -> Generator[None]:
        """What a forward outside of a fit must run in, to compute as inside."""
        if self.precision == "bf16-mixed":
            with torch.autocast(self.device.type, torch.bfloat16):
                yield
        else:
            yield


class Watch(pl.Callback):
    """Calls `tick` between chunks: for progress, checkpoints and a clean stop."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """After each chunk."""
        self.tick()


def fit(learner: Learner, loader: Any, placement: Placement, tick: Callable[[], None]) -> None:
    """Train on every chunk of `loader` once.

    Args:
        learner: with its phase begun.
        loader: an iterable of chunks.
        placement: where and in what precision.
        tick: called after each chunk; what it raises ends the fit.
    """
    with quiet():
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator=placement.accelerator,
            devices=1,
            precision=placement.precision,  # ty: ignore[invalid-argument-type]
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            callbacks=[Watch(tick)],
        )
        trainer.fit(learner, train_dataloaders=loader)


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without Lightning's announcements: a run makes many short fits."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"pytorch_lightning|lightning")
            warnings.filterwarnings("ignore", message=".*(num_workers|litlogger|`training_step` returned).*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
