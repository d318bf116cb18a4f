"""RMSNorm and LayerNorm that hand codes to the 8-bit linear layers behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.norm_quantize import Norm
from ..ops import norm as norm_verb  # noqa: F401  registers torch.ops.fp8kernels.norm_quantize
from ..scaling.delayed import INPUT
from .coded import CodedTensor
from .observe import observe, observing
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
            return self.fp8_code(self.fp8_lean(x))
        if any(map(observing, self.fp8_readers)):  # the kernel rounds what it computes: here it is computed once more
            with torch.no_grad():
                observe(self.fp8_readers, INPUT, self.fp8_plain(x))
        norm, dtype = self.fp8_norm(x)
        out: Tensor = _Norm.apply(
            x, norm.weight, norm.bias, norm[2:], dtype, ask(self.fp8_readers, x), self.fp8_readers
        )
        return out

    def fp8_lean(self, x: Tensor) -> Tensor:
        """What the module did before, to the bit, keeping no more than x for the backward."""
        wide = x.dtype == torch.float32  # then x itself collects what each operation adds to its gradient
        if isinstance(self, nn.LayerNorm) or (isinstance(self, nn.RMSNorm) and wide):
            return self.fp8_plain(x)
        if isinstance(self, nn.RMSNorm):
            return recomputed(self.fp8_plain, x, parameters=(self.weight,))
        out: Tensor = _WrittenOut.apply(x, x if wide else None, self.weight, self.variance_epsilon, self.fp8_plain)
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


class _WrittenOut(torch.autograd.Function):
    """transformers' RMSNorm, which is written in operations of torch that keep six tensors of fp32 or x's dtype.

    The backward does what autograd would do, with the same roundings in the same order, but in place: beside x and dy
    there are never more than three tensors of fp32. An x in fp32 comes twice, so that autograd adds the gradients of
    its two uses, as row and in the variance, one after the other to what it has from elsewhere.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, again: Tensor | None, weight: Tensor, eps: float, run: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.apart = eps, again is not None
        return run(x)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = x.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ctx.eps)  # [..., 1]
        dx = dx_variance = dweight = None
        if ctx.needs_input_grad[2]:
            dweight = (dy * (wide * rstd).to(x.dtype)).sum_to_size(weight.shape)
        if ctx.needs_input_grad[0]:
            dx = (dy * weight).to(x.dtype).float()
            d_variance = -0.5 * (dx * wide).sum(-1, keepdim=True) * rstd.pow(3)  # [..., 1]
            dx.mul_(rstd)
            dx_variance = (2.0 * wide).mul_(d_variance / x.shape[-1])
            if not ctx.apart:
                dx, dx_variance = dx.add_(dx_variance).to(x.dtype), None
        return dx, dx_variance, dweight, None, None
