"""gemm: codes in, bf16 out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fp8kernels.formats import E4M3, HIF8, get_format
from fp8kernels.kernels.gemm import Operand, fast_accumulation
from fp8kernels.kernels.quantize import carrier

from . import vendor
from .bench_dequantize import random_codes
from .case import BANDWIDTH, SPEED, Case, Shape, Work, device_of, in_turn, pick, sets, text
from .check import assert_product, assert_same, checked_rows, decoded, ternary, ternary_product
from .measure import COPY_ELEMENTS

FULL, SMALL = (2048, 2048, 2048), (128, 256, 256)  # M, N, K
CARRIER = "hif8 carrier"  # HiF8 values as E4M3 codes: what a layer with the carrier route multiplies


class Pair(NamedTuple):
    """The operands of one product."""

    x: Operand
    w: Operand


def versus_bf16(fmt: str, shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Against torch's bf16 matmul of the decoded operands."""
    pairs = operands(fmt, shape, backend)
    dense = [(decoded(each.x).bfloat16(), decoded(each.w).bfloat16().t()) for each in pairs]
    return _case(fmt, pairs, backend, "torch bf16 matmul", [partial(torch.mm, a, b) for a, b in dense])


def blocks_versus_bf16(shape: Shape = FULL, backend: str = "cpu", unit: str = SPEED) -> Case:
    """The same with scales 1x128 and 128x128; `unit` TERAFLOPS makes the figure our rate."""
    pairs = block_operands(shape, backend)
    dense = [(decoded(each.x).bfloat16(), decoded(each.w).bfloat16().t()) for each in pairs]
    works: list[Work] = [partial(torch.mm, a, b) for a, b in dense]
    return _case("e4m3", pairs, backend, "torch bf16 matmul", works, unit=unit)


def versus_scaled_mm(fmt: str, shape: Shape = FULL, backend: str = "cpu") -> Case:
    """Against torch._scaled_mm on the same codes; torch has no HiF8, so its e4m3 stands in there."""
    pairs = operands(fmt, shape, backend)
    there = "e4m3" if get_format(fmt).carrier is None else fmt
    theirs = [
        vendor.tensorwise(each.x, each.w) for each in (pairs if there == fmt else operands(there, shape, backend))
    ]
    return _case(fmt, pairs, backend, f"torch._scaled_mm {there}", theirs)


def versus_vendor(
    fmt: str,
    shape: Shape = FULL,
    backend: str = "table",
    fast: bool = False,  # noqa: FBT001, FBT002 - an argument of a goal
) -> Case:
    """Against the faster of torch's tensorwise and rowwise E4M3 products (cuBLASLt, CUTLASS), padding included.

    fast   both sides leave their sums in the tensor cores; else both add them up in fp32 every 128 of K
    """
    pairs = operands(fmt, shape, backend)
    theirs = pairs if fmt == "e4m3" else operands("e4m3", shape, backend)
    candidates = {
        "tensorwise": [vendor.tensorwise(each.x, each.w, fast=fast) for each in theirs],
        "rowwise": [vendor.rowwise(each.x, each.w, fast=fast) for each in theirs],
    }
    name, works = vendor.faster(candidates, device_of(backend))
    against = f"best of torch._scaled_mm tensorwise and rowwise{', fast accumulation' if fast else ''}"
    return _case(fmt, pairs, backend, against, works, extra={"best": name}, fast=fast)


def blockwise(shape: Shape = FULL, backend: str = "table") -> Case:
    """E4M3 with scales 1x128 and 128x128, against torch's own such product."""
    pairs = block_operands(shape, backend)
    works = [vendor.blockwise(each.x, each.w) for each in pairs]
    return _case("e4m3", pairs, backend, "torch blockwise scaled_mm", works)


def versus_e4m3(fmt: str = CARRIER, shape: Shape = FULL, backend: str = "table") -> Case:
    """Against our own E4M3 product, by the kernel that the table chooses for it."""
    pairs = operands(fmt, shape, backend)
    theirs = operands("e4m3", shape, backend)
    run = pick("gemm", "table", theirs[0].x, theirs[0].w, None, torch.bfloat16).run
    works = [partial(run, each.x, each.w, None, torch.bfloat16) for each in theirs]
    return _case(fmt, pairs, backend, "our E4M3 gemm", works)


