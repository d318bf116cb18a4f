"""The producers of codes against their float64 definitions: every backend of the table that runs here."""

from __future__ import annotations

import itertools

import pytest
import torch
from intervals import act_gradients, active, coded_between, norm_gradients, normal, rounded
from tolerance import UNIT, bounded
from torch import Tensor
from torch.nn import functional as F

import fp8kernels
from fp8kernels import FORMATS, explain, get_block, quantize
from fp8kernels.kernels.act_backward.reference import slope
from fp8kernels.kernels.act_quantize.reference import activate
from fp8kernels.kernels.norm_quantize import Norm
from fp8kernels.kernels.norm_quantize.reference import normalise
from fp8kernels.kernels.quantize import Observer, Rounding
from fp8kernels.ops.table import TABLE, Kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (1, 128), (7, 128), (3, 17), (5, 384), (128, 128), (2, 1024))
BLOCKS = ("tensor", "row", "1x128", "128x128")
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")
ROUNDED = {"cpu"}  # composed: y passes through a tensor of x's dtype


def fits(shape: tuple[int, int], block: str) -> bool:
    """Whether a block divides a shape."""
    rows, cols = get_block(block).rows or 1, get_block(block).cols or 1
    return not shape[0] % rows and not shape[1] % cols


PAIRS = [pair for pair in itertools.product(SHAPES, BLOCKS) if fits(*pair)]
TURNS = itertools.cycle(itertools.product(FORMATS.values(), DTYPES))
CASES = [(*pair, dtype, fmt) for pair, (fmt, dtype) in zip(PAIRS, TURNS, strict=False)]


def kernels(verb: str, *args: object, **kwargs: object) -> list[Kernel]:
    """The kernels of a verb that run on these arguments; at least the reference."""
    found = [kernel for kernel in TABLE[verb] if kernel.why_not(*args, **kwargs) is None]
    assert found[-1].name == "reference"
    return found


def norms(depth: int, *, seed: int = 3) -> dict[str, Norm]:
    torch.manual_seed(seed)
    weight, bias = torch.randn(depth), torch.randn(depth)
    return {
        "rms": Norm(weight, None, 1e-6, center=False),
        "rms, weight - 1 in bf16": Norm((weight - 1).bfloat16(), None, 1e-5, center=False, offset=1.0),
        "rms, no weight": Norm(None, None, 1e-6, center=False),
        "rms with a bias": Norm(weight, bias, 1e-6, center=False),
        "layer": Norm(weight, bias, 1e-5, center=True),
        "layer in fp16": Norm(weight.half(), bias.half(), 1e-5, center=True),
        "layer, weight only": Norm(weight, None, 1e-5, center=True),
        "layer, plain": Norm(None, None, 1e-5, center=True),
    }


def given_scales(shape: tuple[int, int], block: str) -> list[Tensor]:
    grid = get_block(block).grid(*shape)
    return [torch.zeros(grid), torch.full(grid, 0.11)]


@pytest.mark.parametrize("kind", norms(1))
def test_norm_quantize(kind: str) -> None:
    ran = set()
    for shape, block, dtype, fmt in CASES:
        x = (torch.randn(shape) * 3 + 0.5).to(dtype)
        norm = norms(shape[1])[kind]
        how = Rounding(fmt, get_block(block), fmt.target)
        want = normal(x, norm)
        for given in given_scales(shape, block):
            for kernel in kernels("norm_quantize", x, given, norm, how):
                ran.add(kernel.name)
                seen = Observer(torch.zeros(1), torch.zeros(4, dtype=torch.int64))
                out = kernel.run(x, given, norm, how, transpose=True, observer=seen)
                error = want.y_error
                if kernel.name in ROUNDED:
                    error = rounded(want.y, error, dtype)
                coded_between(out.quantized, want.y, error, given, how)
                assert torch.equal(out.quantized.codes_t, out.quantized.codes.t())
                assert torch.equal(seen.counters, out.quantized.counts)
                assert seen.pending == out.quantized.amax.max()
                bounded(out.rstd, want.rstd[:, 0], want.rstd_error[:, 0])
                if norm.center:
                    bounded(out.mean, want.mean[:, 0], want.mean_error[:, 0])
                else:
                    assert out.mean is None
    assert ran >= ({"reference"} if kind == "rms with a bias" else {"reference", "cpu"})


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
def test_act_quantize(activation: str, *, gated: bool) -> None:
    for shape, block, dtype, fmt in CASES:
        x, other = (torch.randn(shape) * 4).to(dtype), torch.randn(shape).to(dtype) if gated else None
        how = Rounding(fmt, get_block(block), fmt.target)
        y, y_error = active(x, other, activation)
        for given in given_scales(shape, block):
            for kernel in kernels("act_quantize", x, other, activation, given, how):
                seen = Observer(torch.zeros(1), torch.zeros(4, dtype=torch.int64))
                out = kernel.run(x, other, activation, given, how, transpose=True, observer=seen)
                error = y_error
                if kernel.name in ROUNDED:  # the activation is rounded, then the product
                    error = rounded(y, error + UNIT[dtype] * y.abs(), dtype)
                    error = error + 2.0**-24 * (1 if other is None else other.double().abs())  # subnormal in fp16
                coded_between(out, y, error, given, how)
                assert torch.equal(out.codes_t, out.codes.t())
                assert torch.equal(seen.counters, out.counts)


