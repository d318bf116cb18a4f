"""Forwards of a model that stays as it was: plain, with some layers in 8 bits, and with each layer beside itself."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import convert, revert
from ..convert.convert import ORIGINAL
from ..nn.linear import to_patches
from ..nn.state import ScaledLayer
from ..recipe import Recipe
from ..scaling.delayed import INPUT
from ..telemetry.summary import quantization_sqnr, sqnr_db, weight_sqnr

ROWS = 1024  # rows of logits that are fp64 at a time

Loss = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Cost:
    """What a model computes, against the plain model.

    loss  the mean over batches; None where the outputs hold none and no function was given
    kl    KL(plain || this) of the outputs' softmax over the last dimension, in nats, the mean over rows
    """

    loss: float | None
    kl: float


@dataclass
class Local:
    """One layer in 8 bits on the plain model's tensors.

    macs    multiply-adds over all batches; 0 if the layer was never called
    output, input, weight  SQNR in dB, the lowest over batches and calls; None where nothing was measured
    """

    macs: int = 0
    output: float | None = None
    input: float | None = None
    weight: float | None = None


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards training flags and buffers are what they were."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if buffer is not None and value is not None:
                    buffer.copy_(value)


class Bench:
    """Measures one model on a list of batches, against its own plain outputs.

    raises   ValueError where a loss or an output of the plain model is no number, naming the batch
    """

    def __init__(self, model: nn.Module, batches: list[Any], loss: Loss | None) -> None:
        self.model, self.batches, self.loss = model, batches, loss
        self.logits: list[Tensor] = []
        losses: list[float | None] = []
        for index, batch in enumerate(batches):
            output = self.forward(batch)
            self.logits.append(logits_of(output))
            if bool((self.logits[-1].isnan() | self.logits[-1].isposinf()).any()):
                raise ValueError(f"plan: the plain model's output on batch {index} holds NaN or Inf")
            losses.append(self.loss_of(output, index, "the plain model"))
        self.plain = Cost(_mean(losses), 0.0)

    def forward(self, batch: Any) -> Any:
        """The output; random numbers are the same in every forward, and not used up."""
        devices = {p.device.index or 0 for p in self.model.parameters() if p.is_cuda}
        with torch.random.fork_rng(sorted(devices)):
            if isinstance(batch, Mapping):
                return self.model(**batch)
            return self.model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))

    def loss_of(self, output: Any, index: int, who: str) -> float | None:
        """The loss of one batch.

        raises   ValueError naming model and batch if it is no finite number
        """
        if self.loss is not None:
            value = self.loss(output, self.batches[index])
        else:
            value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            return None
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"plan: the loss of {who} on batch {index} is {number}")
        return number

    def cost(self, recipe: Recipe, keep: set[int] | None, who: str) -> Cost:
        """The model converted with a recipe, of all layers or of those with these ids.

        raises   ValueError naming who and the batch where a loss or a KL is no number
        """
        convert(self.model, recipe, filter=_filter(keep), fuse=False, verbose=False)
        try:
            losses: list[float | None] = []
            total, rows = 0.0, 0
            for index, batch in enumerate(self.batches):
                output = self.forward(batch)
                losses.append(self.loss_of(output, index, who))
                divergence, count = kl(self.logits[index], logits_of(output), batch)
                if math.isnan(divergence):
                    raise ValueError(f"plan: the output of {who} on batch {index} holds NaN")
                total, rows = total + divergence, rows + count
        finally:
            revert(self.model)
        return Cost(_mean(losses), total / max(rows, 1))

    def local(self, recipe: Recipe, found: list[nn.Module]) -> dict[int, Local]:
        """Every layer beside itself, all in one forward per batch: what a layer hands on is the plain result."""
        out = {id(module): Local() for module in found}

        def beside(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            assert isinstance(module, ScaledLayer)
            plain = module.__dict__[ORIGINAL].forward(module, *args, **kwargs)
            here, exact = _first(output), _first(plain)
            local = out[id(module)]
            local.macs += exact.numel() // _width(module) * _weights(module)
            local.output = _lower(local.output, sqnr_db(exact, here))
            x = args[0] if args else next(iter(kwargs.values()))
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                x = to_patches(x if x.ndim > len(module.kernel_size) + 1 else x[None], module.kernel_size, x.shape[-3])
            local.input = _lower(local.input, quantization_sqnr(module, x, INPUT))
            return plain

        convert(self.model, recipe, fuse=False, verbose=False)
        handles = [module.register_forward_hook(beside, with_kwargs=True) for module in found]
        try:
            for batch in self.batches:
                self.forward(batch)
            for module in found:
                assert isinstance(module, ScaledLayer)
                out[id(module)].weight = weight_sqnr(module)
        finally:
            for handle in handles:
                handle.remove()
            revert(self.model)
        return out


def logits_of(output: Any) -> Tensor:
    """The tensor of an output that is compared: the output, its .logits, or the first tensor with dimensions in it.

    raises   TypeError if there is none
    """
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point() and part.ndim:
            return part
    raise TypeError(
        f"plan compares outputs: the model is to return a tensor, a tuple, a mapping or an object with .logits; it "
        f"returned {type(output).__name__}"
    )


def kl(plain: Tensor, other: Tensor, batch: Any = None) -> tuple[float, int]:
    """The sum over rows of KL(plain || other) in nats, and the rows; those that an attention mask hides do not count.

    plain, other  [..., classes]
    """
    p, q = plain.flatten(0, -2), other.flatten(0, -2)  # [rows, classes]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == plain.shape[:-1]:
        seen = mask.flatten().bool().to(p.device)
        p, q = p[seen], q[seen]
    total = 0.0
    for a, b in zip(p.split(ROWS), q.split(ROWS), strict=True):
        log_p, log_q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        difference = torch.where(log_p == -math.inf, 0.0, log_p - log_q)  # 0 log 0 = 0
        total += float((log_p.exp() * difference).sum())
    return total, len(p)


def _filter(keep: set[int] | None) -> Callable[[nn.Module, str], bool] | None:
    return None if keep is None else lambda module, name: id(module) in keep


def _mean(losses: list[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return math.fsum(known) / len(known) if len(known) == len(losses) else None


def _lower(known: float | None, new: float) -> float:
    return new if known is None else min(known, new)


def _first(output: Any) -> Tensor:
    """Attention returns (output, weights)."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def _weights(module: nn.Module) -> int:
    """Elements of the matrices that a row is multiplied with."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def _width(module: nn.Module) -> int:
    """Elements of one row of the layer's output."""
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]
