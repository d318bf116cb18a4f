"""explain: which kernel runs, and why not the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import get_format
from ..kernels.quantize import Rounding
from ..scaling.block import get_block
from ..scaling.qtensor import QTensor
from . import gemm as gemm_verb
from .check import matrix_shape
from .table import Choice, choices, kernels


class Explanation(list[Choice]):
    """The kernels of a verb in order of preference; prints as one line each."""

    def __init__(self, verb: str, rows: list[Choice]) -> None:
        super().__init__(rows)
        self.verb = verb

    @property
    def kernel(self) -> str | None:
        """The name of the kernel that runs, or None."""
        return next((row.name for row in self if row.reason is None), None)

    def __str__(self) -> str:
        lines = [f"{self.verb}: {self.kernel or 'no kernel can run'}"]
        for row in self:
            said = row.reason or ("runs" if row.name == self.kernel else "could run, stands behind the one that does")
            lines.append(f"  {row.name:<10} {said}")
        return "\n".join(lines)

    __repr__ = __str__


def explain(verb: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which kernel runs `verb` on these arguments, and why the others do not.

    verb     "quantize", "dequantize", "gemm", "copy" or "commit", with the arguments of the function of that name
    returns  a list of (name, reason) that prints itself; reason is None where the kernel can run
    raises   ValueError for an unknown verb
    """
    kernels(verb)
    return Explanation(verb, choices(verb, *_kernel_args(verb, *args, **kwargs)))


def _kernel_args(verb: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    if verb == "gemm":
        return gemm_verb.kernel_args(*args, **kwargs)
    if verb == "quantize":
        return _quantize_args(*args, **kwargs)
    if verb == "dequantize":
        return _dequantize_args(*args, **kwargs)
    return args


def _quantize_args(x: Tensor, fmt: Any, *, block: Any = "tensor", scale: Any = None, **_: Any) -> tuple[Any, ...]:
    fmt, block = get_format(fmt), get_block(block)
    shape = matrix_shape(x)
    given = torch.zeros(block.grid(*shape), device=x.device) if scale is None else scale
    return x.reshape(shape), given, Rounding(fmt, block, fmt.target)


def _dequantize_args(q: QTensor, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return q.codes.reshape(matrix_shape(q.codes)), q.scale, q.fmt, dtype
