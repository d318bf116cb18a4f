"""MLPs whose activation goes straight to the codes that the last linear layer multiplies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import activation as activation_verb  # noqa: F401  registers torch.ops.fp8kernels.act_quantize
from .coded import CodedTensor
from .producer import Ask, Producer, ask, pays
from .state import ScaledLayer


class FusedMLP(Producer):
    """fc2(activation(fc1(x))), as in vision transformers; dropout after the activation only where it does nothing."""

    fp8_activation: str  # "relu", "silu", "gelu" or "gelu_tanh"
    fc1: nn.Module
    fc2: nn.Module

    def fp8_fused(self, x: Tensor) -> Tensor:
        drop1, drop2 = self._modules.get("drop1"), self._modules.get("drop2")
        drops = isinstance(drop1, nn.Dropout) and drop1.training and drop1.p > 0
        if drops or not pays(x.device):
            return self.fp8_plain(x)
        out: Tensor = self.fc2(activated(self.fc1(x), None, self.fp8_activation, self.fp8_readers))
        return out if drop2 is None else drop2(out)


class FusedGatedMLP(Producer):
    """down_proj(activation(gate_proj(x)) * up_proj(x)), as in Llama and its relatives."""

    fp8_activation: str
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def fp8_fused(self, x: Tensor) -> Tensor:
        if not pays(x.device):
            return self.fp8_plain(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        out: Tensor = self.down_proj(activated(gate, up, self.fp8_activation, self.fp8_readers))
        return out


def activated(x: Tensor, other: Tensor | None, activation: str, readers: tuple[ScaledLayer, ...]) -> Tensor:
    """activation(x), or activation(x) * other, as codes for the readers."""
    out: Tensor = _Activation.apply(x, other, activation, ask(readers, x), readers)
    return out


class _Activation(torch.autograd.Function):
    """One kernel forward and one backward; x and other are kept, the activation is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        other: Tensor | None,
        activation: str,
        asked: Ask,
        readers: tuple[ScaledLayer, ...],
    ) -> CodedTensor:
        ops = torch.ops.fp8kernels
        if asked.pending is None:
            out = ops.act_quantize(x, asked.scale, other, activation, *asked.how)
        else:
            out = ops.act_quantize_observed(
                x, asked.scale, asked.pending, asked.counters, other, activation, *asked.how
            )
        ctx.save_for_backward(x, other)
        ctx.activation = activation
        dtype = x.dtype if other is None else torch.promote_types(x.dtype, other.dtype)
        return CodedTensor(asked.coded(*out), dtype, readers)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, other = ctx.saved_tensors
        dx, dother = torch.ops.fp8kernels.act_backward(dy, x, other, ctx.activation)
        return dx, None if other is None else dother, None, None, None
