"""Expert kinds: one file each."""

from cmoe.moe.experts.adapter import Adapter
from cmoe.moe.experts.base import Cohorts, Expert
from cmoe.moe.experts.constant import Constant
from cmoe.moe.experts.conv import Conv
from cmoe.moe.experts.copy import Copy
from cmoe.moe.experts.ffn import FFN
from cmoe.moe.experts.linear import Linear
from cmoe.moe.experts.lora import LoRA
from cmoe.moe.experts.zero import Zero

EXPERTS = {
    "ffn": FFN,
    "linear": Linear,
    "lora": LoRA,
    "adapter": Adapter,
    "conv": Conv,
    "zero": Zero,
    "copy": Copy,
    "constant": Constant,
}

__all__ = [
    "EXPERTS",
    "FFN",
    "Adapter",
    "Cohorts",
    "Constant",
    "Conv",
    "Copy",
    "Expert",
    "Linear",
    "LoRA",
    "Zero",
]
