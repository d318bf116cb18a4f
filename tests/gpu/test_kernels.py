"""Every line of the table against the reference on the CPU: to the bit where sums play no part, else within bounds."""

from __future__ import annotations

import itertools

import pytest
import tolerance
import torch
from gpu.lines import CONTENTS, DTYPES, Line, lines, numbers, some, to
from torch import Tensor

from bench.check import (
    accumulator,
    activation_exact,
    assert_between,
    assert_near,
    assert_product,
    assert_quantized,
    assert_same,
    norm_exact,
    ternary,
    ternary_product,
)
from fp8kernels.formats import E4M3, E5M2, FORMATS, HIF8
from fp8kernels.kernels.act_quantize.reference import activate
from fp8kernels.kernels.commit import ScaleRule, State
from fp8kernels.kernels.gemm import ACTIVATIONS, Epilogue, Operand
from fp8kernels.kernels.norm_quantize import Norm
from fp8kernels.kernels.quantize import Observer, Rounding, carrier
from fp8kernels.scaling.block import BLOCKS, Block, get_block

ODD = Block("4x32", 4, 32)
HOWS = [Rounding(fmt, get_block("tensor"), fmt.target, saturate=s) for fmt in FORMATS.values() for s in (True, False)]
CARRIED = [Rounding(HIF8, get_block("tensor"), t, carrier=carrier.shift(t)) for t in (HIF8.target, HIF8.grad_target)]
# M, N, K of products: one element, around tiles, K around 128, tall, wide, odd in all
PRODUCTS = ((1, 1, 1), (5, 20, 129), (16, 64, 128), (17, 33, 70), (64, 128, 256), (127, 129, 384), (130, 257, 1000))
BLOCK_PRODUCTS = ((3, 128, 128), (64, 128, 256), (127, 256, 384), (200, 384, 1024))
PAIRS = ((E4M3, E4M3), (HIF8, HIF8), (E5M2, E4M3), (E4M3, E5M2), (HIF8, E4M3))


def bits() -> torch.Generator:
    return torch.Generator().manual_seed(21)


