"""explain: which kernel runs, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..formats import get_format
from ..kernels.decode_attention import HeadCodes
from ..kernels.norm_quantize import Norm
from ..kernels.quantize import Rounding
from ..scaling.block import get_block
from ..scaling.qtensor import QTensor
from . import gemm as gemm_verb
from .check import matrix_shape
from .epilogue import fused
from .quantize import carrier_shift
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

    verb     the name of a public function, with its arguments: "quantize", "dequantize", "gemm", "rms_norm_quantize",
             "layer_norm_quantize", "swiglu_quantize", "activation_quantize", "decode_attention", "copy"; or another
             verb of the table, with the arguments of its kernels
    returns  a list of (name, reason) that prints itself; reason is None where the kernel can run. A line "composed"
             stands at the end where gemm makes its epilogue from other verbs
    raises   ValueError for an unknown verb
    """
    verb, given = PRODUCERS[verb](*args, **kwargs) if verb in PRODUCERS else (verb, None)
    kernels(verb)
    given = given or _kernel_args(verb, *args, **kwargs)
    rows = choices(verb, *given)
    if verb == "gemm" and len(given) == 5 and fused(*given) is None:
        instead = "it would be slow: the verb composes the same from plain gemm, torch and quantize"
        rows = [Choice(row.name, row.reason or instead) for row in rows] + [Choice("composed", None)]
    return Explanation(verb, rows)


def _kernel_args(verb: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    if verb == "gemm":
        return gemm_verb.kernel_args(*args, **kwargs)
    if verb == "quantize":
        return _quantize_args(*args, **kwargs)
    if verb == "dequantize":
        return _dequantize_args(*args, **kwargs)
    if verb == "decode_attention" and isinstance(args[1], Tensor):  # else those of its kernels
        return _attention_args(*args, **kwargs)
    return args


def _quantize_args(
    x: Tensor, fmt: Any, *, block: Any = "tensor", scale: Any = None, carrier: bool = False, **_: Any
) -> tuple[Any, ...]:
    fmt, block = get_format(fmt), get_block(block)
    shape = matrix_shape(x)
    given = torch.zeros(block.grid(*shape), dtype=torch.float32, device=x.device) if scale is None else scale
    k = carrier_shift(fmt, fmt.target) if carrier else None
    return x.reshape(shape), given, Rounding(fmt, block, fmt.target, carrier=k)


def _dequantize_args(q: QTensor, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return q.codes.reshape(matrix_shape(q.codes)), q.scale, q.fmt, dtype


def _attention_args(
    q: Tensor, keys: Tensor, key_scale: Tensor, values: Tensor, value_scale: Tensor, fmt: Any, **more: Any
) -> tuple[Any, ...]:
    scaling = q.shape[3] ** -0.5 if more.get("scaling") is None else more["scaling"]
    heads = HeadCodes(keys, key_scale), HeadCodes(values, value_scale)
    return q, *heads, get_format(fmt), scaling, more.get("mask")


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, fmt: Any, *, offset: float = 0.0, **rest: Any) -> Any:
    return "norm_quantize", _norm_args(x, Norm(weight, None, eps, center=False, offset=offset), fmt, **rest)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, fmt: Any, **rest: Any) -> Any:
    return "norm_quantize", _norm_args(x, Norm(weight, bias, eps, center=True), fmt, **rest)


def _norm_args(x: Tensor, norm: Norm, fmt: Any, **rest: Any) -> tuple[Any, ...]:
    matrix, given, how = _quantize_args(x, fmt, **rest)
    return matrix, given, norm, how


def _swiglu(gate: Tensor, up: Tensor, fmt: Any, **rest: Any) -> Any:
    matrix, given, how = _quantize_args(gate, fmt, **rest)
    return "act_quantize", (matrix, up.reshape(matrix.shape), "silu", given, how)


def _activation(x: Tensor, activation: str, fmt: Any, **rest: Any) -> Any:
    matrix, given, how = _quantize_args(x, fmt, **rest)
    return "act_quantize", (matrix, None, activation, given, how)


# public functions that share a verb of the table: name -> (arguments -> verb, arguments of its kernels)
PRODUCERS: dict[str, Callable[..., tuple[str, tuple[Any, ...]]]] = {
    "rms_norm_quantize": _rms_norm,
    "layer_norm_quantize": _layer_norm,
    "swiglu_quantize": _swiglu,
    "activation_quantize": _activation,
}
