"""A tensor that is 8-bit codes already, on its way from the module that made it to the layers that multiply them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .state import Coded, ScaledLayer


class CodedTensor(torch.Tensor):
    """Codes that pass for the tensor they stand for: its shape, its dtype, its place in the autograd graph.

    coded    codes, scale, format
    readers  the layers that it was made for: they multiply the codes as they are

    Every other operation sees the decoded numbers, so a hook or another consumer that looks at it works too. It cannot
    be written in place. Its gradient is an ordinary tensor.
    """

    coded: Coded
    readers: tuple[ScaledLayer, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @staticmethod
    def __new__(cls, coded: Coded, dtype: torch.dtype, readers: tuple[ScaledLayer, ...]) -> CodedTensor:
        out: CodedTensor = torch.Tensor._make_wrapper_subclass(
            cls, coded.codes.shape, dtype=dtype, device=coded.codes.device
        )
        out.coded, out.readers = coded, readers
        return out

    def decode(self) -> Tensor:
        """The numbers that the codes stand for, in the dtype that this tensor shows."""
        out: Tensor = torch.ops.fp8kernels.dequantize(self.coded.codes, self.coded.scale, self.coded.fmt, self.dtype)
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return CodedTensor(args[0].coded, args[0].dtype, args[0].readers)
        if func._schema.is_mutable and any(isinstance(x, CodedTensor) for x in written(func, args, kwargs or {})):
            raise RuntimeError(
                f"{func} would write into 8-bit codes that were made for {args[0].readers[0].fp8_name!r}: "
                f"write into a copy (.clone()), or convert with fuse=False"
            )
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> CodedTensor:
        """Codes are never written, so that a copy may share them."""
        return CodedTensor(self.coded, self.dtype, self.readers)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CodedTensor({tuple(self.shape)}, {self.dtype}, {self.coded.fmt}, device={str(self.device)!r})"


def plain(x: Any) -> Any:
    """x, decoded if it is codes."""
    return x.decode() if isinstance(x, CodedTensor) else x


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    return [given.get(a.name) for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def codes_for(layer: ScaledLayer, x: Tensor, *, transpose: bool) -> Coded | None:
    """The codes of x if they were made for this layer, else None; transposed ones are made where they are missing."""
    if not isinstance(x, CodedTensor) or all(layer is not reader for reader in x.readers):
        return None
    if transpose and x.coded.codes_t is None:
        return x.coded._replace(codes_t=x.coded.codes.reshape(-1, x.shape[-1]).t().contiguous())
    return x.coded


class Straight(torch.autograd.Function):
    """y as codes; the gradient goes straight through the rounding."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, coded: Coded, readers: tuple[ScaledLayer, ...]) -> CodedTensor:
        return CodedTensor(coded, y.dtype, readers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None