def versus_copy(fmt: str, shape: Shape = FULL, backend: str = "table") -> Case:
    """Against torch's copy_ of a tensor beyond any cache, by bytes moved: for few rows the weights are all the work."""
    pairs = operands(fmt, shape, backend)
    device = device_of(backend)
    count = COPY_ELEMENTS if device == "cuda" else 1 << 20
    source = torch.randn(count, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    # as many copies as products, so that one call of each is one of either
    works: list[Work] = [lambda: target.copy_(source) for _ in pairs]
    moved = 2 * source.nbytes
    return _case(fmt, pairs, backend, "torch copy_ bf16 to bf16", works, unit=BANDWIDTH, baseline_moved=moved)


def operands(fmt: str, shape: Shape, backend: str = "cpu") -> list[Pair]:
    """Random codes with one scale each; on a GPU as many pairs as are beyond its L2."""
    m, n, k = shape
    device = device_of(backend)

    def operand(rows: int, seed: int, scale: float) -> Operand:
        one = torch.full((1, 1), scale, device=device)
        if fmt != CARRIER:
            return Operand(random_codes((rows, k), fmt, seed, device), one, get_format(fmt))
        shift = carrier.shift(HIF8.target)
        recoded = carrier.recoding(HIF8, shift, device).codes
        return Operand(recoded[random_codes((rows, k), "hif8", seed, device).long()], one * 2.0**-shift, E4M3)

    count = sets(device, m * k + n * k + 2 * m * n)
    return [Pair(operand(m, 4 + 2 * i, 0.021), operand(n, 5 + 2 * i, 0.0034)) for i in range(count)]


def block_operands(shape: Shape, backend: str = "cpu") -> list[Pair]:
    """E4M3 codes with a scale for each 1x128 of x and each 128x128 of w; 128 must divide N and K."""
    m, n, k = shape
    pairs = operands("e4m3", shape, backend)

    def scales(rows: int, like: Tensor) -> Tensor:
        return like * (0.5 + torch.rand(rows, k // 128, device=like.device))

    return [
        Pair(each.x._replace(scale=scales(m, each.x.scale)), each.w._replace(scale=scales(n // 128, each.w.scale)))
        for each in pairs
    ]


@contextmanager
def accumulating(*, fast: bool) -> Iterator[None]:
    """Sums of FP8 products stay in the tensor cores inside, or do not."""
    before = fast_accumulation(on=fast)
    try:
        yield
    finally:
        fast_accumulation(on=before)


def _case(
    fmt: str,
    pairs: list[Pair],
    backend: str,
    against: str,
    baselines: Sequence[Work],
    *,
    unit: str = SPEED,
    baseline_moved: int = 0,
    extra: dict[str, object] | None = None,
    fast: bool = False,
) -> Case:
    first = pairs[0]
    with accumulating(fast=fast):
        chosen = pick("gemm", backend, first.x, first.w, None, torch.bfloat16)
    (m, k), n = first.x.codes.shape, first.w.codes.shape[0]
    device = first.x.codes.device.type
    blocks = "tensor x tensor" if first.w.scale.numel() == 1 else "1x128 x 128x128"

    def product(pair: Pair) -> Tensor:
        with accumulating(fast=fast):
            out: Tensor = chosen.run(pair.x, pair.w, None, torch.bfloat16)
        return out

    def check() -> None:
        out = product(first)
        assert out.shape == (m, n), f"gemm gives {tuple(out.shape)}"
        rows = checked_rows(m, device)
        scale = first.x.scale if first.x.scale.shape[0] == 1 else first.x.scale[rows]
        part = Operand(first.x.codes[rows], scale, first.x.fmt)
        assert_product(out[rows], part, first.w, "gemm", promoted=k if fast else None)
        whole = Pair(ternary(first.x, 1), ternary(first.w, 2))  # every element, to the bit
        assert_same(product(whole), ternary_product(*whole).bfloat16(), "gemm of -1, 0 and 1")

    ours = [partial(product, each) for each in pairs]
    name = f"gemm {blocks} to bf16{', fast accumulation' if fast else ''}"
    return Case(
        "gemm", name, fmt, chosen.name, text((m, n, k)), against,
        in_turn(ours), in_turn(baselines), check, (f"gemm/{chosen.name}",), flop=2 * m * n * k, unit=unit,
        moved=m * k + n * k + 2 * m * n if baseline_moved else 0, baseline_moved=baseline_moved,
        device=device, calls=len(pairs), extra=extra or {},
    )  # fmt: skip


def test_gemm(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_bf16(fmt, shape, backend))


def test_gemm_scaled_mm(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_scaled_mm(fmt, shape, backend))


def test_gemm_blocks(shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(blocks_versus_bf16(shape, backend))
