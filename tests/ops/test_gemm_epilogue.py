"""gemm with activation, residual and codes out: composed where no kernel takes it, and one meaning everywhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerance import bounded, epilogue_bound, exact
from torch import Tensor
from torch.nn import functional as F

import fp8kernels
from fp8kernels import QTensor, explain, gemm, quantize
from fp8kernels.formats import FORMATS, get_format
from fp8kernels.kernels.gemm import ACTIVATIONS, Epilogue, reference
from fp8kernels.kernels.quantize import Observer, Rounding
from fp8kernels.kernels.quantize import reference as quantize_reference
from fp8kernels.ops.gemm import kernel_args
from fp8kernels.scaling.block import TENSOR

OPS = torch.ops.fp8kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TORCH = {
    "none": lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def operands(m: int = 6, n: int = 40, k: int = 96) -> tuple[QTensor, QTensor, Tensor, Tensor]:
    x, w = quantize(torch.randn(m, k), "hif8", block="row"), quantize(torch.randn(n, k), "e4m3")
    return x, w, torch.randn(n), torch.randn(m, n)


def whole_numbers(m: int, n: int, k: int, fmt: str = "e4m3") -> tuple[QTensor, QTensor]:
    """Small whole numbers with scale 1: every sum is exact in fp32, so every backend has the same bits."""
    x, w = torch.randint(-4, 5, (m, k)).float(), torch.randint(-4, 5, (n, k)).float()
    return quantize(x, fmt, scale=1.0), quantize(w, fmt, scale=1.0)


def wanted(x: QTensor, w: QTensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tensor:
    """In float64."""
    y = x.dequantize().double() @ w.dequantize().double().T
    y = TORCH[activation](y if bias is None else y + bias.double())
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_numbers(activation: str, out_dtype: torch.dtype) -> None:
    x, w, bias, residual = operands()
    x64, w64 = reference.decoded(kernel_args(x, w)[0]), reference.decoded(kernel_args(x, w)[1])
    for b, r in itertools.product((None, bias), (None, residual.to(out_dtype))):
        got = gemm(x, w, b, out_dtype=out_dtype, activation=activation, residual=r)
        assert got.dtype == out_dtype
        epilogue = Epilogue(activation, r)
        want = reference.gemm(*kernel_args(x, w, b, out_dtype=torch.float32)[:3], torch.float64, epilogue)
        bounded(got, want, epilogue_bound(x64, w64, b, out_dtype, epilogue))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_torchs_function_in_float64(activation: str) -> None:
    x, w = whole_numbers(6, 40, 96)
    _, _, bias, residual = operands()
    args = (*kernel_args(x, w, bias)[:3], torch.float64, Epilogue(activation, residual))
    exact(reference.gemm(*args), wanted(x, w, bias, activation, residual))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_codes_are_those_of_quantize(fmt: str, activation: str) -> None:
    x, w = whole_numbers(7, 33, 50)
    bias, residual = torch.randint(-9, 9, (33,)).float(), torch.randint(-9, 9, (7, 33)).bfloat16()
    q = gemm(x, w, bias, activation=activation, residual=residual, out_fmt=fmt, out_scale=0.37)
    y = wanted(x, w, bias, activation, residual).float()
    want, stats = fp8kernels.quantize_with_stats(y, fmt, scale=0.37)
    assert q.fmt is want.fmt and q.block is TENSOR
    assert torch.equal(q.codes, want.codes) and torch.equal(q.scale, want.scale)
    product = (x.codes, x.scale, x.fmt.name, w.codes, w.scale, w.fmt.name, bias)
    codes, amax, counts = OPS.gemm_quantize(*product, activation, residual, torch.full((1, 1), 0.37), fmt)
    assert torch.equal(codes, want.codes)
    assert torch.equal(amax, stats.amax) and torch.equal(counts, stats.counts)


def test_a_kernel_notes_what_it_saw() -> None:
    """pending is raised and counters are added to, as by quantize; the reference and the composed form agree."""
    from fp8kernels.ops.epilogue import composed

    x, w = whole_numbers(7, 33, 50)
    y = wanted(x, w, None, "relu", None).float()
    how, scale = Rounding(get_format("hif8"), TENSOR, 15.0), torch.full((1, 1), 0.001)
    seen = []
    for run in (reference.gemm, composed, quantize_reference.quantize):
        observer = Observer(torch.ones(1), torch.full((4,), 5))
        if run is quantize_reference.quantize:
            out = run(y, scale, how, observer=observer)
        else:
            out = run(*kernel_args(x, w), Epilogue("relu", None, how, scale, observer))
        seen.append((*observer, out.codes, out.scale, out.amax, out.counts))
    for others in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], others, strict=True))
    assert seen[0][0] == y.max() and seen[0][1][1] > 5  # something saturated


def test_leading_dimensions() -> None:
    x, w = quantize(torch.randn(2, 3, 32), "hif8"), quantize(torch.randn(20, 32), "hif8")
    residual = torch.randn(2, 3, 40)[..., ::2]
    got = gemm(x, w, activation="relu", residual=residual, out_dtype=torch.float32)
    exact(got, gemm(x, w, out_dtype=torch.float32).relu() + residual)
    assert gemm(x, w, residual=residual, out_fmt="e5m2", out_scale=torch.tensor(0.5)).shape == (2, 3, 20)


@pytest.mark.parametrize("shapes", [((0, 16), (8, 16)), ((4, 16), (0, 16)), ((4, 0), (8, 0))])
def test_nothing(shapes: tuple) -> None:
    x, w = (quantize(torch.randn(shape), "e4m3") for shape in shapes)
    residual = torch.randn(shapes[0][0], shapes[1][0])
    exact(gemm(x, w, out_dtype=torch.float32, activation="gelu", residual=residual), residual)
    q = gemm(x, w, residual=residual, out_fmt="hif8", out_scale=1.0)
    assert torch.equal(q.codes, quantize(residual, "hif8", scale=1.0).codes)


def test_the_plain_form_is_the_plain_op() -> None:
    """No epilogue, no other op: a plain product is dispatched as ever."""
    x, w, bias, _ = operands()
    assert len(kernel_args(x, w, bias)) == 4
    called = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: object = None) -> object:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        gemm(x, w, bias)
        gemm(x, w, bias, activation="relu")
    assert [name for name in called if "fp8kernels" in name] == [
        "fp8kernels.gemm.default",
        "fp8kernels.gemm_epilogue.default",
    ]


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_bias_and_residual_get_their_gradients(out_dtype: torch.dtype) -> None:
    x, w, bias, residual = operands()
    bias, residual = bias.requires_grad_(), residual.bfloat16().requires_grad_()
    weights = torch.randn(6, 40)
    (gemm(x, w, bias, out_dtype=out_dtype, residual=residual).float() * weights).sum().backward()
    grad = weights.to(out_dtype)
    exact(bias.grad, grad.sum(0, dtype=torch.float32))
    assert residual.grad.dtype == torch.bfloat16
    exact(residual.grad, grad.bfloat16())


@pytest.mark.parametrize("rest", [{"activation": "silu"}, {"out_fmt": "hif8", "out_scale": 1.0}], ids=str)
def test_a_gradient_that_is_not_there_is_refused(rest: dict) -> None:
    x, w, bias, residual = operands()
    for b, r in ((bias.clone().requires_grad_(), None), (bias, residual.clone().requires_grad_())):
        with pytest.raises(ValueError, match=r"nothing is differentiable.*no_grad"):
            gemm(x, w, b, residual=r, **rest)
        with torch.no_grad():
            gemm(x, w, b, residual=r, **rest)
    product = (x.codes, x.scale, x.fmt.name, w.codes, w.scale, w.fmt.name, bias.requires_grad_(), torch.float32)
    with pytest.raises(RuntimeError, match="nothing is differentiable"):
        OPS.gemm_epilogue(*product, "silu", None).sum().backward()


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ({"activation": "tanh"}, r"'tanh'.*'gelu_tanh'"),
        ({"residual": torch.zeros(6, 41)}, r"\(6, 41\).*\(6, 40\)"),
        ({"residual": torch.zeros(6, 40, dtype=torch.float64)}, "float64"),
        ({"residual": torch.zeros(6, 40, device="meta")}, "different devices"),
        ({"out_fmt": "hif8"}, r"needs out_scale.*quantize"),
        ({"out_fmt": "hif9", "out_scale": 1.0}, "unknown format 'hif9'"),
        ({"out_fmt": "hif8", "out_scale": torch.ones(3)}, r"\(3,\)"),
        ({"out_fmt": "hif8", "out_scale": 0.0}, "positive"),
        ({"out_scale": 1.0}, "without out_fmt"),
    ],
    ids=str,
)
def test_bad_input(rest: dict, says: str) -> None:
    x, w, bias, _ = operands()
    with pytest.raises(ValueError, match=says):
        gemm(x, w, bias, **rest)


def test_explain_tells_of_the_composed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, bias, residual = operands()
    said = explain("gemm", x, w, bias, activation="silu", residual=residual)
    assert said.kernel == "composed"
    reasons = dict(said)
    assert "epilogue" in reasons["cpu"] and "composes" in reasons["reference"]
    assert explain("gemm", x, w, out_fmt="hif8", out_scale=1.0).kernel == "composed"
    assert explain("gemm", x, w, bias).kernel == "cpu"
    monkeypatch.setenv("FP8KERNELS_BACKEND", "reference")
    assert explain("gemm", x, w, bias, activation="silu").kernel == "reference"
    want = reference.gemm(*kernel_args(x, w, bias, activation="silu"))
    assert torch.equal(gemm(x, w, bias, activation="silu"), want)


def test_it_compiles_whole() -> None:
    def layer(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        qx, qw = quantize(x, "hif8"), quantize(w, "e4m3", block="row")
        y = gemm(qx, qw, bias, activation="gelu", residual=residual)
        return y, gemm(qx, qw, bias, activation="relu", out_fmt="hif8", out_scale=0.25).codes

    args = torch.randn(9, 64), torch.randn(24, 64), torch.randn(24), torch.randn(9, 24)
    for got, want in zip(torch.compile(layer, fullgraph=True, backend="aot_eager")(*args), layer(*args), strict=True):
        assert torch.equal(got, want)
