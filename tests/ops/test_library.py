"""The ops as torch sees them: opcheck, fakes, torch.compile, dispatch."""

from __future__ import annotations

import re

import pytest
import torch

import fp8kernels
from fp8kernels import explain, gemm, quantize
from fp8kernels.ops.table import TABLE, choose

OPS = torch.ops.fp8kernels


def operand(rows: int, cols: int, fmt: str = "hif8", block: str = "tensor") -> tuple[torch.Tensor, torch.Tensor, str]:
    q = quantize(torch.randn(rows, cols), fmt, block=block)
    return q.codes, q.scale, fmt


HOW = ("hif8", "row", 15.0, 0, False, True)
CASES = {
    "quantize": lambda: (torch.randn(3, 5, 16), torch.zeros(15, 1), *HOW, False),
    "quantize_transpose": lambda: (torch.randn(6, 16).bfloat16(), torch.zeros(6, 1), *HOW, True),
    "quantize_carrier": lambda: (torch.randn(6, 16), torch.zeros(6, 1), *HOW, True, 4),
    "quantize_empty": lambda: (torch.randn(0, 16), torch.zeros(0, 1), *HOW, False),
    "quantize_observed": lambda: (
        torch.randn(3, 16),
        torch.zeros(3, 1),
        torch.zeros(1),
        torch.zeros(4, dtype=torch.int64),
        *HOW,
        False,
    ),
    "quantize_observed_carrier": lambda: (
        torch.randn(3, 16),
        torch.zeros(3, 1),
        torch.zeros(1),
        torch.zeros(4, dtype=torch.int64),
        *HOW,
        True,
        4,
    ),
    "dequantize": lambda: (*operand(4, 16), torch.bfloat16),
    "gemm": lambda: (
        *operand(4, 16),
        *operand(8, 16, "e4m3", "row"),
        torch.randn(8, requires_grad=True),
        torch.float32,
    ),
    "product": lambda: (*operand(4, 16), *operand(8, 16), torch.randn(8), torch.float32),
    "gemm_no_bias": lambda: (*operand(4, 16), *operand(8, 16), None, torch.bfloat16),
    "gemm_epilogue": lambda: (
        *operand(4, 16),
        *operand(8, 16, "e4m3", "row"),
        torch.randn(8, requires_grad=True),
        torch.float32,
        "none",
        torch.randn(4, 8).bfloat16().requires_grad_(),
    ),
    "gemm_quantize": lambda: (
        *operand(4, 16),
        *operand(8, 16),
        None,
        "silu",
        torch.randn(4, 8),
        torch.full((1, 1), 0.25),
        "hif8",
    ),
    "linear": lambda: (
        torch.randn(4, 16),
        torch.zeros(1, 1),
        "hif8",
        "tensor",
        15.0,
        False,
        *operand(8, 16),
        None,
        torch.bfloat16,
    ),
    "fake_quantize": lambda: (
        torch.randn(4, 16, requires_grad=True),
        torch.zeros(1, 1),
        "e4m3",
        "tensor",
        448.0,
        0,
        False,
        True,
    ),
    "norm_quantize": lambda: (
        torch.randn(2, 3, 16),
        torch.zeros(6, 1),
        torch.randn(16),
        torch.randn(16),
        1e-6,
        True,
        0.0,
        *HOW,
        True,
    ),
    "norm_quantize_observed": lambda: (
        torch.randn(6, 16).bfloat16(),
        torch.zeros(6, 1),
        torch.zeros(1),
        torch.zeros(4, dtype=torch.int64),
        torch.randn(16),
        None,
        1e-6,
        False,
        1.0,
        *HOW,
        False,
    ),
    "norm_backward": lambda: (
        torch.randn(6, 16),
        torch.randn(6, 16),
        torch.rand(6),
        None,
        torch.randn(16),
        None,
        1e-6,
        False,
        0.0,
    ),
    "act_quantize": lambda: (torch.randn(6, 16), torch.zeros(6, 1), torch.randn(6, 16), "silu", *HOW, True),
    "act_quantize_observed": lambda: (
        torch.randn(2, 3, 16),
        torch.zeros(6, 1),
        torch.zeros(1),
        torch.zeros(4, dtype=torch.int64),
        None,
        "gelu",
        *HOW,
        False,
    ),
    "act_backward": lambda: (torch.randn(6, 16), torch.randn(6, 16).half(), torch.randn(6, 16), "gelu_tanh"),
    "commit": lambda: (
        [torch.rand(3, 8), torch.zeros(3, 8)],
        [torch.rand(3), torch.zeros(3)],
        [torch.rand(3), torch.zeros(3)],
        [torch.ones(3), torch.ones(3)],
        "max",
        0,
        False,
        0.9,
    ),
    "copy": lambda: (torch.randn(3, 4),),
    "decode_attention": lambda: (
        torch.randn(2, 4, 1, 16),
        *(torch.randint(0, 99, (2, 2, 9, 16), dtype=torch.uint8), torch.rand(2, 2)) * 2,
        "hif8",
        0.25,
        torch.rand(2, 1, 1, 9) < 0.5,
    ),
}


