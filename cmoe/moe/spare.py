"""Memory of large gradients that is used again in the next step.

On CPU, blocks of 32 MiB and more come from the kernel page by page each time they are allocated: at 33 MB this costs as much as
the product that is written there. A gradient's memory is therefore kept with its parameter, and used again once nobody
holds the gradient (`zero_grad` was called); as long as somebody does, a new one is allocated.
"""

from __future__ import annotations

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils.weak import WeakIdKeyDictionary

LARGE = 32 * 2**20  # bytes; glibc never keeps blocks of this size for itself

_use_count = getattr(torch._C, "_storage_Use_Count", None)
_spare: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> the memory of its gradient


def spare_like(weight: Tensor) -> Tensor | None:
    """Uninitialised memory for the gradient of a large parameter on CPU; None where the usual allocation is as good."""
    if not isinstance(weight, nn.Parameter) or weight.device.type != "cpu" or _use_count is None:
        return None
    if weight.numel() * weight.element_size() < LARGE or not weight.is_contiguous() or torch.compiler.is_compiling():
        return None
    kept: UntypedStorage | None = _spare.get(weight)
    if kept is not None and kept.nbytes() == weight.numel() * weight.element_size() and _use_count(kept._cdata) == 1:
        return weight.new_empty(0).set_(kept, 0, weight.shape, weight.stride())
    fresh = torch.empty_like(weight, memory_format=torch.contiguous_format)
    _spare[weight] = fresh.untyped_storage()
    return fresh
