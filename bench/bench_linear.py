"""A serving layer with 8-bit weights and inputs against torch's bf16 linear, its weights beyond every cache."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

from fp8kernels.formats import get_format
from fp8kernels.kernels.gemm import Operand
from fp8kernels.kernels.quantize import Rounding
from fp8kernels.nn.inference import InferenceLinear
from fp8kernels.recipe import Role
from fp8kernels.scaling import get_block, scale_from_amax

from .bench_dequantize import random_codes
from .case import ANY, Case, Shape, device_of, generator, noted, reference, sets, text
from .check import assert_product, checked_rows

FULL, SMALL = (1, 4096, 4096), (1, 256, 256)  # rows of the input, out features, in features
BEYOND_CACHE = 192 << 20  # bytes of 8-bit weights in all layers: six times a 32 MiB cache


def versus_bf16(fmt: str, shape: Shape = FULL, backend: str = "cpu", total: int = BEYOND_CACHE) -> Case:
    """Layer after layer, so that every call reads its weights from memory; quantizing the input is part of it."""
    rows, cols, depth = shape
    device = device_of(backend)
    moved = cols * depth + 2 * rows * (depth + cols)  # bytes of 8-bit weights, of the input and of the output
    count = sets(device, moved) if device == "cuda" else max(1, total // (cols * depth))
    x = torch.randn(rows, depth, generator=generator(6, device), device=device).bfloat16()
    layers = [layer(fmt, cols, depth, x, seed) for seed in range(count)]
    dense = [weight_of(each).bfloat16() for each in layers]
    ours, theirs = cycle(layers), cycle(dense)

    def check() -> None:
        first = layers[0]
        how = Rounding(get_format(fmt), get_block("tensor"), first.input_target)
        part = checked_rows(rows, device)
        q = reference("quantize")(x[part], first.input_scale, how)
        weights = Operand(first.weight_codes, first.weight_scale, how.fmt)
        assert_product(first(x)[part], Operand(q.codes, q.scale, how.fmt), weights, "linear")

    def walk() -> None:
        for _ in range(count):
            next(ours)(x)

    def walk_dense() -> None:
        for _ in range(count):
            F.linear(x, next(theirs))

    kernels = {f"quantize/{backend}", f"gemm/{backend}"}
    if backend == ANY:
        with noted() as kernels, torch.inference_mode():
            layers[0](x)
    if device == "cuda":  # times of one layer; on a CPU those of the whole walk
        return Case(
            "linear", "InferenceLinear", fmt, backend, text(shape), "torch bf16 linear",
            torch.inference_mode()(walk), torch.inference_mode()(walk_dense), torch.inference_mode()(check),
            tuple(sorted(kernels)), flop=2 * rows * cols * depth, device=device, calls=count,
        )  # fmt: skip
    return Case(
        "linear", f"InferenceLinear, {count} layers in turn", fmt, backend, text(shape), "torch bf16 linear",
        torch.inference_mode()(walk), torch.inference_mode()(walk_dense), torch.inference_mode()(check),
        tuple(sorted(kernels)),
        moved=count * cols * depth, baseline_moved=2 * count * cols * depth, flop=2 * count * rows * cols * depth,
        extra={"layers": count},
    )  # fmt: skip


def layer(fmt: str, cols: int, depth: int, x: Tensor, seed: int) -> InferenceLinear:
    """A layer as training leaves it: frozen scales, codes of normal numbers."""
    role = Role(fmt, "static")
    target = get_format(fmt).target
    made = InferenceLinear(
        depth, cols, bias=False, input_role=role, weight_role=role, input_target=target, device=x.device
    )
    made.weight_codes.copy_(random_codes((cols, depth), fmt, seed, x.device.type))
    made.weight_scale.fill_(depth**-0.5 / target)
    made.input_scale.fill_(float(scale_from_amax(x.abs().max().float(), target)))
    return made.eval()


def weight_of(made: InferenceLinear) -> Tensor:
    """The layer's weights in fp32."""
    return get_format(made.weight_role.fmt).decode(made.weight_codes) * made.weight_scale


def test_linear(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_bf16(fmt, shape, backend, total=4 * shape[1] * shape[2]))
