"""Norm and activation straight to codes, and their backwards, against torch's copy_ by bytes moved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fp8kernels.formats import get_format
from fp8kernels.kernels.norm_quantize import Norm
from fp8kernels.kernels.quantize import Quantized, Rounding
from fp8kernels.ops.table import Kernel
from fp8kernels.scaling import get_block

from .bench_quantize import CHECKED_ROWS, data
from .case import BANDWIDTH, Case, Shape, Work, device_of, generator, in_turn, pick, reference, sets, text
from .check import activation_exact, assert_between, assert_near, assert_same, checked_rows, norm_exact

SMALL = (512, 1024)
EPS = 1e-5


def norm(
    fmt: str,
    shape: Shape,
    backend: str = "cpu",
    center: bool = False,  # noqa: FBT001, FBT002 - an argument of a goal
    transpose: bool = False,  # noqa: FBT001, FBT002
) -> Case:
    """RMSNorm, or with `center` LayerNorm, of bf16 rows to codes by a scale that is known."""
    x = data(shape, device_of(backend))
    how = _rounding(fmt)
    kind = norm_of(x, center=center)
    y = reference("norm_quantize")(x[:CHECKED_ROWS], torch.zeros(1, 1, device=x.device), kind, how)
    scale = 2 * y.quantized.scale  # of the rows that are checked, with a binade for the others
    args = (scale, kind, how)
    chosen = pick("norm_quantize", backend, x, *args, transpose=transpose)
    run = partial(chosen.run, transpose=transpose)

    def check() -> None:
        out = run(x, *args)
        rows = checked_rows(x.shape[0], x.device.type)
        assert_between(
            _part(out.quantized, rows), *norm_exact(x[rows], kind, _rounded(chosen, x)), how, "norm_quantize"
        )
        assert int(out.quantized.counts[0]) == x.numel(), "norm_quantize counts another number of elements"
        if transpose:
            assert_same(out.quantized.codes_t, out.quantized.codes.t().contiguous(), "norm_quantize transposed codes")

    name = f"{'LayerNorm' if center else 'RMSNorm'} + quantize bf16{', transposed codes too' if transpose else ''}"
    moved = x.numel() * (4 if transpose else 3)
    return _case("norm_quantize", name, fmt, chosen.name, x, lambda each: run(each, *args), check, moved)


def activation(
    fmt: str,
    shape: Shape,
    backend: str = "cpu",
    kind: str = "silu",
    gated: bool = True,  # noqa: FBT001, FBT002 - an argument of a goal
    transpose: bool = False,  # noqa: FBT001, FBT002
) -> Case:
    """activation(x) * other, SwiGLU by default, of two bf16 matrices to codes by a scale that is known."""
    x = data(shape, device_of(backend))
    other = torch.randn_like(x) if gated else None
    how = _rounding(fmt)
    part = None if other is None else other[:CHECKED_ROWS]
    zero = torch.zeros(1, 1, device=x.device)
    scale = 2 * reference("act_quantize")(x[:CHECKED_ROWS], part, kind, zero, how).scale
    chosen = pick("act_quantize", backend, x, other, kind, scale, how, transpose=transpose)
    run = partial(chosen.run, transpose=transpose)

    def check() -> None:
        out = run(x, other, kind, scale, how)
        rows = checked_rows(x.shape[0], x.device.type)
        exact = activation_exact(x[rows], None if other is None else other[rows], kind, _rounded(chosen, x))
        assert_between(_part(out, rows), *exact, how, "act_quantize")
        assert int(out.counts[0]) == x.numel(), "act_quantize counts another number of elements"
        if transpose:
            assert_same(out.codes_t, out.codes.t().contiguous(), "act_quantize transposed codes")

    def call(each: Tensor) -> Quantized:
        out: Quantized = run(each, other, kind, scale, how)
        return out

    name = f"{kind}{' * other' if gated else ''} + quantize bf16{', transposed codes too' if transpose else ''}"
    moved = x.numel() * ((5 if gated else 3) + (1 if transpose else 0))
    return _case("act_quantize", name, fmt, chosen.name, x, call, check, moved)


def norm_backward(shape: Shape, backend: str = "cpu", center: bool = False) -> Case:  # noqa: FBT001, FBT002
    """dx, dweight and dbias from dy and x, bf16."""
    x = data(shape, device_of(backend))
    dy, kind = torch.randn_like(x), norm_of(x, center=center)
    given = reference("norm_quantize")(x, torch.ones(1, 1, device=x.device), kind, _rounding("e4m3"))
    args = (dy, x, given.rstd, given.mean, kind)
    chosen = pick("norm_backward", backend, *args)

    def check() -> None:
        for name, ours, expected in zip(
            ("dx", "dweight", "dbias"), chosen.run(*args), reference("norm_backward")(*args), strict=True
        ):
            if expected is not None:
                assert_near(ours, expected, 2**-7, f"norm_backward {name}")

    name = f"{'LayerNorm' if center else 'RMSNorm'} backward bf16"
    work = lambda each: chosen.run(dy, each, given.rstd, given.mean, kind)  # noqa: E731
    return _case("norm_backward", name, "-", chosen.name, x, work, check, 6 * x.numel())


def activation_backward(shape: Shape, backend: str = "cpu", kind: str = "silu") -> Case:
    """dx and dother of activation(x) * other, bf16."""
    x = data(shape, device_of(backend))
    dy, other = torch.randn_like(x), torch.randn_like(x)
    chosen = pick("act_backward", backend, dy, x, other, kind)

    def check() -> None:
        for name, ours, expected in zip(
            ("dx", "dother"), chosen.run(dy, x, other, kind), reference("act_backward")(dy, x, other, kind), strict=True
        ):
            assert_near(ours, expected, 2**-7, f"act_backward {name}")

    work = lambda each: chosen.run(dy, each, other, kind)  # noqa: E731
    return _case("act_backward", f"{kind} * other backward bf16", "-", chosen.name, x, work, check, 10 * x.numel())


def norm_of(x: Tensor, *, center: bool) -> Norm:
    """Weights near 1, as a trained norm has them."""
    random = generator(11, x.device.type)
    weight = 1 + 0.1 * torch.randn(x.shape[1], generator=random, device=x.device)
    bias = 0.1 * torch.randn(x.shape[1], generator=random, device=x.device) if center else None
    return Norm(weight.bfloat16(), None if bias is None else bias.bfloat16(), EPS, center)


def _part(out: Quantized, rows: Tensor) -> Quantized:
    return out._replace(codes=out.codes[rows])


def _rounded(kernel: Kernel, x: Tensor) -> torch.dtype:
    """What y is rounded to before it becomes a code: the composed lines of the CPU write it in x's dtype first."""
    return x.dtype if kernel.name == "cpu" else torch.float32


