"""The verbs swiglu_quantize and activation_quantize: an activation, straight to codes; and their backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import Format
from ..kernels.gemm import ACTIVATIONS
from ..kernels.quantize import Quantized
from ..scaling.block import Block
from ..scaling.qtensor import QTensor
from . import check, producer
from .library import register
from .producer import How
from .table import choose


def swiglu_quantize(
    gate: Tensor,
    up: Tensor,
    fmt: Format | str,
    *,
    block: Block | str = "tensor",
    scale: Tensor | float | None = None,
    target: float | None = None,
    margin: int = 0,
    power_of_two: bool = False,
    overflow: str = "saturate",
    transpose: bool = False,
) -> QTensor:
    """Codes of silu(gate) * up; the product is never written.

    gate, up  [..., K] fp32, bf16 or fp16, any strides, the same shape
    block, scale, target, margin, power_of_two, overflow, transpose   as for `quantize`
    returns   QTensor of the shape of gate; y is computed in fp32 and not rounded before, but by the composed CPU kernel
    raises    TypeError for other dtypes; ValueError if the shapes differ or the block does not divide them
    source    Shazeer 2020, arXiv 2002.05202
    """
    check.float_tensor(up, "swiglu_quantize", "up")
    if up.shape != gate.shape:
        raise ValueError(
            f"swiglu_quantize: gate is {tuple(gate.shape)} and up {tuple(up.shape)}; they must be the same"
        )
    check.same_device("swiglu_quantize", gate=gate, up=up)
    rest = (block, scale, target, margin, power_of_two, overflow, transpose)
    return _act_quantize("swiglu_quantize", gate, up, "silu", fmt, rest)


def activation_quantize(
    x: Tensor,
    activation: str,
    fmt: Format | str,
    *,
    block: Block | str = "tensor",
    scale: Tensor | float | None = None,
    target: float | None = None,
    margin: int = 0,
    power_of_two: bool = False,
    overflow: str = "saturate",
    transpose: bool = False,
) -> QTensor:
    """Codes of activation(x), which is never written; arguments as for `swiglu_quantize`.

    activation   "relu", "silu", "gelu" (exact) or "gelu_tanh"
    raises       ValueError for another one
    """
    check.one_of("activation_quantize", "activation", activation, ACTIVATIONS[1:])
    rest = (block, scale, target, margin, power_of_two, overflow, transpose)
    return _act_quantize("activation_quantize", x, None, activation, fmt, rest)


def _act_quantize(
    verb: str, x: Tensor, other: Tensor | None, activation: str, fmt: Format | str, rest: tuple[Any, ...]
) -> QTensor:
    given, how = producer.prepare(verb, x, fmt, *rest)
    with torch.no_grad():
        codes, used, codes_t = torch.ops.fp8kernels.act_quantize(x, given, other, activation, *how)
    return producer.as_qtensor(codes, codes_t, used, how)


def run_act(
    x: Tensor,
    other: Tensor | None,
    activation: str,
    scale: Tensor,
    how: How,
    pending: Tensor | None,
    counters: Tensor | None,
) -> Quantized:
    """Choose a kernel and run it on x seen as a matrix; a tensor without elements needs none."""
    if not x.numel():
        return producer.nothing(x, scale, how)
    shape = check.matrix_shape(x)
    args = (x.reshape(shape), None if other is None else other.reshape(shape), activation, scale, how.rounding())
    noted = producer.observer(pending, counters)
    out: Quantized = choose("act_quantize", *args, transpose=how.transpose, observer=noted).run(
        *args, transpose=how.transpose, observer=noted
    )
    return out


def _observed(
    x: Tensor,
    scale: Tensor,
    pending: Tensor | None,
    counters: Tensor | None,
    other: Tensor | None,
    activation: str,
    *how: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale, transposed codes (empty where they were not asked for)."""
    out = run_act(x, other, activation, scale, How(*how), pending, counters)
    return producer.outputs(out, x.shape)


def _quantize(x: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _observed(x, scale, None, None, *rest)


def _quantize_fake(
    x: Tensor, scale: Tensor, other: Tensor | None, activation: str, *how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return producer.fake_outputs(x, scale, How(*how))


def _observed_fake(
    x: Tensor, scale: Tensor, pending: Tensor, counters: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _quantize_fake(x, scale, *rest)


def _backward(dy: Tensor, x: Tensor, other: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """dx and dother in the shape of x; dother is empty where there is no other."""
    if not x.numel():
        return _backward_fake(dy, x, other, activation)
    shape = check.matrix_shape(x)
    args = (dy.reshape(shape), x.reshape(shape), None if other is None else other.reshape(shape), activation)
    dx, dother = choose("act_backward", *args).run(*args)
    return dx.reshape(x.shape), dx.new_empty(0) if dother is None else dother.reshape(x.shape)


def _backward_fake(dy: Tensor, x: Tensor, other: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if other is None else other.new_empty(x.shape)


register(
    f"act_quantize(Tensor x, Tensor scale, Tensor? other, str activation, {producer.HOW}) -> (Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
register(
    "act_quantize_observed(Tensor x, Tensor scale, Tensor(a!) pending, Tensor(b!) counters, Tensor? other, "
    f"str activation, {producer.HOW}) -> (Tensor, Tensor, Tensor)",
    _observed,
    _observed_fake,
)
register(
    "act_backward(Tensor dy, Tensor x, Tensor? other, str activation) -> (Tensor, Tensor)", _backward, _backward_fake
)
