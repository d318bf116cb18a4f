"""The NVIDIA lines of the fused producers and of the streaming gemm without a GPU.

What they do not take, in words; what their launchers hand to the compiled module, recorded by one that stands in for
it; and, where the C++ tests were built, the tests of tests/gpu on the kernels themselves, run on the host.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8kernels.formats import E4M3, HIF8
from fp8kernels.kernels import cuda
from fp8kernels.kernels.act_backward import cuda as act_backward
from fp8kernels.kernels.act_quantize import cuda as act_quantize
from fp8kernels.kernels.gemm import ACTIVATIONS, PLAIN, Epilogue, Operand
from fp8kernels.kernels.gemm import cuda as gemm
from fp8kernels.kernels.gemm import stream as gemm_stream
from fp8kernels.kernels.norm_backward import cuda as norm_backward
from fp8kernels.kernels.norm_quantize import Norm
from fp8kernels.kernels.norm_quantize import cuda as norm_quantize
from fp8kernels.kernels.quantize import Observer, Rounding
from fp8kernels.kernels.quantize import cuda as quantize
from fp8kernels.scaling.block import BLOCK_128X128, ROW, TENSOR

ROOT = Path(__file__).parents[2]
HOW = Rounding(E4M3, TENSOR, 448.0)
RMS = Norm(torch.ones(8), None, 1e-5, center=False)
ONE = torch.zeros(1, 1)
STREAM, PROCESSORS, NEEDED = 7, 132, 64


def operand(rows: int, cols: int, *, scales: tuple[int, int] = (1, 1)) -> Operand:
    return Operand(torch.zeros(rows, cols, dtype=torch.uint8), torch.ones(scales), E4M3)


class Recorder:
    """Stands in for fp8kernels._cuda: notes the calls; a workspace has NEEDED bytes, all else gives an error or 0."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[Any, ...]] = {}
        self.error = 0

    def __getattr__(self, name: str) -> Any:
        def entry(*args: Any) -> int:
            self.calls[name] = args
            return NEEDED if name.endswith("_workspace") else self.error

        return entry

    def error_string(self, error: int) -> str:
        return f"error {error} in words"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    for module in (quantize, norm_quantize, norm_backward, act_quantize, act_backward, gemm, cuda):
        monkeypatch.setattr(module, "_cuda", made)
    monkeypatch.setattr(cuda, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "stream", lambda device: STREAM)
    monkeypatch.setattr(cuda, "processors", lambda device: PROCESSORS)
    monkeypatch.setattr(cuda, "workspace", lambda device: torch.zeros(6, dtype=torch.int64))
    return made


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_that_are_not_on_a_gpu(device: str) -> None:
    x, row = torch.zeros(4, 8, device=device), torch.zeros(4, device=device)
    scale, norm = ONE.to(device), Norm(torch.ones(8, device=device), None, 1e-5, center=False)
    product = Operand(x.byte(), scale, E4M3)
    for reason in (
        norm_quantize.why_not(x, scale, norm, HOW),
        norm_backward.why_not(x, x, row, None, norm),
        act_quantize.why_not(x, x, "silu", scale, HOW),
        act_backward.why_not(x, x, None, "gelu"),
        gemm_stream.why_not(product, product, None, torch.bfloat16),
    ):
        if reason is None:
            assert cuda.EMULATED and device == "cpu"
        else:
            assert "does not load" in reason or "no GPU" in reason or f"is on {device}" in reason


def test_what_the_producers_do_not_take() -> None:
    x, none, how = torch.zeros(128, 8), torch.zeros(0, 8), Rounding(E4M3, BLOCK_128X128, 448.0)
    assert norm_quantize.unfit(x, ONE, RMS, HOW, None) is None
    assert act_quantize.unfit(x.half(), x, ONE, HOW, None) is None
    for reason, said in (
        (
            norm_quantize.unfit(x, ONE, RMS._replace(weight=torch.ones(8).double()), HOW, None),
            "weight is torch.float64",
        ),
        (norm_quantize.unfit(x, ONE, RMS._replace(bias=torch.ones(9)), HOW, None), "bias is [9]"),
        (norm_quantize.unfit(x, ONE, RMS, how, None), "the block is '128x128'"),
        (norm_quantize.unfit(none, ONE, RMS, HOW, None), "no elements"),
        (norm_quantize.unfit(x.double(), ONE, RMS, HOW, None), "x is torch.float64"),
        (act_quantize.unfit(x, x.double(), ONE, HOW, None), "other is torch.float64"),
        (act_quantize.unfit(x, x[:1], ONE, HOW, None), "other is [1, 8]"),
        (act_quantize.unfit(x, None, ONE, how, None), "the block is '128x128'"),
        (act_quantize.unfit(none, None, ONE, HOW, None), "no elements"),
        (act_quantize.unfit(x, None, ONE.half(), HOW, None), "scale is torch.float16"),
    ):
        assert reason is not None and said in reason


