"""What a task plugin calls to turn arrays into an Avalanche benchmark.

Data is stored once; experiences are index maps into it. Validation rows are chosen class by class, the same in every
run. Scenarios follow van de Ven et al. 2022 ("Three types of incremental learning").
"""

from __future__ import annotations

from cmoe.streams.classes import class_incremental, task_incremental
from cmoe.streams.domains import domain_incremental, language
from cmoe.streams.labelings import attributes

__all__ = ["attributes", "class_incremental", "domain_incremental", "language", "task_incremental"]
