"""calibrate: static scales for the inputs of a converted model that did not train, or not enough."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ..headers import some
from ..kernels.commit import ScaleRule, State
from ..nn.dtensor import local
from ..nn.prepared import prepared
from ..nn.roots import group_of, layers
from ..nn.state import ScaledLayer
from ..ops.commit import commit_states
from ..scaling.delayed import INPUT

LENGTH = 2048  # tokens of one piece of text, unless the model's context is shorter
WAY_OUT = (
    "give batches that reach them (an expert sees tokens only where its router sends some), or convert with an "
    "override that leaves them in high precision"
)


@dataclass(frozen=True)
class Calibration:
    """What calibrate saw and set.

    amax     per layer, the largest magnitude of its inputs
    scales   per layer, the static scale of its inputs from now on
    missed   layers that no batch reached; their scales are what they were
    tokens   rows of the batches (elements of token ids)
    """

    batches: int
    tokens: int
    amax: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    missed: tuple[str, ...] = ()

    def table(self) -> Table:
        """The summary for the screen."""
        table = Table(title="calibration", show_header=False)
        table.add_row("batches, tokens", f"{self.batches:,}, {self.tokens:,}")
        table.add_row("layers with a static input scale", f"{len(self.scales):,}")
        low, high = min(self.amax, key=self.amax.__getitem__), max(self.amax, key=self.amax.__getitem__)
        table.add_row("smallest amax of inputs", f"{self.amax[low]:.4g} ({low})")
        table.add_row("largest amax of inputs", f"{self.amax[high]:.4g} ({high})")
        if self.missed:
            table.add_row("never reached", f"{len(self.missed)}: {some(self.missed)}; {WAY_OUT}")
        return table


def calibrate(
    model: nn.Module, batches: Iterable[Any], *, tokenizer: Any = None, length: int | None = None
) -> Calibration:
    """Give every 8-bit layer the static input scale that its inputs in these batches ask for.

    batches    what the model is called with: token ids [B, T], tuples of arguments, mappings of keyword arguments; or,
               with a tokenizer, texts. All that is seen goes into one maximum, which enters the history
    tokenizer  makes token ids of texts, as a transformers tokenizer does
    length     tokens at most in one piece of a text; None: 2048, or the model's context
    returns    the summary; .table() prints

    Inputs are taken as eval mode makes them. Nothing but the input's history and scale changes: not weights, the
    scales of weights, training flags, gradients or random numbers. With torch.distributed running, every rank calls it
    and the largest amax of all counts. A history that is there stays: the scale is what the recipe makes of both.

    raises     ValueError if nothing is converted, batches are empty, or an input holds NaN or Inf (naming layer and
               batch; nothing has changed then); TypeError for texts without a tokenizer
    """
    found = {layer: name for name, layer in model.named_modules() if isinstance(layer, ScaledLayer)}
    if not found:
        raise ValueError("calibrate: the model has no 8-bit layers; call fp8kernels.convert(model, recipe) first")
    seen: dict[ScaledLayer, Tensor] = {}
    count = tokens = 0

    def watch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(layer, ScaledLayer)
        given = [
            value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point()
        ]
        if given and given[0].numel():
            amax = local(given[0]).detach().abs().amax().float()  # []; NaN where the input holds one
            seen[layer] = torch.maximum(seen[layer], amax) if layer in seen else amax

    handles = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in found]
    try:
        with _at_rest(model):
            for batch in _pieces(model, batches, tokenizer, length):
                count, tokens = count + 1, tokens + _rows(batch)
                _call(model, batch)
                for layer, amax in seen.items():
                    if not bool(amax.isfinite()):
                        raise ValueError(
                            f"calibrate: an input of layer {found[layer]!r} in batch {count - 1} holds NaN or Inf; "
                            "nothing was changed. Look at the weights, or at what that batch gives the plain model"
                        )
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise ValueError(
            "calibrate: there are no batches; give a few hundred tokens of the text that the model will see"
        )
    reached = {layer: amax for layer, amax in seen.items() if float(amax) > 0}
    if not reached:
        raise ValueError(
            f"calibrate: none of the {len(found)} 8-bit layers saw an input that is not 0 in {count} batches; {WAY_OUT}"
        )
    _commit(model, reached)
    return Calibration(
        batches=count,
        tokens=tokens,
        amax={found[layer]: float(amax) for layer, amax in reached.items()},
        scales={found[layer]: float(layer.fp8_scale[INPUT]) for layer in reached},
        missed=tuple(name for layer, name in found.items() if layer not in reached),
    )


@torch.no_grad()
def _commit(model: nn.Module, seen: dict[ScaledLayer, Tensor]) -> None:
    """Inputs alone enter their histories and get scales; steps, counters and what is pending are as they were."""
    every = layers(model)
    ready = prepared(every)
    waiting = [layer.fp8_pending.clone() for layer in every]
    for layer in every:
        layer.fp8_pending.zero_()
        if layer in seen:
            layer.fp8_pending[INPUT] = seen[layer]
    ready.reduce(model, group_of(model))
    for layer, pending in zip(every, waiting, strict=True):
        amax = layer.fp8_pending[INPUT : INPUT + 1].clone()  # [1]
        layer.fp8_pending.copy_(pending)
        layer.fp8_calibrated = layer.fp8_calibrated or float(amax) > 0
        recipe = layer.fp8_recipe
        target = torch.full_like(amax, recipe.target(INPUT))  # a static scale, too, which no step would move
        state = State(layer.fp8_history[INPUT : INPUT + 1], amax, layer.fp8_scale[INPUT : INPUT + 1], target)
        commit_states([state], ScaleRule(recipe.algorithm, 0, recipe.power_of_two, recipe.decay))


@contextlib.contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients and with its own random numbers; flags are what they were afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def _pieces(model: nn.Module, batches: Iterable[Any], tokenizer: Any, length: int | None) -> Iterator[Any]:
    """The batches; of a text, token ids [1, T] in pieces of at most `length` tokens."""
    if isinstance(batches, str | Tensor | Mapping):
        raise TypeError(f"calibrate: batches is one {type(batches).__name__}; give a list of them")
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    most = length or min(LENGTH, context if isinstance(context, int) and context > 0 else LENGTH)
    for index, batch in enumerate(batches):
        if not isinstance(batch, str):
            if _rows(batch):
                yield batch
            continue
        if tokenizer is None:
            raise TypeError("calibrate: batches holds texts; give tokenizer=, which makes token ids of them")
        ids = torch.as_tensor(tokenizer(batch)["input_ids"], dtype=torch.long).reshape(1, -1)  # [1, T]
        if not ids.numel() and batch.strip():
            raise ValueError(f"calibrate: the tokenizer makes no tokens of text {index}, {batch[:40]!r}")
        yield from (piece for piece in ids.split(most, dim=1) if piece.numel())


def _rows(batch: Any) -> int:
    """Tokens (or elements) of the first tensor in a batch."""
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    first = next((part for part in parts if isinstance(part, Tensor)), None)
    return 0 if first is None else first.numel() if not first.is_floating_point() else first[..., 0].numel()


def _call(model: nn.Module, batch: Any) -> None:
    device = next(model.parameters()).device

    def moved(part: Any) -> Any:
        return part.to(device) if isinstance(part, Tensor) else part

    if isinstance(batch, Mapping):
        model(**{key: moved(part) for key, part in batch.items()})
    else:
        model(*(moved(part) for part in (batch if isinstance(batch, tuple | list) else (batch,))))
