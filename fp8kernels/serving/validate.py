"""validate: an exported folder against the model that it was made of, weight by weight and logit by logit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ..export.config import QUANT_METHOD, entries
from ..export.requantize import sqnr_db
from ..export.stored import Stored, StoredLayer, read_stored, with_entries
from ..export.values import Reader
from ..formats import get_format
from ..scaling.block import get_block
from .load import load

WORSE = 1.01  # times the noise of rounding once: what rounding of the scales' quotient in fp32 may add
SLACK = 6.0  # dB; noise of early layers grows on its way through later ones
BLOCKS = {"channel": "row", "group 128": "1x128"}  # blocks by the words of config.json, and by ours
EXPORT_AGAIN = "the folder was made of other weights, or was changed; export the model again"


@dataclass(frozen=True)
class Validation:
    """What a folder computes beside the model that it was made of.

    layers         SQNR in dB of each layer's weight
    max_error      the largest difference of two logits
    logits         SQNR of the logits in dB; limit  what it must have, at least
    kl             KL(model || folder) in nats, the mean over tokens
    agreement      the part of tokens for which both find the same likeliest next one
    """

    tokens: int
    max_error: float
    logits: float
    limit: float
    kl: float
    agreement: float
    layers: dict[str, float] = field(default_factory=dict)

    def table(self) -> Table:
        """The numbers for the screen."""
        table = Table(title="validation", show_header=False)
        worst = min(self.layers, key=self.layers.__getitem__)
        table.add_row("weights, worst layer", f"{self.layers[worst]:.1f} dB ({worst})")
        table.add_row(
            "logits", f"{self.logits:.1f} dB (at least {self.limit:.1f} are due), off by {self.max_error:.4g} at most"
        )
        table.add_row("KL", f"{self.kl:.3g} nats a token")
        table.add_row("same next token", f"{self.agreement:.1%} of {self.tokens:,}")
        return table


@torch.no_grad()
def validate(
    folder: str | Path, model: nn.Module, ids: Tensor, *, loader: Callable[[str | Path], Any] = load
) -> Validation:
    """Read a folder that export wrote into 8-bit modules, and hold it against its model.

    model    what was exported, in any mode; it is not changed
    ids      token ids [B, T] to compute logits of
    loader   makes a model of the folder
    returns  the numbers; .table() prints

    A weight in the file must be as near to the model's as its format and scale allow. Logits must be as near as
    roundings of the weights' and inputs' size can leave them when they add up at random: with L layers
    SQNR >= that of the worst weight - 10 log10(2 L) - 6 dB, which is an estimate and not a bound.

    raises   ValueError, with the numbers, where either does not hold, or logits are NaN or Inf; what the loader raises
    """
    stored = read_stored(folder)
    if stored.method == QUANT_METHOD:
        with_entries(stored, entries(stored.settings))
    eight_bit = [layer for layer in stored.layers if layer.eight_bit and layer.scheme is not None and layer.scale]
    if not eight_bit:
        raise ValueError(f"{folder} holds no 8-bit layers to validate")
    with Reader(stored) as read:
        layers = {layer.name: _weight(stored, layer, model, read) for layer in eight_bit}
    theirs = _logits(loader(folder), ids)
    ours = _logits(model, ids)
    if ours.shape != theirs.shape:
        raise ValueError(f"{folder}: its logits have shape {list(theirs.shape)}, those of the model {list(ours.shape)}")
    for what, logits in (("the model", ours), (str(folder), theirs)):
        if not bool(logits.isfinite().all()):
            raise ValueError(f"validate: the logits of {what} hold NaN or Inf")
    log_p, log_q = ours.log_softmax(-1), theirs.log_softmax(-1)  # [tokens, vocabulary] fp64
    found = Validation(
        tokens=ours.shape[0],
        max_error=float((ours - theirs).abs().max()),
        logits=sqnr_db(ours, theirs),
        limit=min(layers.values()) - 10 * math.log10(2 * len(layers)) - SLACK,
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        agreement=float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        layers=layers,
    )
    if found.logits < found.limit:
        raise ValueError(
            f"{folder}: its logits are {found.logits:.1f} dB from the model's, at least {found.limit:.1f} dB are due "
            f"(KL {found.kl:.3g} nats, {found.agreement:.1%} of {found.tokens} next tokens the same); {EXPORT_AGAIN}"
        )
    return found


def _weight(stored: Stored, layer: StoredLayer, model: nn.Module, read: Reader) -> float:
    """SQNR of a layer's weight in the file.

    raises   ValueError if the model has no such weight, or the codes are not the nearest to it
    """
    assert layer.scheme is not None
    assert layer.scale is not None
    weight = getattr(dict(model.named_modules()).get(layer.name), "weight", None)
    if not isinstance(weight, Tensor) or tuple(weight.shape) != layer.shape:
        has = "none" if weight is None else list(weight.shape)
        raise ValueError(f"{stored.folder}: layer {layer.name!r} has a weight {list(layer.shape)}, the model has {has}")
    exact = weight.detach().cpu().float()  # [N, K]
    fmt, block = layer.scheme.fmt, BLOCKS.get(layer.scheme.weights, layer.scheme.weights)
    scale = _grown(read(layer.scale).float(), block, layer.shape)  # [N, K]
    table = get_format(fmt)
    there = table.decode(read(layer.weight).view(torch.uint8)) * scale  # [N, K]
    nearest = table.decode(table.encode(exact / scale)) * scale  # [N, K]
    noise, least = (float((exact - each).double().square().sum()) for each in (there, nearest))
    if not noise <= WORSE * least:
        raise ValueError(
            f"{stored.folder}: {layer.weight} is {sqnr_db(exact, there):.1f} dB from the model's weight; {fmt} with "
            f"its scales allows {sqnr_db(exact, nearest):.1f} dB: {EXPORT_AGAIN}"
        )
    return sqnr_db(exact, there)


def _grown(scale: Tensor, block: str, shape: tuple[int, ...]) -> Tensor:
    """The scale of each element of a weight [N, K]; blocks at its edges may be cut."""
    rows, columns = shape
    height, width = get_block(block).patch(rows, columns)
    grid = scale.reshape(-(-rows // height), -(-columns // width))
    return grid.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """fp64 [tokens, vocabulary], as eval mode computes them."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        device = next(iter([*model.parameters(), *model.buffers()])).device
        out = model(ids.to(device))
    finally:
        for module, flag in flags:
            module.training = flag
    logits: Tensor = getattr(out, "logits", out)
    return logits.detach().double().cpu().flatten(0, -2)
