"""linear is quantize and then gemm, in one call of the dispatcher."""

from __future__ import annotations

import pytest
import torch

import fp8kernels
from fp8kernels.nn.inference import InferenceLinear
from fp8kernels.recipe import Role

ROLES = {
    "static": (Role("hif8", "static"), Role("hif8", "static")),
    "row": (Role("e4m3", "current", "row"), Role("e4m3", "current", "row")),
    "block128": (Role("e4m3", "current", "1x128"), Role("e5m2", "current", "128x128")),
}


def layer(kind: str, *, bias: bool = True) -> InferenceLinear:
    x_role, w_role = ROLES[kind]
    out = InferenceLinear(
        256,
        128,
        bias=bias,
        input_role=x_role,
        weight_role=w_role,
        input_target=fp8kernels.get_format(x_role.fmt).target,
    )
    w = fp8kernels.quantize(torch.randn(128, 256), w_role.fmt, block=w_role.block)
    out.weight_codes, out.weight_scale = w.codes, w.scale
    if kind == "static":
        out.input_scale.fill_(0.25)
    if bias:
        out.bias = torch.randn(128)
    return out.eval()


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("shape", [(1, 256), (2, 3, 256), (256,), (0, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_quantize_and_gemm(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inference = layer(kind)
    x = torch.randn(shape).to(dtype)
    scale = 0.25 if kind == "static" else None
    x_role, w_role = ROLES[kind]
    q = fp8kernels.quantize(x, x_role.fmt, block=x_role.block, scale=scale)
    w = fp8kernels.QTensor(
        inference.weight_codes,
        inference.weight_scale,
        fp8kernels.get_format(w_role.fmt),
        fp8kernels.get_block(w_role.block),
    )
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    wanted = fp8kernels.gemm(q, w, inference.bias, out_dtype=wide).to(dtype)
    found = inference(x)
    assert found.dtype == dtype
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ROLES)
def test_opcheck(kind: str) -> None:
    inference = layer(kind)
    x_role, w_role = ROLES[kind]
    arguments = (torch.randn(4, 256), inference.input_scale, x_role.fmt, x_role.block, 15.0, False)
    weight = (inference.weight_codes, inference.weight_scale, w_role.fmt, None, torch.bfloat16)
    torch.library.opcheck(torch.ops.fp8kernels.linear.default, (*arguments, *weight))


def test_it_compiles_whole() -> None:
    inference, x = layer("static"), torch.randn(3, 256, dtype=torch.bfloat16)
    compiled = torch.compile(inference, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), inference(x))


def test_a_forced_backend_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8KERNELS_BACKEND", "abacus")
    with pytest.raises(RuntimeError, match="no backend of that name"):
        layer("static")(torch.randn(1, 256))


def test_a_wrong_width_names_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 255\).*\(128, 256\)"):
        layer("static")(torch.randn(2, 255))


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 32, 33])
def test_the_one_call_has_the_bits_of_two(kind: str, isa: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8kernels import _cpu
    from fp8kernels.kernels.linear import cpu
    from fp8kernels.ops import linear

    order = ["portable", "avx2", "avx512"]
    if order.index(isa) > order.index(_cpu.detected_isa()):
        isa = _cpu.detected_isa()
    inference, calls = layer(kind), []
    one_call = cpu.linear
    monkeypatch.setattr(cpu, "linear", lambda *args: calls.append(args) or one_call(*args))
    monkeypatch.setattr(linear, "IN_ONE_CALL", True)
    before = _cpu.current_isa()
    try:
        _cpu.set_isa(isa)
        for x in (torch.randn(rows, 256), torch.zeros(rows, 256), torch.randn(256, rows).bfloat16().t()):
            got = inference(x)
            monkeypatch.setattr(linear, "IN_ONE_CALL", False)
            assert torch.equal(got, inference(x))
            monkeypatch.setattr(linear, "IN_ONE_CALL", True)
    finally:
        _cpu.set_isa(before)
    assert len(calls) == (3 if rows <= cpu.MOST_ROWS else 0)
