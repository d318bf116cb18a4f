"""RMSNorm and LayerNorm that hand codes to the 8-bit linear layers behind them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.norm_quantize import Norm
from ..ops import norm as norm_verb  # noqa: F401  registers torch.ops.fp8kernels.norm_quantize
from .coded import CodedTensor
from .producer import Ask, Producer, ask, pays
from .recompute import recomputed
from .state import ScaledLayer


class FusedNorm(Producer):
    """A norm whose result only 8-bit linear layers read; parameters and what it computes are those of its class.

    x        [..., K] fp32, bf16 or fp16
    returns  a CodedTensor of the shape of x, or, where codes cannot be given, the plain result
    """

    weight: Tensor | None
    bias: Tensor | None
    variance_epsilon: float  # of transformers' RMSNorm

    def fp8_fused(self, x: Tensor) -> Tensor:
        if not pays(x.device):
            if isinstance(self, nn.LayerNorm):  # torch's keeps no more than x and two numbers a row by itself
                return self.fp8_code(self.fp8_plain(x))
            return self.fp8_code(recomputed(self.fp8_plain, x, parameters=tuple(self._parameters.values())))
        norm, dtype = self.fp8_norm(x)
        out: Tensor = _Norm.apply(
            x, norm.weight, norm.bias, norm[2:], dtype, ask(self.fp8_readers, x), self.fp8_readers
        )
        return out

    def fp8_norm(self, x: Tensor) -> tuple[Norm, torch.dtype]:
        """Which norm this is, and the dtype of its result for x."""
        if isinstance(self, nn.LayerNorm):
            return Norm(self.weight, self.bias, self.eps, center=True), x.dtype
        if isinstance(self, nn.RMSNorm):
            eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps  # torch's default for 16 bits too
            return Norm(self.weight, None, eps, center=False), x.dtype
        assert self.weight is not None  # transformers' RMSNorm: the rows in x's dtype times a weight of its own
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        return Norm(self.weight, None, self.variance_epsilon, center=False), dtype


class _Norm(torch.autograd.Function):
    """One kernel forward and one backward; x, rstd and mean are kept, the normalised tensor never exists."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rest: tuple[Any, ...],
        dtype: torch.dtype,
        asked: Ask,
        readers: tuple[ScaledLayer, ...],
    ) -> CodedTensor:
        ops = torch.ops.fp8kernels
        if asked.pending is None:
            *out, rstd, mean = ops.norm_quantize(x, asked.scale, weight, bias, *rest, *asked.how)
        else:
            observed = (asked.scale, asked.pending, asked.counters)
            *out, rstd, mean = ops.norm_quantize_observed(x, *observed, weight, bias, *rest, *asked.how)
        ctx.save_for_backward(x, weight, bias, rstd, mean)
        ctx.rest = rest
        return CodedTensor(asked.coded(*out), dtype, readers)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, rstd, mean = ctx.saved_tensors
        norm = (weight, bias, *ctx.rest)
        dx, dweight, dbias = torch.ops.fp8kernels.norm_backward(dy, x, rstd, mean if mean.numel() else None, *norm)
        return dx, None if weight is None else dweight, None if bias is None else dbias, None, None, None, None
