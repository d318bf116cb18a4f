"""The numbers in a checkpoint, a layer at a time: scales that decode nothing, codes of NaN, and what servers change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..formats import E4M3, get_format
from .stored import COMPRESSED, FP8, MODELOPT, Stored, StoredLayer

AT_ONCE = 1 << 22  # codes that are looked up at a time


@dataclass
class Values:
    """What the numbers say.

    scales     per layer with one weight scale, the scale; requantized  SQNR in dB, by the name of a group's first layer
    inexact    names of scales that bfloat16 does not hold, with the relative change
    """

    problems: list[str] = field(default_factory=list)
    scales: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, float] = field(default_factory=dict)
    requantized: dict[str, float] = field(default_factory=dict)
    inexact: dict[str, float] = field(default_factory=dict)


class Reader:
    """Tensors of a folder's files by their names; each file is open once, and mapped, not read."""

    def __init__(self, stored: Stored) -> None:
        self.stored, self.files, self.stack = stored, {}, ExitStack()  # type: ignore[var-annotated]

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def __call__(self, name: str) -> Tensor:
        """raises ValueError naming the file where the library that reads it refuses."""
        from safetensors import SafetensorError, safe_open

        path: Path = self.stored.tensors[name].file
        try:
            if path not in self.files:
                self.files[path] = self.stack.enter_context(safe_open(path, framework="pt"))
            return self.files[path].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(f"{path}: {name!r} cannot be read ({error})") from None


def read_values(stored: Stored) -> Values:
    """Look at every scale and code of a folder; memory for one group of layers at a time.

    raises   ValueError if a file cannot be read
    """
    found = Values()
    with Reader(stored) as read:
        for layer in stored.layers:
            if layer.eight_bit:
                found.problems.extend(_layer(stored, layer, read, found))
        if stored.method in (COMPRESSED, FP8, MODELOPT):
            for group in stored.groups():
                _requantized(group, read, found)
    return found


def _layer(stored: Stored, layer: StoredLayer, read: Reader, found: Values) -> Iterator[str]:
    for name, keep in ((layer.scale, found.scales), (layer.input_scale, found.inputs)):
        if name is None or stored.tensors[name].dtype not in ("F32", "BF16", "F16", "F64"):
            continue
        scale = read(name).to(torch.float64).flatten()
        zero_is_current = stored.tensors[layer.weight].dtype == "U8" and name == layer.input_scale
        finite = scale.isfinite()
        wrong = ~finite | ((scale < 0) if zero_is_current else (scale <= 0))
        if bool(wrong.any()):
            bad = scale[wrong]
            count = f"{int(wrong.sum())} of {scale.numel()}"
            yield f"{name}: {count} scales are 0, negative, NaN or Inf, such as {float(bad[0])}"
            continue
        if scale.numel() == 1:
            keep[layer.name] = float(scale)
        if scale.numel():
            change = (
                (scale.to(torch.bfloat16).double() - scale) / scale.clamp_min(torch.finfo(torch.float64).tiny)
            ).abs()
            if float(change.max()) > 0:
                found.inexact[name] = float(change.max())
    fmt = layer.scheme.fmt if layer.scheme else ("e5m2" if layer.dtype == "F8_E5M2" else "e4m3")
    if stored.tensors[layer.weight].dtype not in ("U8", "F8_E4M3", "F8_E5M2"):
        return
    if not_numbers := count_no_numbers(read(layer.weight), fmt):
        yield f"{layer.weight}: {not_numbers:,} codes are NaN or Inf in {fmt}"


def count_no_numbers(codes: Tensor, fmt: str) -> int:
    """How many codes stand for NaN or Inf.

    codes   uint8, or a dtype of the format, any shape
    """
    wrong = ~get_format(fmt).table().isfinite()  # [256]
    if not bool(wrong.any()):
        return 0
    flat = codes.view(torch.uint8).flatten()
    return sum(int(wrong[part.int()].sum()) for part in flat.split(AT_ONCE))


def _requantized(group: list[StoredLayer], read: Reader, found: Values) -> None:
    """What shards lose where a server decodes them and rounds them again with the largest of their scales."""
    if any(layer.name not in found.scales or layer.dtype != "F8_E4M3" for layer in group):
        return
    if any(layer.scheme is None or layer.scheme.weights != "tensor" for layer in group):
        return
    scales = [found.scales[layer.name] for layer in group]
    if len(set(scales)) == 1:
        return
    largest = torch.tensor(max(scales), dtype=torch.float32)
    signal = noise = 0.0
    for layer, scale in zip(group, scales, strict=True):
        x = read(layer.weight).float() * torch.tensor(scale, dtype=torch.float32)  # [N, K]
        again = E4M3.decode(E4M3.encode(x / largest)) * largest  # [N, K]
        signal += float(x.double().square().sum())
        noise += float((x - again).double().square().sum())
    found.requantized[group[0].name] = math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)