def test_what_the_backwards_do_not_take() -> None:
    x, rstd = torch.zeros(4, 8), torch.zeros(4)
    long = torch.zeros(1, norm_backward.LONGEST_ROW + 1)
    assert norm_backward.unfit(x, x, rstd, None, RMS) is None
    assert act_backward.unfit(x.bfloat16(), x, x) is None
    for reason, said in (
        (norm_backward.unfit(x, x.double(), rstd, None, RMS), "x is torch.float64"),
        (norm_backward.unfit(x, x, rstd.half(), None, RMS), "rstd is torch.float16"),
        (norm_backward.unfit(x, x, rstd, rstd.double(), RMS), "mean is torch.float64"),
        (norm_backward.unfit(x[:1], x, rstd, None, RMS), "dy is [1, 8]"),
        (norm_backward.unfit(x[:0], x[:0], rstd, None, RMS), "no elements"),
        (norm_backward.unfit(long, long, rstd, None, RMS), "16384 elements at most"),
        (act_backward.unfit(x.double(), x, None), "dy is torch.float64"),
        (act_backward.unfit(x, x, x[:1]), "other is [1, 8]"),
        (act_backward.unfit(x[:0], x[:0], None), "no elements"),
    ):
        assert reason is not None and said in reason


def test_what_the_streaming_gemm_does_not_take() -> None:
    x, w = operand(64, 32), operand(8, 32)

    def unfit(
        x: Operand = x, w: Operand = w, out: torch.dtype = torch.float16, epilogue: Epilogue = PLAIN
    ) -> str | None:
        return gemm_stream.unfit(x, w, None, out, epilogue)

    assert unfit() is None
    assert unfit(operand(64, 32, scales=(64, 1)), w._replace(fmt=HIF8)) is None
    for reason, said in (
        (unfit(operand(65, 32)), "65 rows: this kernel takes 64"),
        (unfit(w=w._replace(codes=torch.zeros(32, 8, dtype=torch.uint8).t())), "strides [1, 8]"),
        (unfit(w=w._replace(scale=torch.ones(1, 4))), "the scales are [1, 1] and [1, 4]"),
        (unfit(w=w._replace(scale=torch.ones(1, 1).half())), "with torch.float16 scales"),
        (unfit(out=torch.float64), "out is torch.float64"),
        (unfit(epilogue=Epilogue(residual=torch.zeros(64, 8).double())), "residual is torch.float64"),
        (unfit(epilogue=Epilogue(rounding=HOW)), "one scale that is given"),
        (unfit(epilogue=Epilogue(rounding=Rounding(E4M3, ROW, 448.0), scale=ONE)), "one scale that is given"),
    ):
        assert reason is not None and said in reason


def test_norm_quantize_hands_over(recorder: Recorder) -> None:
    x, weight, bias = torch.zeros(3, 16)[:, :8], torch.ones(8), torch.zeros(8).bfloat16()
    observer = Observer(torch.zeros(1), torch.zeros(4, dtype=torch.int64))
    norm = Norm(weight, bias, 1e-6, center=True, offset=1.0)
    out = norm_quantize.norm_quantize(x, ONE, norm, HOW, transpose=True, observer=observer)
    arguments, *rest = recorder.calls["norm_quantize"]
    assert arguments[:5] == (x.data_ptr(), 0, 3, 8, 16)  # not copied
    assert out.mean is not None and out.quantized.codes_t is not None
    assert rest == [weight.data_ptr(), 0, bias.data_ptr(), 1, 1e-6, 1.0, True, out.rstd.data_ptr(), out.mean.data_ptr()]
    assert arguments[11] == out.quantized.codes_t.data_ptr() and arguments[13] == observer.pending.data_ptr()
    plain = norm_quantize.norm_quantize(x.t().contiguous().t(), ONE, Norm(None, None, 1e-6, center=False), HOW)
    arguments, *rest = recorder.calls["norm_quantize"]
    assert arguments[4] == 8  # its rows were not contiguous
    assert plain.mean is None and rest == [0, 0, 0, 0, 1e-6, 0.0, False, plain.rstd.data_ptr(), 0]


