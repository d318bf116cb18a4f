"""gemm: codes in, bf16 out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8kernels.formats import get_format
from fp8kernels.kernels.gemm import Operand

from .bench_dequantize import random_codes
from .case import Case, Shape, Work, assert_product, kernel, text

FULL, SMALL = (2048, 2048, 2048), (128, 256, 256)  # M, N, K


def versus_bf16(fmt: str, shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Against torch's bf16 matmul of the decoded operands."""
    x, w = operands(fmt, shape)
    dense_x, dense_w = decoded(x).bfloat16(), decoded(w).bfloat16()
    return _case(x, w, backend, "torch bf16 matmul", lambda: dense_x @ dense_w.T)


def versus_scaled_mm(fmt: str, shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Against torch._scaled_mm on the same codes; torch has no HiF8, so its e4m3 stands in there."""
    x, w = operands(fmt, shape)
    there = "e4m3" if get_format(fmt).carrier is None else fmt
    a, b = operands(there, shape)
    carrier = get_format(there).carrier
    left, right = a.codes.view(carrier), b.codes.view(carrier).t()  # [M, K], [K, N]
    one = a.scale.reshape(()), b.scale.reshape(())
    return _case(
        x, w, backend, f"torch._scaled_mm {there}",
        lambda: torch._scaled_mm(left, right, scale_a=one[0], scale_b=one[1], out_dtype=torch.bfloat16),
    )  # fmt: skip


def operands(fmt: str, shape: Shape) -> tuple[Operand, Operand]:
    rows, cols, depth = shape
    f = get_format(fmt)
    x = Operand(random_codes((rows, depth), fmt, seed=4), torch.full((1, 1), 0.021), f)
    w = Operand(random_codes((cols, depth), fmt, seed=5), torch.full((1, 1), 0.0034), f)
    return x, w


def decoded(operand: Operand) -> Tensor:
    """The operand's numbers in float64."""
    return operand.fmt.decode(operand.codes).double() * operand.scale.double()


def _case(x: Operand, w: Operand, backend: str, against: str, baseline: Work) -> Case:
    run: Callable[..., Tensor] = kernel("gemm", backend, x, w, None, torch.bfloat16)
    rows, depth = x.codes.shape
    cols = w.codes.shape[0]

    def check() -> None:
        assert_product(run(x, w, None, torch.bfloat16), decoded(x), decoded(w), "gemm")

    return Case(
        "gemm", "gemm tensor x tensor to bf16", x.fmt.name, backend, text((rows, cols, depth)), against,
        lambda: run(x, w, None, torch.bfloat16), baseline, check, (f"gemm/{backend}",), flop=2 * rows * cols * depth,
    )  # fmt: skip


def test_gemm(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_bf16(fmt, shape, backend))


def test_gemm_scaled_mm(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_scaled_mm(fmt, shape, backend))
