"""Streams: Avalanche benchmarks, stored once as tensors and handed out as fast, restorable batches.

Names are imported when first used, so that reading a task plugin's options stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmoe.streams.builders import attributes, class_incremental, domain_incremental, language, task_incremental
    from cmoe.streams.data import DataFolder, data_folder
    from cmoe.streams.materialise import open_stream
    from cmoe.streams.scheduler import Batch, BatchScheduler, Chunk, evaluation_batches
    from cmoe.streams.stream import Experience, Split, Stream
    from cmoe.streams.task import Task
    from cmoe.streams.transforms import Augment, BatchTransform, Chain, Flatten, Permute, Rotate, Scale, Tokens

_HOME = {
    "builders": ("attributes", "class_incremental", "domain_incremental", "language", "task_incremental"),
    "data": ("DataFolder", "data_folder"),
    "materialise": ("open_stream",),
    "scheduler": ("Batch", "BatchScheduler", "Chunk", "evaluation_batches"),
    "stream": ("Experience", "Split", "Stream"),
    "task": ("Task",),
    "transforms": ("Augment", "BatchTransform", "Chain", "Flatten", "Permute", "Rotate", "Scale", "Tokens"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Augment",
    "Batch",
    "BatchScheduler",
    "BatchTransform",
    "Chain",
    "Chunk",
    "DataFolder",
    "Experience",
    "Flatten",
    "Permute",
    "Rotate",
    "Scale",
    "Split",
    "Stream",
    "Task",
    "Tokens",
    "attributes",
    "class_incremental",
    "data_folder",
    "domain_incremental",
    "evaluation_batches",
    "language",
    "open_stream",
    "task_incremental",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE:
        return getattr(import_module(f"cmoe.streams.{_MODULE[name]}"), name)
    raise AttributeError(f"module 'cmoe.streams' has no attribute {name!r}")
