"""A weight that FSDP gathered as codes (sharded.py): what a layer finds in place of its parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .coded import written
from .state import Coded

_aten = torch.ops.aten
RESHAPED = (_aten.detach.default, _aten.as_strided.default, _aten.view.default)  # what makes a parameter of a tensor


class GatheredWeight(torch.Tensor):
    """Codes that pass for the weight that they stand for: its shape, its dtype, its place in the autograd graph.

    codes  uint8 [N, K]
    scale  fp32 [1, 1], decodes them
    fmt    the name of their format

    The layer multiplies the codes; every other operation sees the decoded numbers. The gradient is an ordinary tensor.
    torch.compile sees codes and scale.
    """

    codes: Tensor
    scale: Tensor
    fmt: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, fmt: str, dtype: torch.dtype) -> GatheredWeight:
        out: GatheredWeight = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device
        )
        out.codes, out.scale, out.fmt = codes, scale, fmt
        return out

    def decode(self) -> Tensor:
        """The numbers that the codes stand for."""
        out: Tensor = torch.ops.fp8kernels.dequantize(self.codes, self.scale, self.fmt, self.dtype)
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in RESHAPED:
            x = args[0]
            return GatheredWeight(func(x.codes, *args[1:], **kwargs), x.scale, x.fmt, x.dtype)
        if any(isinstance(x, GatheredWeight) for x in written(func, args, kwargs)):
            raise RuntimeError(f"{func} would write into gathered codes: write into the sharded parameter")
        args, kwargs = tree_map_only(GatheredWeight, GatheredWeight.decode, (args, kwargs))
        return func(*args, **kwargs)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], (self.fmt, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], how: Any, size: Any, stride: Any) -> GatheredWeight:
        return GatheredWeight(inner["codes"], inner["scale"], *how)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GatheredWeight({tuple(self.shape)}, {self.dtype}, {self.fmt}, device={str(self.device)!r})"


def gathered_codes(weight: Tensor, *, transpose: bool) -> Coded | None:
    """The codes of a gathered weight, transposed ones too where they are asked for; None for any other tensor."""
    if not isinstance(weight, GatheredWeight):
        return None
    codes_t = weight.codes.t().contiguous() if transpose else None  # [K, N]
    return Coded(weight.codes, weight.scale, weight.fmt, codes_t)
