"""Serving layers that read one input, as one product: queries, keys and values, or the gate and what it opens.

A token reads every weight once, so at batch 1 a layer costs its bytes and its calls. Joined layers round their input
once and make one product for all of them, over codes that lie one behind the other; each then hands over its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..scaling.block import get_block
from .function import output_dtype
from .inference import InferenceLinear

MOST_ROWS = 8  # of an input; more of them are work enough for a product of each layer, without copies of its part


class Joined:
    """The product of several layers. Each part asks for its own result; the first one makes those of all.

    codes  uint8 [sum of out_features, in_features], of which the parts' own codes are views
    scale  fp32 [1, 1] where all parts have the same one scale, else a grid with the rows of all parts
    bias   [sum of out_features], or None
    """

    def __init__(self, parts: Sequence[InferenceLinear]) -> None:
        self.sizes = [part.out_features for part in parts]
        self.codes: Tensor | None = torch.cat([part.weight_codes for part in parts])
        self.scale = _joined_scale(parts)
        biases = [part.bias for part in parts if part.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self._held: tuple[Tensor, tuple[Tensor, ...]] | None = None  # an input, and what it became
        self._back: Tensor | None = None  # the codes, while they are written

    def hold_back(self) -> None:
        """Until `rejoin`, every part makes its own product: their tensors are being written."""
        if self.codes is not None:
            self._back, self.codes, self._held = self.codes, None, None

    def dissolve(self) -> None:
        """From now on every part makes its own product: its tensors are no longer the ones that were joined."""
        self.codes = self._held = self._back = None

    def part(self, layer: JoinedLinear, x: Tensor) -> Tensor | None:
        """Of the result for x that of one part, or None if nobody has made it: the first part does."""
        held = self._held  # read once: another thread may serve another input
        if layer.index == 0 and self.codes is not None:
            held = self._held = (x, self._product(layer, x))
        elif held is None or held[0] is not x:
            return None
        if layer.index == len(self.sizes) - 1:
            self._held = None
        return held[1][layer.index]

    def _product(self, first: InferenceLinear, x: Tensor) -> tuple[Tensor, ...]:
        dtype = output_dtype(x)
        out: Tensor = torch.ops.fp8kernels.linear(
            x.detach() if x.requires_grad else x,
            first.input_scale,
            *first._input,
            self.codes,
            self.scale,
            first.weight_role.fmt,
            self.bias,
            torch.float32 if dtype == torch.float16 else dtype,
        )
        return tuple(part.contiguous() for part in out.to(dtype).split(self.sizes, dim=-1))


class JoinedLinear(InferenceLinear):
    """An InferenceLinear whose product is made with others'; made by `join`, of a layer that is there.

    Its result has the same bits as before. Inputs of more than MOST_ROWS rows, graphs of torch.compile and layers that
    were moved or loaded anew since take the product of the layer alone.
    """

    joined: Joined
    index: int

    def forward(self, x: Tensor) -> Tensor:
        few = x.shape[-1:] == (self.in_features,) and x.numel() <= MOST_ROWS * self.in_features
        if few and not torch.compiler.is_compiling():
            out = self.joined.part(self, x)
            if out is not None:
                return out
        return super().forward(x)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        self.joined.dissolve()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.joined.dissolve()
        super()._load_from_state_dict(*args, **kwargs)


def why_not_joined(parts: Sequence[InferenceLinear]) -> str | None:
    """Why these layers, which read one input, cannot be one product, in words, or None."""
    first = parts[0]
    for part in parts[1:]:
        if part._input != first._input or part.input_role.scaling != first.input_role.scaling:
            return "their inputs are rounded in different ways"
        if not torch.equal(part.input_scale, first.input_scale):
            return f"their inputs have different scales, {float(first.input_scale):g} and {float(part.input_scale):g}"
        if (part.weight_role.fmt, part.weight_role.block) != (first.weight_role.fmt, first.weight_role.block):
            return "their weights have different formats or blocks"
        if part.weight_codes.device != first.weight_codes.device:
            return "they are on different devices"
    if len({None if part.bias is None else part.bias.dtype for part in parts}) > 1:
        return "their biases have different dtypes, or some have none"
    return None


def join(parts: Sequence[InferenceLinear]) -> None:
    """Make layers that read one input one product, in place; `why_not_joined` is None for them.

    parts  in the order in which they are called
    """
    joined = Joined(parts)
    assert joined.codes is not None
    for index, (part, codes) in enumerate(zip(parts, joined.codes.split(joined.sizes), strict=True)):
        part.weight_codes = codes
        part.__class__ = JoinedLinear
        assert isinstance(part, JoinedLinear)
        part.joined, part.index = joined, index


def rejoin(joined: Joined, parts: Sequence[InferenceLinear]) -> None:
    """After `hold_back` and new numbers in the parts' tensors: one product again, unless they may no longer be one.

    parts  all of them, in any order
    """
    if joined._back is None:
        return
    parts = sorted(parts, key=lambda part: int(part.index))  # type: ignore[arg-type]
    if why_not_joined(parts) is None:
        joined.scale = _joined_scale(parts)
        biases = [part.bias for part in parts if part.bias is not None]
        joined.bias = torch.cat(biases) if biases else None
        joined.codes = joined._back
    joined._back = None


def _joined_scale(parts: Sequence[InferenceLinear]) -> Tensor:
    scales = [part.weight_scale for part in parts]
    if all(scale.numel() == 1 and torch.equal(scale, scales[0]) for scale in scales):
        return scales[0]
    if get_block(parts[0].weight_role.block).rows is None:  # one scale for all rows of a part: the same for each row
        scales = [
            scale.repeat_interleave(part.out_features // scale.shape[0], 0)
            for scale, part in zip(scales, parts, strict=True)
        ]
    return torch.cat(scales)
