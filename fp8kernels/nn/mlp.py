"""MLPs whose activation goes straight to the codes that the last linear layer multiplies."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import activation as activation_verb  # noqa: F401  registers torch.ops.fp8kernels.act_quantize
from .coded import CodedTensor
from .producer import Ask, Producer, ask, pays
from .state import ScaledLayer


class Chain(NamedTuple):
    """Names of submodules in the order of their calls: before the activation, between it and the reader, from there on.

    activation  "relu", "silu", "gelu" or "gelu_tanh"
    between     dropouts and identities; with an active dropout there are no codes
    """

    activation: str
    before: tuple[str, ...]
    between: tuple[str, ...]
    after: tuple[str, ...]


class Gated(NamedTuple):
    """Names of submodules in down(activation(gate(x)) * up(x))."""

    activation: str
    gate: str
    up: str
    down: str


class FusedMLP(Producer):
    """fc2(activation(fc1(x))), as in vision transformers."""

    fp8_parts: Chain

    def fp8_fused(self, x: Tensor) -> Tensor:
        parts, modules = self.fp8_parts, self._modules
        if not pays(x.device) or any(_drops(modules[name]) for name in parts.between):
            return self.fp8_plain(x)
        for name in parts.before:
            x = modules[name](x)  # type: ignore[misc]
        x = activated(x, None, parts.activation, self.fp8_readers)
        for name in parts.after:
            x = modules[name](x)  # type: ignore[misc]
        return x


class FusedGatedMLP(Producer):
    """down(activation(gate(x)) * up(x)), as in Llama and its relatives."""

    fp8_parts: Gated

    def fp8_fused(self, x: Tensor) -> Tensor:
        if not pays(x.device):
            return self.fp8_plain(x)
        activation, *names = self.fp8_parts
        gate, up, down = (self._modules[name] for name in names)
        assert gate is not None and up is not None and down is not None
        out: Tensor = down(activated(gate(x), up(x), activation, self.fp8_readers))
        return out


def _drops(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Dropout) and module.training and module.p > 0


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