def test_norm_backward_hands_over(recorder: Recorder) -> None:
    dy, x = torch.zeros(3, 8).half(), torch.zeros(3, 16).bfloat16()[:, :8]
    rstd, mean, weight, bias = torch.ones(3), torch.zeros(3), torch.ones(8).bfloat16(), torch.zeros(8)
    norm = Norm(weight, bias, 1e-5, center=True, offset=1.0)
    dx, dweight, dbias = norm_backward.norm_backward(dy, x, rstd, mean, norm)
    assert dweight is not None and dbias is not None
    assert (dx.dtype, dweight.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    matrices = dy.data_ptr(), 2, 8, x.data_ptr(), 1, 16
    vectors = rstd.data_ptr(), mean.data_ptr(), weight.data_ptr(), 1, 1.0
    wanted = 3, 8, *matrices, *vectors, dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr(), 0, PROCESSORS
    arguments, workspace, stream = recorder.calls["norm_backward"]
    assert arguments == wanted and stream == STREAM and workspace != 0
    assert recorder.calls["norm_backward_workspace"] == (wanted,)
    dx, dweight, dbias = norm_backward.norm_backward(dy, x, rstd, None, Norm(None, None, 1e-5, center=False))
    assert dweight is None and dbias is None
    assert recorder.calls["norm_backward"][0][9:17] == (0, 0, 0, 0.0, dx.data_ptr(), 0, 0, 0)


def test_activations_hand_over(recorder: Recorder) -> None:
    dy, x, other = torch.zeros(3, 8), torch.zeros(3, 16).half()[:, :8], torch.zeros(3, 8).bfloat16()
    act_quantize.act_quantize(x, other, "silu", ONE, HOW)
    arguments, *rest = recorder.calls["act_quantize"]
    assert arguments[:5] == (x.data_ptr(), 2, 3, 8, 16) and rest == [ACTIVATIONS.index("silu"), other.data_ptr(), 1, 8]
    act_quantize.act_quantize(x, None, "gelu", ONE, HOW)
    assert recorder.calls["act_quantize"][1:] == (ACTIVATIONS.index("gelu"), 0, 0, 0)
    dx, dother = act_backward.act_backward(dy, x, other, "relu")
    matrices = (dy.data_ptr(), 0, 8), (x.data_ptr(), 2, 16), (other.data_ptr(), 1, 8)
    assert dother is not None and (dx.dtype, dother.dtype) == (torch.float16, torch.bfloat16)
    outputs = dx.data_ptr(), dother.data_ptr()
    assert recorder.calls["act_backward"] == (3, 8, 1, *matrices, *outputs, PROCESSORS, STREAM)
    dx, dother = act_backward.act_backward(dy, x, None, "relu")
    assert dother is None and recorder.calls["act_backward"][5:8] == ((0, 0, 0), dx.data_ptr(), 0)


def test_the_streaming_gemm_hands_over(recorder: Recorder) -> None:
    codes: Tensor = torch.zeros(32, 4, dtype=torch.uint8).t()  # not K-major
    x, w = Operand(codes, torch.ones(4, 1), E4M3), operand(8, 40)._replace(fmt=HIF8)
    w = w._replace(codes=w.codes[:, :32])
    out = gemm_stream.gemm(x, w, None, torch.bfloat16)
    assert isinstance(out, Tensor) and "gemm" not in recorder.calls
    arguments, processors, workspace, stream = recorder.calls["gemm_stream"]
    assert recorder.calls["gemm_stream_workspace"] == (arguments, processors)
    assert (processors, stream) == (PROCESSORS, STREAM) and workspace != 0
    assert arguments["shape"] == (4, 8, 32) and arguments["out"] == (out.data_ptr(), 1)
    assert arguments["x"][0] != codes.data_ptr() and arguments["x"][1:3] == (32, E4M3.code_id)
    assert arguments["w"] == (w.codes.data_ptr(), 40, HIF8.code_id, w.scale.data_ptr(), False)


def test_errors_in_words(recorder: Recorder) -> None:
    recorder.error = 700
    x = torch.zeros(3, 8)
    calls: dict[str, Any] = {
        "norm_quantize": lambda: norm_quantize.norm_quantize(x, ONE, RMS, HOW),
        "norm_backward": lambda: norm_backward.norm_backward(x, x, torch.ones(3), None, RMS),
        "act_quantize": lambda: act_quantize.act_quantize(x, None, "silu", ONE, HOW),
        "act_backward": lambda: act_backward.act_backward(x, x, None, "silu"),
        "gemm": lambda: gemm_stream.gemm(operand(3, 8), operand(5, 8), None, torch.float32),
    }
    for verb, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{verb} did not start: error 700 in words"):
            call()
