"""What the verbs that produce codes from other operations share: their arguments, and their results as a QTensor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import Format, get_format
from ..kernels.quantize import Observer, Quantized, Rounding
from ..kernels.quantize import carrier as carriers
from ..scaling.block import Block, get_block
from ..scaling.qtensor import QTensor
from . import check
from .quantize import OVERFLOWS, given_scale

# of schemas, in the order of How
HOW = (
    "str fmt, str block, float target, int margin, bool power_of_two, bool saturate, bool transpose, int? carrier=None"
)


class How(NamedTuple):
    """The arguments of a schema that say how y becomes codes, in its order."""

    fmt: str
    block: str
    target: float
    margin: int
    power_of_two: bool
    saturate: bool
    transpose: bool
    carrier: int | None = None

    def rounding(self) -> Rounding:
        return Rounding(
            get_format(self.fmt), get_block(self.block), self.target, self.margin, self.power_of_two, self.saturate,
            self.carrier,
        )  # fmt: skip


def prepare(
    verb: str,
    x: Tensor,
    fmt: Format | str,
    block: Block | str,
    scale: Tensor | float | None,
    target: float | None,
    margin: int,
    power_of_two: bool,
    overflow: str,
    transpose: bool,
) -> tuple[Tensor, How]:
    """Scales on the grid of x's block (zeros where none are given), and how to round, after checking both."""
    fmt, block = get_format(fmt), get_block(block)
    check.float_tensor(x, verb)
    check.one_of(verb, "overflow", overflow, OVERFLOWS)
    if target is not None and not target > 0:
        raise ValueError(f"{verb}: target is {target}, it must be positive")
    grid = block.grid(*check.matrix_shape(x))
    given = torch.zeros(grid, dtype=torch.float32, device=x.device) if scale is None else given_scale(scale, grid, x)
    target = fmt.target if target is None else float(target)
    return given, How(fmt.name, block.name, target, margin, power_of_two, overflow == "saturate", transpose)


def as_qtensor(codes: Tensor, codes_t: Tensor, scale: Tensor, how: How) -> QTensor:
    """What an op returned, as a QTensor."""
    return QTensor(codes, scale, get_format(how.fmt), get_block(how.block), codes_t if how.transpose else None)


def observer(pending: Tensor | None, counters: Tensor | None) -> Observer | None:
    """Where to note what is seen; under inference mode nothing is noted."""
    if pending is None or counters is None or torch.is_inference_mode_enabled():
        return None
    return Observer(pending, counters)


def nothing(x: Tensor, scale: Tensor, how: How) -> Quantized:
    """What a tensor without elements becomes: no kernel is needed."""
    codes = torch.empty(check.matrix_shape(x), dtype=torch.uint8, device=x.device)
    counts = torch.zeros(4, dtype=torch.int64, device=x.device)
    scale = torch.where(scale == 0, 1.0, scale)
    if how.carrier is not None:
        scale = carriers.scale_of_codes(scale, how.carrier)
    return Quantized(codes, codes.t().contiguous() if how.transpose else None, scale, torch.zeros_like(scale), counts)


def outputs(q: Quantized, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """codes in x's own shape, scale, codes_t: an op returns an empty tensor for what is not there."""
    return q.codes.reshape(shape), q.scale, or_empty(q.codes_t, q.codes)


def fake_outputs(x: Tensor, scale: Tensor, how: How) -> tuple[Tensor, Tensor, Tensor]:
    """The same without values."""
    rows, cols = check.matrix_shape(x)
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    return codes, torch.empty_like(scale), codes.new_empty((cols, rows) if how.transpose else 0)


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """x, or the empty tensor that stands for None in what an op returns."""
    return like.new_empty(0) if x is None else x