@pytest.mark.parametrize("kind", norms(1))
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_norm_backward(kind: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x, dy = (torch.randn(shape) * 3 + 0.5).to(dtype), torch.randn(shape).to(dtype)
        norm = norms(shape[1])[kind]
        values, errors = norm_gradients(dy, x, norm)
        _, rstd, mean = normalise(x.float(), norm)
        for kernel in kernels("norm_backward", dy, x, rstd, mean, norm):
            out = kernel.run(dy, x, rstd, mean, norm)
            for got, want, error, like in zip(out, values, errors, (x, norm.weight, norm.bias), strict=True):
                assert (got is None) == (like is None)
                if got is not None:
                    assert got.dtype == like.dtype
                    bounded(got, want, rounded(want, error, like.dtype))


@pytest.mark.parametrize("kind", norms(1))
def test_the_formula_of_the_backward_is_autograds(kind: str) -> None:
    """The float64 values that the kernels are held to, against autograd through the float64 norm."""
    norm = norms(48)[kind]
    x, dy = torch.randn(6, 48).double().requires_grad_(), torch.randn(6, 48).double()
    vectors = [None if v is None else v.double().requires_grad_() for v in norm[:2]]
    y, _, _ = normalise(x, norm._replace(weight=vectors[0], bias=vectors[1]))
    y.backward(dy)
    values, _ = norm_gradients(dy, x.detach(), norm)
    for value, tensor in zip(values, (x, *vectors), strict=True):
        if tensor is not None:
            torch.testing.assert_close(value, tensor.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
def test_act_backward(activation: str, dtype: torch.dtype, *, gated: bool) -> None:
    for shape in SHAPES:
        x, dy = (torch.randn(shape) * 4).to(dtype), torch.randn(shape).to(dtype)
        other = torch.randn(shape).to(dtype) if gated else None
        values, errors = act_gradients(dy, x, other, activation)
        for kernel in kernels("act_backward", dy, x, other, activation):
            out = kernel.run(dy, x, other, activation)
            for got, want, error in zip(out[: 1 + gated], values[: 1 + gated], errors[: 1 + gated], strict=True):
                assert got.dtype == dtype
                bounded(got, want, rounded(want, error, dtype))
            assert gated or out[1] is None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_far_out_and_at_zero(activation: str) -> None:
    x = torch.tensor([-80.0, -9.0, -0.0, 0.0, 9.0, 80.0]).double().requires_grad_()
    wanted = torch.autograd.grad(activate(x, activation).sum(), x)[0]
    torch.testing.assert_close(slope(x.detach(), activation), wanted, rtol=1e-12, atol=1e-12)


def test_a_row_with_nan_or_inf_stays_alone() -> None:
    x = torch.randn(4, 64)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    how = Rounding(FORMATS["hif8"], get_block("row"), 15.0)
    for kernel in kernels("norm_quantize", x, torch.zeros(4, 1), norms(64)["rms"], how):
        seen = Observer(torch.full((1,), 0.5), torch.zeros(4, dtype=torch.int64))
        out = kernel.run(x, torch.zeros(4, 1), norms(64)["rms"], how, observer=seen).quantized
        assert out.amax.isfinite().tolist() == [[True], [False], [False], [True]]
        assert seen.pending == 0.5  # a maximum that is not finite raises nothing
        assert seen.counters[3] >= 65
        assert (out.codes[1] == FORMATS["hif8"].nan_code).all()


@pytest.mark.parametrize("block", ["tensor", "row", "1x128"])
def test_the_verbs_are_norms_and_activations_then_quantize(block: str) -> None:
    """On fp32 the composed kernel is torch's norm or activation and quantize, to the bit."""
    x, up, weight, bias = torch.randn(3, 4, 256), torch.randn(3, 4, 256), torch.randn(256), torch.randn(256)
    pairs = [
        (fp8kernels.rms_norm_quantize(x, weight, 1e-6, "hif8", block=block), F.rms_norm(x, (256,), weight, 1e-6)),
        (
            fp8kernels.layer_norm_quantize(x, weight, bias, 1e-6, "hif8", block=block),
            F.layer_norm(x, (256,), weight, bias, 1e-6),
        ),
        (fp8kernels.swiglu_quantize(x, up, "hif8", block=block), F.silu(x) * up),
        (fp8kernels.activation_quantize(x, "gelu", "hif8", block=block), F.gelu(x)),
    ]
    for q, y in pairs:
        want = quantize(y, "hif8", block=block)
        assert torch.equal(q.codes, want.codes) and torch.equal(q.scale, want.scale)
        assert (q.shape, q.block.name) == (x.shape, block)


def test_the_verbs_take_scales_strides_and_nothing() -> None:
    x, weight = torch.randn(6, 512)[:, ::2], torch.randn(256)
    q = fp8kernels.rms_norm_quantize(x, weight, 1e-6, "e4m3", scale=0.25, transpose=True)
    assert q.scale.item() == 0.25
    assert torch.equal(q.t().codes, q.codes.t())
    assert torch.equal(q.codes, fp8kernels.rms_norm_quantize(x.contiguous(), weight, 1e-6, "e4m3", scale=0.25).codes)
    for empty in (torch.randn(0, 256), torch.randn(2, 0, 256)):
        assert fp8kernels.rms_norm_quantize(empty, weight, 1e-6, "e4m3").shape == empty.shape
        assert fp8kernels.swiglu_quantize(empty, empty, "hif8", block="row").shape == empty.shape


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda x: fp8kernels.rms_norm_quantize(x.double(), None, 1e-6, "hif8"), TypeError, "float64.*float"),
        (lambda x: fp8kernels.rms_norm_quantize(x, torch.ones(15), 1e-6, "hif8"), ValueError, r"weight is \(15,\)"),
        (lambda x: fp8kernels.layer_norm_quantize(x, None, torch.ones(1), 1e-6, "hif8"), ValueError, r"bias is \(1,\)"),
        (lambda x: fp8kernels.swiglu_quantize(x, x[:1], "hif8"), ValueError, r"gate is \(4, 16\) and up \(1, 16\)"),
        (lambda x: fp8kernels.activation_quantize(x, "tanh", "hif8"), ValueError, "'tanh'.*'gelu'"),
        (lambda x: fp8kernels.activation_quantize(x, "gelu", "hif8", block="1x128"), ValueError, "does not divide"),
        (lambda x: fp8kernels.activation_quantize(x, "gelu", "hif7"), ValueError, "did you mean 'hif8'"),
        (lambda x: fp8kernels.swiglu_quantize(x, x.to("meta"), "hif8"), ValueError, "different devices"),
    ],
)
def test_bad_input(call, error: type[Exception], says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=says):
        call(torch.randn(4, 16))


def test_explain_knows_the_public_names() -> None:
    x = torch.randn(4, 256)
    said = explain("rms_norm_quantize", x, torch.ones(256), 1e-6, "hif8", block="1x128")
    assert [row.name for row in said] == [kernel.name for kernel in TABLE["norm_quantize"]]
    assert explain("layer_norm_quantize", x, None, None, 1e-6, "e4m3").kernel == "cpu"
    assert explain("swiglu_quantize", x, x, "hif8").kernel == "cpu"
    assert explain("activation_quantize", x, "gelu", "hif8").kernel == "cpu"
