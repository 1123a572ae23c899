"""Expert kinds: one file each."""

from cmoe.moe.experts.base import Cohorts, Expert
from cmoe.moe.experts.ffn import FFN
from cmoe.moe.experts.linear import Linear

EXPERTS = {"ffn": FFN, "linear": Linear}

__all__ = ["EXPERTS", "FFN", "Cohorts", "Expert", "Linear"]
