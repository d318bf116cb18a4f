"""What the Triton kernels share: whether Triton runs here, and encode and decode of the formats inside a kernel."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton, MISSING = None, f"triton does not load: {error}"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CPU = "Triton runs there only in its interpreter, with TRITON_INTERPRET=1 set before the start"
OLDEST = (8, 0)  # compute capability; older ones have no bf16


def why_not(tensors: dict[str, Tensor | None]) -> str | None:
    """Why a Triton kernel cannot run on these tensors, in words, or None.

    tensors   by the name that the message gives them; None stands for one that was not given
    """
    if triton is None:
        return MISSING
    given = {name: x for name, x in tensors.items() if x is not None}
    first = next(iter(given.values()))
    for name, x in given.items():
        if x.device.type == "cpu" and not INTERPRETED:
            return f"{name} is on the CPU: {ON_CPU}"
        if x.device.type not in ("cpu", "cuda"):
            return f"{name} is on {x.device}: this kernel takes CUDA tensors"
        if x.device != first.device:
            return f"{name} is on {x.device}, other tensors on {first.device}"
    return too_old(first.get_device()) if first.is_cuda and torch.version.hip is None else None


@functools.cache
def too_old(device: int) -> str | None:
    """Why an NVIDIA GPU is too old, or None."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"the GPU is sm_{capability[0]}{capability[1]}: this kernel needs sm_{OLDEST[0]}{OLDEST[1]} or newer"
    return None
