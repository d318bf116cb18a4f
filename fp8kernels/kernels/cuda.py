"""What every CUDA kernel asks of the machine: a module that loads, a driver, a GPU that its machine code runs on."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .compiled import load

_cuda, MISSING = load("_cuda", " (it is built where nvcc is on the path)")


def why_not(tensors: dict[str, Tensor | None], *, at_least: tuple[int, int] = (8, 0)) -> str | None:
    """Why a CUDA kernel cannot run on these tensors, in words, or None.

    tensors   by the name that the message gives them; None stands for one that was not given
    at_least  the smallest compute capability that the kernel is written for
    """
    for name, x in tensors.items():
        if x is not None and not x.is_cuda:
            if _cuda is None:
                return MISSING
            return no_gpu() or f"{name} is on {x.device}: this kernel takes CUDA tensors"
    if _cuda is None:
        return MISSING
    given = [x for x in tensors.values() if x is not None]
    for name, x in tensors.items():
        if x is not None and x.device != given[0].device:
            return f"{name} is on {x.device}, other tensors on {given[0].device}"
    return unfit(given[0].get_device(), at_least)


@functools.cache
def no_gpu() -> str | None:
    """Why there is no GPU to run on, or None: no driver, one that is too old, or no device."""
    if not torch.cuda.is_available():
        return f"no GPU: torch.cuda.is_available() is False ({_cuda.driver_error() or 'torch was built without CUDA'})"
    return None


@functools.cache
def unfit(device: int, at_least: tuple[int, int]) -> str | None:
    """Why kernels of this build do not run on a GPU, or None; its capability does not change."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < at_least:
        return f"the GPU is sm_{major}{minor}: this kernel needs sm_{at_least[0]}{at_least[1]} or newer"
    if not runs_on(_cuda.architectures(), (major, minor)):
        built = ", ".join(_cuda.architectures())
        return f"the GPU is sm_{major}{minor}: fp8kernels._cuda was built for {built}; build it again with that one"
    return None


def runs_on(built: list[str], capability: tuple[int, int]) -> bool:
    """Whether machine code of one of the built architectures ("sm_80", "sm_90a") runs on a GPU.

    Code runs on its own major version with the same or a newer minor one; with an "a" on exactly its own.
    """
    major, minor = capability
    for name in built:
        number = name.removeprefix("sm_").rstrip("af")
        there = int(number[:-1]), int(number[-1])
        if there == capability or (there[0] == major and there[1] <= minor and not name.endswith("a")):
            return True
    return False
