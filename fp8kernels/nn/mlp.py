"""MLPs whose activation goes straight to the codes that the last linear layer multiplies."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..kernels.act_quantize.reference import activate
from ..ops import activation as activation_verb  # noqa: F401  registers torch.ops.fp8kernels.act_quantize
from ..scaling.delayed import INPUT
from .coded import CodedTensor
from .observe import observe, observing
from .producer import Ask, Producer, ask, pays
from .recompute import recomputed
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
    """Names of submodules in down(act(gate(x)) * up(x)); `activation` is what `act` computes."""

    activation: str
    gate: str
    up: str
    down: str
    act: str


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
        activation, *names = self.fp8_parts
        gate, up, down, act = (self._modules[name] for name in names)
        assert gate is not None and up is not None and down is not None and act is not None
        inputs = gate(x), up(x)
        if pays(x.device):
            product = activated(*inputs, activation, self.fp8_readers)
        elif activation == "silu" and inputs[0].dtype == inputs[1].dtype:
            product = _SiluProduct.apply(*inputs)
        else:
            product = recomputed(lambda gate, up: act(gate) * up, *inputs)
        out: Tensor = down(product)
        return out


def _drops(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Dropout) and module.training and module.p > 0


def activated(x: Tensor, other: Tensor | None, activation: str, readers: tuple[ScaledLayer, ...]) -> Tensor:
    """activation(x), or activation(x) * other, as codes for the readers."""
    if any(map(observing, readers)):  # the kernel rounds what it computes: here it is computed once more
        with torch.no_grad():
            y = activate(x.float(), activation)
            observe(readers, INPUT, y if other is None else y * other.float())
    out: Tensor = _Activation.apply(x, other, activation, ask(readers, x), readers)
    return out


class _SiluProduct(torch.autograd.Function):
    """silu(gate) * up by torch's own operations, so to the bit; only gate and up are kept.

    What is made in the backward takes the place of what is no longer needed: beside gate and up there are never more
    than two tensors of their size.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(dy)
        d_silu = dy.mul_(up)  # in place: the product goes to one layer and nowhere else, so nobody else has dy
        return torch.ops.aten.silu_backward(d_silu, gate, grad_input=d_silu), d_up


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