@pytest.mark.parametrize("line", lines("quantize"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantize(line: Line, dtype: torch.dtype) -> None:
    """Codes, transposed codes, scales, amax, counts and what the observer holds, over contents, formats and blocks."""
    ran = 0
    for content, how in some(line, CONTENTS, (*HOWS, *CARRIED)):
        x = numbers((128, 256), dtype, content, bits()).to(line.device)
        for block in (*BLOCKS.values(), ODD):
            rounding = Rounding(how.fmt, block, how.target, saturate=how.saturate, carrier=how.carrier)
            scale = torch.rand(block.grid(*x.shape), generator=bits()) + 0.01
            scale.view(-1)[::2] = 0  # unknown: those blocks take their own amax
            scale = scale.to(line.device)
            transpose = content == "normal"
            if not line.takes(x, scale, rounding, transpose=transpose, observer=observer(line.device)):
                continue
            seen, wanted = observer(line.device), observer("cpu")
            got = line.kernel.run(x, scale, rounding, transpose=transpose, observer=seen)
            expected = line.reference(x, scale, rounding, transpose=transpose, observer=wanted)
            assert_quantized(to(got, "cpu"), expected, f"{content} {rounding}")
            for name in ("pending", "counters"):
                assert_same(getattr(seen, name).cpu(), getattr(wanted, name), f"{content} {rounding} {name}")
            ran += 1
    assert ran >= len(BLOCKS), f"it took {ran} of the cases only"


def observer(device: str) -> Observer:
    return Observer(torch.tensor([0.5], device=device), torch.arange(4, device=device))


@pytest.mark.parametrize("line", lines("quantize"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_quantize_every_input(line: Line, dtype: torch.dtype) -> None:
    """All 65,536 inputs under scales that are powers of two, that divide nothing, and at both ends."""
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype).view(256, 256).to(line.device)
    ran = 0
    for how, value in some(line, (*HOWS, *CARRIED), (2.0**-126, 1e-30, 2.0**-3, 1.0, 0.0237, 3.4e38)):
        scale = torch.full((1, 1), value, device=line.device)
        if line.takes(x, scale, how):
            assert_quantized(to(line.kernel.run(x, scale, how), "cpu"), line.reference(x, scale, how), f"{value} {how}")
            ran += 1
    assert ran, "it took none of the cases"


@pytest.mark.parametrize("line", lines("dequantize"))
def test_dequantize(line: Line) -> None:
    ran = 0
    codes = torch.arange(256, dtype=torch.uint8).repeat(128, 2).to(line.device)  # [128, 512]
    for fmt, dtype, block in some(line, FORMATS.values(), DTYPES, (*BLOCKS.values(), ODD)):
        scale = (torch.rand(block.grid(*codes.shape), generator=bits()) + 0.01).to(line.device)
        for given in (codes, codes[:, :-1] if block.cols is None else codes):  # rows that are not aligned
            args = (given, scale, fmt, dtype)
            if line.takes(*args):
                tolerance.exact(line.kernel.run(*args).cpu(), line.reference(*args))
                ran += 1
    assert ran, "it took none of the cases"


@pytest.mark.parametrize("line", lines("commit"))
@pytest.mark.parametrize(
    "rule", (ScaleRule(), ScaleRule("moving_average", 1), ScaleRule("most_recent", 0, True)), ids=str
)
def test_commit(line: Line, rule: ScaleRule) -> None:
    """Histories, scales and pending of layers with different windows, seen, not seen, and seen with NaN or Inf."""
    states = [
        made_state(tensors, window, seed) for seed, (tensors, window) in enumerate(((3, 64), (3, 1), (1, 7), (2, 1024)))
    ]
    ours, expected = to(states, line.device), [State(*(each.clone() for each in state)) for state in states]
    assert line.takes(ours, rule)
    for _ in range(2):
        line.kernel.run(ours, rule)
        line.reference(expected, rule)
        for got, want in zip(ours, expected, strict=True):
            for name in State._fields:
                assert_same(getattr(got, name).cpu(), getattr(want, name), f"{rule} {name}")


def made_state(tensors: int, window: int, seed: int) -> State:
    random = torch.Generator().manual_seed(seed)
    history = torch.rand(tensors, window, generator=random)
    history[:, window // 2 :] = 0
    pending = (
        torch.tensor([3.0, 0.0, float("inf")])[:tensors] if seed % 2 == 0 else torch.rand(tensors, generator=random)
    )
    return State(history, pending, torch.rand(tensors, generator=random), torch.full((tensors,), 15.0))


@pytest.mark.parametrize("line", lines("gemm"))
@pytest.mark.parametrize("block", ("tensor", "row", "128x128"))
def test_gemm(line: Line, block: str) -> None:
    """Within the bound of the kernel's accumulator on random numbers; -1, 0 and 1 to the bit."""
    ran = 0
    shapes = BLOCK_PRODUCTS if block == "128x128" else PRODUCTS
    for (m, n, k), (x_fmt, w_fmt), dtype in some(line, shapes, PAIRS, (torch.bfloat16, torch.float32)):
        x, w = product_operands(m, n, k, x_fmt, w_fmt, block)
        bias = torch.randn(n, generator=bits())
        args = to((x, w, bias, dtype), line.device)
        if not line.takes(*args):
            continue
        assert_product(line.kernel.run(*args), args[0], args[1], f"{m}x{n}x{k} {x_fmt.name} {w_fmt.name}", args[2])
        exact = ternary(args[0], 1), ternary(args[1], 2)
        got = line.kernel.run(*exact, None, dtype)
        assert_same(got, ternary_product(*exact).to(dtype), f"{m}x{n}x{k} {x_fmt.name} {w_fmt.name} of -1, 0 and 1")
        ran += 1
    # a kernel may be for one kind of scale or of format; `test_gemm_takes_something` asks for any
    assert ran or line.kernel.name not in ("cpu", "reference"), "it took none of the cases"


def product_operands(m: int, n: int, k: int, x_fmt: object, w_fmt: object, block: str) -> tuple[Operand, Operand]:
    random = bits()

    def operand(rows: int, fmt: object, name: str) -> Operand:
        codes = fmt.encode(torch.randn(rows, k, generator=random) * 3)  # type: ignore[attr-defined]
        grid = get_block(name).grid(rows, k)
        return Operand(codes, torch.rand(grid, generator=random) + 0.01, fmt)  # type: ignore[arg-type]

    return operand(m, x_fmt, "1x128" if block == "128x128" else block), operand(n, w_fmt, block)


@pytest.mark.parametrize("line", lines("gemm"))
def test_gemm_takes_something(line: Line) -> None:
    """A line that refuses everything would pass unseen."""
    cases = itertools.product(PRODUCTS, PAIRS, ("tensor", "row"))
    assert any(
        line.takes(*to((*product_operands(*shape, *fmts, block), None, torch.bfloat16), line.device))
        for shape, fmts, block in cases
    )


@pytest.mark.parametrize("line", lines("gemm"))
def test_gemm_transposed_operands(line: Line) -> None:
    """The two gradient layouts: operands whose K is not the innermost dimension."""
    for x_fmt, w_fmt in PAIRS:
        x, w = product_operands(48, 80, 96, x_fmt, w_fmt, "tensor")
        x, w = (each._replace(codes=each.codes.t().contiguous().t()) for each in (x, w))
        args = to((x, w, None, torch.float32), line.device)
        if line.takes(*args):
            assert_product(line.kernel.run(*args), args[0], args[1], f"{x_fmt.name} {w_fmt.name} transposed")


@pytest.mark.parametrize("line", lines("gemm"))
def test_gemm_epilogue(line: Line) -> None:
    """Activation, residual, and codes out with their amax and counts, where the kernel has them."""
    m, n, k = 130, 96, 160
    for (x_fmt, w_fmt), activation in itertools.product(PAIRS, ACTIVATIONS):
        x, w = to(product_operands(m, n, k, x_fmt, w_fmt, "tensor"), line.device)
        residual = torch.randn(m, n, generator=bits()).bfloat16().to(line.device)
        epilogue = Epilogue(activation, residual)
        args = (x, w, None, torch.float32, epilogue)
        if line.takes(*args):
            wanted, slack = epilogue_exact(x, w, epilogue)
            tolerance.bounded(line.kernel.run(*args), wanted, slack)
        how = Rounding(E4M3, get_block("tensor"), E4M3.target)
        scale = torch.full((1, 1), 0.05, device=line.device)
        seen = observer(line.device)
        epilogue = Epilogue(activation, None, how, scale, seen)
        args = (x, w, None, torch.float32, epilogue)
        if line.takes(*args):
            wanted, slack = epilogue_exact(x, w, epilogue)
            out = line.kernel.run(*args)
            assert_between(out, wanted, slack, how, f"{x_fmt.name} {activation} codes")
            assert abs(float(out.amax) - float(wanted.abs().max())) <= float(slack.max())
            assert seen.counters.tolist()[0] == m * n
            assert float(seen.pending) == max(0.5, float(out.amax))


def epilogue_exact(x: Operand, w: Operand, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
    left, right = (decode(each) for each in (x, w))
    total = left @ right.T
    if epilogue.activation != "none":
        total = activate(total, epilogue.activation)
    if epilogue.residual is not None:
        total = total + epilogue.residual.double()
    bound = tolerance.epilogue_bound(left, right, None, torch.float32, epilogue, accumulator(x, w))
    return total, bound


def decode(operand: Operand) -> Tensor:
    return operand.fmt.decode(operand.codes).double() * operand.scale.double()


def through(line: Line, x: Tensor) -> torch.dtype:
    """The composed lines of the CPU round y to x's dtype before it becomes a code."""
    return x.dtype if line.kernel.name == "cpu" else torch.float32


@pytest.mark.parametrize("line", lines("norm_quantize"))
@pytest.mark.parametrize("kind", ("rms", "layer"))
def test_norm_quantize(line: Line, kind: str) -> None:
    center, ran = kind == "layer", 0
    for dtype, how, (rows, cols) in some(
        line, DTYPES, (*HOWS[::2], CARRIED[0]), ((1, 1), (3, 70), (33, 256), (8, 1024), (5, 5000))
    ):
        x = (torch.randn(rows, cols, generator=bits()) * 3 + 0.5).to(dtype)
        weight = (1 + 0.1 * torch.randn(cols, generator=bits())).to(dtype)
        norm = Norm(weight, 0.1 * weight if center else None, 1e-5, center)
        scale = torch.full((1, 1), 0.3)
        args = to((x, scale, norm, how), line.device)
        if not line.takes(*args, observer=observer(line.device)):
            continue
        seen = observer(line.device)
        out = line.kernel.run(*args, observer=seen)
        y, slack = norm_exact(args[0], args[2], through(line, x))
        assert_between(out.quantized, y, slack, how, f"{dtype} {how.fmt.name} {rows}x{cols}")
        expected = line.reference(*args)
        assert_near(out.rstd.cpu(), expected.rstd, (cols + 8) * 2.0**-24, "rstd")
        assert seen.counters.tolist()[0] == rows * cols
        assert float(seen.pending) == max(0.5, float(out.quantized.amax.max()))
        ran += 1
    assert ran, "it took none of the cases"


@pytest.mark.parametrize("line", lines("act_quantize"))
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_act_quantize(line: Line, activation: str) -> None:
    ran = 0
    for dtype, how, (rows, cols), gated in some(
        line, DTYPES, (*HOWS[::2], CARRIED[0]), ((1, 1), (3, 70), (33, 256), (64, 1000)), (False, True)
    ):
        x = (torch.randn(rows, cols, generator=bits()) * 4).to(dtype)
        other = torch.randn(rows, cols, generator=torch.Generator().manual_seed(3)).to(dtype) if gated else None
        args = to((x, other, activation, torch.full((1, 1), 0.3), how), line.device)
        if not line.takes(*args, observer=observer(line.device)):
            continue
        seen = observer(line.device)
        out = line.kernel.run(*args, observer=seen)
        y, slack = activation_exact(args[0], args[1], activation, through(line, x))
        assert_between(out, y, slack, how, f"{activation} {dtype} {how.fmt.name} {rows}x{cols}")
        assert seen.counters.tolist()[0] == rows * cols
        assert float(seen.pending) == max(0.5, float(out.amax.max()))
        ran += 1
    assert ran, "it took none of the cases"


@pytest.mark.parametrize("line", [*lines("norm_backward"), *lines("act_backward")])
def test_backwards(line: Line) -> None:
    """Gradients of fp32 tensors within the error of an fp32 sum of a row or a column, twice."""
    rows, cols = 65, 300
    dy, x, other = (torch.randn(rows, cols, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3))
    if line.verb == "act_backward":
        cases = [(dy, x, gate, activation) for gate in (None, other) for activation in ACTIVATIONS[1:]]
    else:
        weight = 1 + 0.1 * torch.randn(cols, generator=bits())
        norms = [Norm(weight, None, 1e-5, False), Norm(weight, 0.1 * weight, 1e-5, True)]
        stats = [(x.square().mean(1) + 1e-5).rsqrt(), (x.var(1, correction=0) + 1e-5).rsqrt()]
        cases = [(dy, x, stats[0], None, norms[0]), (dy, x, stats[1], x.mean(1), norms[1])]
    for case in cases:
        args = to(case, line.device)
        assert line.takes(*args)
        for got, want in zip(line.kernel.run(*args), line.reference(*args), strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                assert_near(got.cpu(), want, 2 * cols * 2.0**-24, f"{line.verb} {case[-1]}")


@pytest.mark.parametrize("line", lines("copy"))
def test_copy(line: Line) -> None:
    for x in (
        torch.arange(100_000.0),
        torch.randn(33, 70).bfloat16().t(),
        torch.empty(0, 7),
        torch.tensor([True, False]),
    ):
        given = x.to(line.device)
        assert line.takes(given)
        assert_same(line.kernel.run(given).cpu(), x.contiguous(), "copy")