def _rounding(fmt: str) -> Rounding:
    return Rounding(get_format(fmt), get_block("tensor"), get_format(fmt).target)


def _case(
    verb: str,
    name: str,
    fmt: str,
    backend: str,
    x: Tensor,
    call: Callable[[Tensor], object],
    check: Callable[[], None],
    moved: int,
) -> Case:
    device = x.device.type
    inputs = [x, *(x.clone() for _ in range(1, sets(device, moved)))]
    targets = [torch.empty_like(each) for each in inputs]
    copies: list[Work] = [partial(to.copy_, each) for to, each in zip(targets, inputs, strict=True)]
    return Case(
        verb, name, fmt, backend, text(tuple(x.shape)), "torch copy_ bf16 to bf16",
        in_turn([partial(call, each) for each in inputs]), in_turn(copies), check, (f"{verb}/{backend}",),
        unit=BANDWIDTH, moved=moved, baseline_moved=4 * x.numel(), reuse=True, device=device, calls=len(inputs),
    )  # fmt: skip


def test_rms_norm(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(norm(fmt, shape, backend))


def test_layer_norm(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(norm(fmt, shape, backend, center=True))


def test_swiglu(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(activation(fmt, shape, backend))


def test_gelu(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(activation(fmt, shape, backend, kind="gelu", gated=False))


def _with_reference(backend: str) -> str:
    """On a CPU the backwards are torch's own, through the reference."""
    return "reference" if backend == "cpu" else backend


def test_norm_backward(shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(norm_backward(shape, _with_reference(backend)))


def test_swiglu_backward(shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(activation_backward(shape, _with_reference(backend)))
