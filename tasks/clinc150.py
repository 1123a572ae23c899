"""CLINC150 intents, domain by domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from cmoe.config.types import PositiveInt
from cmoe.errors import UserError
from cmoe.streams.task import Modality, Task

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario

    from cmoe.streams.data import DataFolder


@dataclass
class Clinc150(Task):
    """150 intents of short questions in 10 domains of 15 (Larson et al. 2019); words are hashed, nothing is fitted.

    A domain is an experience. 'shuffled' shuffles the domains; an explicit class order is cut into runs of 15.

    Options:
        scenario: 'class' (one label space), 'task' (the domain is given), 'joint' or 'online'.
        validation: 0 leaves it empty; any other value uses the official validation set (20 an intent).
        vocabulary: hash buckets for words; bucket 0 is padding.
        length: words kept of each question.
    """

    modality: ClassVar[Modality] = "text"
    scenarios: ClassVar[tuple[str, ...]] = ("class", "task", "joint", "online")

    scenario: Literal["class", "task", "joint", "online"] = "class"  # ty: ignore[incompatible-mutable-override] - fewer than the base has
    vocabulary: PositiveInt = 8192
    length: PositiveInt = 28

    def benchmark(self, data: DataFolder, seed: int) -> CLScenario:
        from cmoe.streams.builders import class_incremental
        from cmoe.streams.readers import clinc150
        from cmoe.streams.text import hash_words

        if self.vocabulary < 2:
            raise UserError(f"stream.vocabulary: expected at least 2, got {self.vocabulary}")
        texts, domains = clinc150(data)
        intents = [intent for group in domains.values() for intent in group]
        number = {intent: i for i, intent in enumerate(intents)}
        unknown = {intent for part in texts.values() for _, intent in part} - number.keys()
        if unknown:
            raise UserError(f"clinc150/domains.json: no domain for the intent '{min(unknown)}'")
        train, validation, test = (
            (
                hash_words([text for text, _ in texts[part]], self.vocabulary, self.length),
                [number[intent] for _, intent in texts[part]],
            )
            for part in ("train", "val", "test")
        )
        groups = [[number[intent] for intent in group] for group in domains.values()]
        return class_incremental(
            self,
            seed,
            train=train,
            test=test,
            validation=validation,
            groups=groups,
            class_names=intents,
            names=list(domains),
            vocabulary=self.vocabulary,
        )