def op_of(case: str) -> str:
    return re.sub("_(transpose|carrier|no_bias|empty)$", "", case)


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    torch.library.opcheck(getattr(OPS, op_of(case)).default, CASES[case]())


def test_there_is_an_opcheck_for_every_op() -> None:
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fp8kernels::")}
    assert defined <= {op_of(case) for case in CASES}


@pytest.mark.parametrize("block", ["tensor", "row", "1x128"])
def test_verbs_compile_whole(block: str) -> None:
    def product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return gemm(quantize(x, "hif8", block=block), quantize(w, "e4m3"), bias).relu()

    args = torch.randn(9, 256), torch.randn(24, 256), torch.randn(24)
    torch.testing.assert_close(torch.compile(product, fullgraph=True)(*args), product(*args), rtol=0, atol=0)


def test_meta_tensors_flow_through() -> None:
    codes, _, scale, *_ = OPS.quantize(
        torch.empty(4, 256, device="meta"),
        torch.zeros(4, 2, device="meta"),
        "e4m3",
        "1x128",
        448.0,
        0,
        False,
        True,
        False,
    )
    assert (codes.shape, codes.dtype, scale.shape) == ((4, 256), torch.uint8, (4, 2))


def test_gemm_gives_the_bias_its_gradient() -> None:
    bias = torch.zeros(8, requires_grad=True)
    x, w = quantize(torch.randn(2, 3, 16), "hif8"), quantize(torch.randn(8, 16), "hif8")
    gemm(x, w, bias, out_dtype=torch.float32).sum().backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [6.0] * 8


@pytest.mark.parametrize(
    ("x", "w", "bias", "says"),
    [
        ((4, 16), (8, 17), None, r"\(4, 16\) and w \(8, 17\) do not multiply"),
        ((4, 16), (8, 16), torch.zeros(4), r"shape \(4,\).*\(8,\)"),
        ((4, 16), (8, 16), torch.zeros(8, dtype=torch.float64), "float64"),
        ((4, 16), (8, 16), torch.zeros(8, device="meta"), "different devices"),
    ],
)
def test_gemm_refuses(x: tuple, w: tuple, bias: torch.Tensor | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        gemm(quantize(torch.randn(x), "hif8"), quantize(torch.randn(w), "hif8"), bias)


def test_gemm_refuses_plain_tensors_and_dtypes() -> None:
    q = quantize(torch.randn(4, 16), "hif8")
    with pytest.raises(TypeError, match=r"w is Tensor.*fp8kernels\.quantize"):
        gemm(q, torch.randn(4, 16))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float64"):
        gemm(q, q, out_dtype=torch.float64)


@pytest.mark.parametrize("shapes", [((0, 16), (8, 16)), ((4, 16), (0, 16)), ((4, 0), (8, 0)), ((2, 0, 16), (8, 16))])
def test_gemm_of_nothing(shapes: tuple) -> None:
    x, w = (quantize(torch.randn(shape), "e4m3") for shape in shapes)
    bias = torch.randn(shapes[1][0])
    out = gemm(x, w, bias, out_dtype=torch.float32)
    assert out.shape == (*shapes[0][:-1], shapes[1][0])
    assert torch.equal(out, bias.expand_as(out))


def test_a_forced_backend_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 16)
    monkeypatch.setenv("FP8KERNELS_BACKEND", "reference")
    assert explain("quantize", x, "hif8").kernel == "reference"
    quantize(x, "hif8")
    monkeypatch.setenv("FP8KERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match=r"no kernel can run copy[\s\S]*cuda: "):
        fp8kernels.copy(x)
    monkeypatch.setenv("FP8KERNELS_BACKEND", "abacus")
    with pytest.raises(RuntimeError, match="quantize has no backend of that name"):
        quantize(x, "hif8")


def test_explain_names_every_kernel() -> None:
    q = quantize(torch.randn(4, 16), "hif8")
    said = explain("gemm", q, q)
    assert [row.name for row in said] == [kernel.name for kernel in TABLE["gemm"]]
    assert str(said).startswith(f"gemm: {said.kernel}")
    with pytest.raises(ValueError, match="unknown verb 'gem'"):
        explain("gem")


@pytest.mark.parametrize("verb", TABLE)
def test_the_reference_stands_last_and_takes_everything(verb: str) -> None:
    assert TABLE[verb][-1].name == "reference"
    assert choose("copy", torch.ones(1)).why_not(torch.ones(1)) is None
