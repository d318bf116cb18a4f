"""What every CUDA kernel asks of the machine: a module that loads, a driver, a GPU that its machine code runs on."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from .compiled import EMULATED, load

_cuda, MISSING = load("_cuda", " (it is built where nvcc is on the path)")


def why_not(tensors: dict[str, Tensor | None], *, at_least: tuple[int, int] = (8, 0)) -> str | None:
    """Why a CUDA kernel cannot run on these tensors, in words, or None.

    tensors   by the name that the message gives them; None stands for one that was not given
    at_least  the smallest compute capability that the kernel is written for
    """
    if _cuda is None:
        return MISSING
    for name, x in tensors.items():
        if x is not None and not (x.is_cpu if EMULATED else x.is_cuda):
            kind = "CPU tensors, as it is emulated" if EMULATED else "CUDA tensors"
            return (None if EMULATED else no_gpu()) or f"{name} is on {x.device}: this kernel takes {kind}"
    if EMULATED:
        return None
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


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """`with on(device):` launches go to that GPU."""
    return contextlib.nullcontext() if EMULATED else torch.cuda.device(device)


def stream(device: torch.device) -> int:
    """The current stream of a GPU, as the compiled modules take it."""
    return 0 if EMULATED else torch._C._cuda_getCurrentRawStream(device.index or 0)


@functools.cache
def processors(device: torch.device) -> int:
    """The streaming multiprocessors of a GPU."""
    return 2 if EMULATED else torch.cuda.get_device_properties(device).multi_processor_count


_workspaces: dict[tuple[torch.device, int], Tensor] = {}


def workspace(device: torch.device) -> Tensor:
    """Zeros in which the blocks of a kernel meet, and which it leaves zeroed: see csrc/quantize/workspace.h.

    Kernels of one stream follow each other, so a stream has one for good. A launch that a CUDA graph captures gets its
    own, which the graph zeroes: it may be replayed beside anything.
    """
    size = _cuda.workspace_bytes // 8
    if not EMULATED and torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int64, device=device)
    key = device, stream(device)
    if key not in _workspaces:
        _workspaces[key] = torch.zeros(size, dtype=torch.int64, device=device)
    return _workspaces[key]


def is_exactly(device: torch.device, capability: tuple[int, int]) -> bool:
    """Whether a GPU is of one capability, for kernels in instructions that neither older nor newer ones have."""
    return EMULATED or torch.cuda.get_device_capability(device) == capability


def check(error: int, verb: str) -> None:
    """raises RuntimeError, with CUDA's own words, if a launch did not start"""
    if error:
        raise RuntimeError(f"{verb} did not start: {_cuda.error_string(error)}")
