"""The base of task plugins. Imports nothing heavy, so that options are checked at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cmoe.config.types import Count, Fraction, PositiveInt, TaskSpec
from cmoe.streams.data import DataFolder

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

    from cmoe.streams.transforms import BatchTransform

Scenario = Literal["class", "domain", "task", "joint", "online"]
Modality = Literal["image", "vector", "text", "bytes"]


@dataclass
class Task:
    """A stream of experiences: the base class of task plugins.

    Options:
        scenario: what is known at test time: 'class' (one label space, task unknown), 'domain' (the same classes in
            every experience), 'task' (the task label is given), 'joint' (all experiences at once), 'online' (one
            pass over small experiences, which arrive in an order drawn by the run's seed).
        class_order: 'natural', 'shuffled' (by the run's seed), or the classes in the order wanted (where the
            experiences are domains: the domains).
        validation: share of each experience's training samples that is held out to choose hyper-parameters; the
            same samples whatever the run's seed.
        limit: train only on this many first experiences; 0 trains on all (`cmoe extend` goes on with the rest).
        online_size: samples in one small experience of the online scenario.
        then: further tasks whose experiences follow, in the same scenario; their classes are new ones (`cmoe extend`
            adds to this list).
    """

    modality: ClassVar[Modality] = "image"
    scenarios: ClassVar[tuple[str, ...]] = ("class", "domain", "task", "joint", "online")

    scenario: Literal["class", "domain", "task", "joint", "online"] = "class"
    class_order: Literal["natural", "shuffled"] | list[int] = "natural"
    validation: Fraction = 0.1
    limit: Count = 0
    online_size: PositiveInt = 10
    then: list[TaskSpec] = field(default_factory=list)

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        """The Avalanche benchmark with the streams `train`, `validation` and `test`.

        Args:
            data: where data sets are looked for.
            seed: the run's seed; only the class order (and what the task documents) may depend on it.

        Raises:
            UserError: an option has a value that this data cannot have, or the data is not there.
        """
        raise NotImplementedError(f"{type(self).__name__} must define benchmark(data, seed)")

    def transform(self) -> BatchTransform | None:
        """How a raw batch becomes the model's input; None divides uint8 by 255 and leaves the rest as it is.

        A transform given to the builder wins over this one.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """Facts about a benchmark that no builder made: `class_names`, `vocabulary`, experience `names`, `modality`."""
        return {}
