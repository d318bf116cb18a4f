"""The verbs rms_norm_quantize and layer_norm_quantize: a norm of every row, straight to codes; and their backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..formats import Format
from ..kernels.norm_quantize import Norm, Normed
from ..scaling.block import Block
from ..scaling.qtensor import QTensor
from . import check, producer
from .library import register
from .producer import How
from .table import choose


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    fmt: Format | str,
    *,
    offset: float = 0.0,
    block: Block | str = "tensor",
    scale: Tensor | float | None = None,
    target: float | None = None,
    margin: int = 0,
    power_of_two: bool = False,
    overflow: str = "saturate",
    transpose: bool = False,
) -> QTensor:
    """Codes of x / sqrt(mean(x**2) + eps) * (weight + offset), row by row; the normalised tensor is never written.

    x         [..., K] fp32, bf16 or fp16, any strides
    weight    fp32, bf16 or fp16 [K], or None
    offset    added to weight: 1 where a model stores weight - 1
    block, scale, target, margin, power_of_two, overflow, transpose   as for `quantize`
    returns   QTensor of the shape of x; y is computed in fp32 and not rounded before, but by the composed CPU kernel
    raises    TypeError for other dtypes; ValueError if weight is not [K] or the block does not divide x
    source    Zhang, Sennrich 2019, arXiv 1910.07467
    """
    return _norm_quantize(
        "rms_norm_quantize",
        x,
        Norm(weight, None, float(eps), center=False, offset=float(offset)),
        fmt,
        (block, scale, target, margin, power_of_two, overflow, transpose),
    )


def layer_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
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
    """Codes of (x - mean) / sqrt(variance + eps) * weight + bias, row by row; the normalised tensor is never written.

    weight, bias   fp32, bf16 or fp16 [K], or None
    everything else as for `rms_norm_quantize`
    source    Ba, Kiros, Hinton 2016, arXiv 1607.06450
    """
    return _norm_quantize(
        "layer_norm_quantize",
        x,
        Norm(weight, bias, float(eps), center=True),
        fmt,
        (block, scale, target, margin, power_of_two, overflow, transpose),
    )


def _norm_quantize(verb: str, x: Tensor, norm: Norm, fmt: Format | str, rest: tuple[Any, ...]) -> QTensor:
    given, how = producer.prepare(verb, x, fmt, *rest)
    for name, vector in (("weight", norm.weight), ("bias", norm.bias)):
        if vector is not None and tuple(vector.shape) != tuple(x.shape[-1:]):
            raise ValueError(
                f"{verb}: {name} is {tuple(vector.shape)}, x of shape {tuple(x.shape)} needs {x.shape[-1:]}"
            )
    check.same_device(verb, x=x, weight=norm.weight, bias=norm.bias, scale=given)
    with torch.no_grad():
        codes, used, codes_t, *_ = torch.ops.fp8kernels.norm_quantize(x, given, *norm, *how)
    return producer.as_qtensor(codes, codes_t, used, how)


def run_norm(x: Tensor, scale: Tensor, norm: Norm, how: How, pending: Tensor | None, counters: Tensor | None) -> Normed:
    """Choose a kernel and run it on x seen as a matrix; a tensor without elements needs none."""
    matrix = x.reshape(check.matrix_shape(x))  # [M, K]
    if not x.numel():
        rstd = torch.zeros(matrix.shape[0], dtype=torch.float32, device=x.device)
        return Normed(producer.nothing(x, scale, how), rstd, rstd.clone() if norm.center else None)
    args = (matrix, scale, norm, how.rounding())
    noted = producer.observer(pending, counters)
    kernel = choose("norm_quantize", *args, transpose=how.transpose, observer=noted)
    out: Normed = kernel.run(*args, transpose=how.transpose, observer=noted)
    return out


def _observed(
    x: Tensor,
    scale: Tensor,
    pending: Tensor | None,
    counters: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    offset: float,
    *how: Any,
) -> tuple[Tensor, ...]:
    """Codes, scale, transposed codes, rstd [M], mean [M]; codes_t and mean are empty where there are none."""
    out = run_norm(x, scale, Norm(weight, bias, eps, center, offset), How(*how), pending, counters)
    return *producer.outputs(out.quantized, x.shape), out.rstd, producer.or_empty(out.mean, out.rstd)


def _quantize(x: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _observed(x, scale, None, None, *rest)


def _quantize_fake(
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    offset: float,
    *how: Any,
) -> tuple[Tensor, ...]:
    rows = check.matrix_shape(x)[0]
    rstd = x.new_empty(rows, dtype=torch.float32)
    return *producer.fake_outputs(x, scale, How(*how)), rstd, rstd.new_empty(rows if center else 0)


def _observed_fake(x: Tensor, scale: Tensor, pending: Tensor, counters: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _quantize_fake(x, scale, *rest)


def _backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the shape of x, dweight [K] and dbias [K], empty where there is no weight or bias."""
    norm = Norm(weight, bias, eps, center, offset)
    if not x.numel():
        dweight, dbias = (rstd.new_empty(0) if v is None else torch.zeros_like(v) for v in (weight, bias))
        return x.new_empty(x.shape), dweight, dbias
    shape = check.matrix_shape(x)
    args = (dy.reshape(shape), x.reshape(shape), rstd, mean, norm)
    dx, dweight, dbias = choose("norm_backward", *args).run(*args)
    return dx.reshape(x.shape), producer.or_empty(dweight, rstd), producer.or_empty(dbias, rstd)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (rstd.new_empty(0) if v is None else torch.empty_like(v) for v in (weight, bias))
    return x.new_empty(x.shape), dweight, dbias


_NORM = "Tensor? weight, Tensor? bias, float eps, bool center, float offset"
register(
    f"norm_quantize(Tensor x, Tensor scale, {_NORM}, {producer.HOW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
register(
    f"norm_quantize_observed(Tensor x, Tensor scale, Tensor(a!) pending, Tensor(b!) counters, {_NORM}, {producer.HOW})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _observed,
    _observed_fake,
)
register(
    f"norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor? mean, {_NORM}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
