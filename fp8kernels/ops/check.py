"""Checks that the verbs share; each error says what was given and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def float_tensor(x: object, verb: str, name: str = "x") -> Tensor:
    """raises TypeError unless x is an fp32, bf16 or fp16 tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{verb}: {name} is {type(x).__name__}, it must be a torch.Tensor")
    if x.dtype not in FLOATS:
        way_out = "call .float() first" if x.dtype == torch.float64 or not x.is_floating_point() else "decode it first"
        raise TypeError(f"{verb}: {name} is {x.dtype}, it must be float32, bfloat16 or float16; {way_out}")
    return x


def same_device(verb: str, **tensors: Tensor | None) -> None:
    """raises ValueError unless all tensors given are on one device."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{verb}: the tensors are on different devices: {devices}; move them with .to(device)")


def matrix_shape(x: Tensor) -> tuple[int, int]:
    """[M, K] that a tensor of any rank is seen as: leading dimensions flattened, the last one kept."""
    if x.ndim == 0:
        return 1, 1
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows, x.shape[-1]


def one_of(verb: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """raises ValueError unless the value is allowed."""
    if value not in allowed:
        raise ValueError(f"{verb}: {name} is {value!r}, it must be one of {', '.join(map(repr, allowed))}")


def reshaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A contiguous result of another shape that autograd does not take for a view, so that it may be changed in place.

    torch refuses `x += y` and `ReLU(inplace=True)` on a view that a custom function made. For results that nothing else
    holds.
    """
    out: Tensor = torch.ops.aten._unsafe_view.default(x, shape)
    return out
