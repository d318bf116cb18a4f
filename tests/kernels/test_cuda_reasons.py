"""The NVIDIA lines of quantize, dequantize, commit and copy without a GPU.

Why they do not run here, in words; what their launchers hand to the compiled module, recorded by one that stands in for
it; and, where the C++ tests were built, the launchers with the kernels themselves, run on the host. The kernels' own
tests are tests/cpp/test_*_cuda.cpp, the tests on a GPU tests/gpu.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from fp8kernels.formats import E4M3, HIF8
from fp8kernels.kernels import cuda
from fp8kernels.kernels.commit import ScaleRule, State
from fp8kernels.kernels.commit import cuda as commit
from fp8kernels.kernels.copy import cuda as copy
from fp8kernels.kernels.dequantize import cuda as dequantize
from fp8kernels.kernels.quantize import Observer, Rounding
from fp8kernels.kernels.quantize import cuda as quantize
from fp8kernels.scaling.block import BLOCK_1X128, ROW, TENSOR

HOW = Rounding(E4M3, TENSOR, 448.0)
STREAM, PROCESSORS = 7, 132
EMULATED = """
import torch
import fp8kernels as fp8
from fp8kernels.formats import FORMATS
from fp8kernels.kernels.commit import ScaleRule, State
from fp8kernels.kernels.quantize import Rounding
from fp8kernels.ops.table import TABLE
from fp8kernels.scaling.block import BLOCKS

def both(verb, *args, **kwargs):
    kernels = {kernel.name: kernel for kernel in TABLE[verb]}
    assert kernels["cuda"].why_not(*args, **kwargs) is None
    return [kernels[name].run(*args, **kwargs) for name in ("cuda", "reference")]

torch.manual_seed(3)
for fmt in FORMATS.values():
    for block, shape in (("tensor", (130, 72)), ("row", (3, 257)), ("1x128", (5, 256)), ("128x128", (128, 256))):
        for dtype in (torch.bfloat16, torch.float32):
            x, how = torch.randn(shape).to(dtype), Rounding(fmt, BLOCKS[block], fmt.target)
            ours, wanted = both("quantize", x, torch.zeros(BLOCKS[block].grid(*shape)), how, transpose=True)
            assert all(torch.equal(a, b) for a, b in zip(ours, wanted)), (fmt, block, dtype)
            assert torch.equal(*both("dequantize", ours.codes, ours.scale, fmt, dtype)), (fmt, block, dtype)
assert fp8.explain("quantize", x, "hif8").kernel == "cuda"
for algorithm in ("max", "moving_average", "most_recent", "exponential_moving_average"):
    states = [State(torch.rand(3, 40), torch.rand(3), torch.rand(3), torch.full((3,), 15.0)) for _ in range(5)]
    copies = [State(*(x.clone() for x in state)) for state in states]
    kernels = {kernel.name: kernel for kernel in TABLE["commit"]}
    assert kernels["cuda"].why_not(states, ScaleRule(algorithm)) is None
    kernels["cuda"].run([*states, states[0]], ScaleRule(algorithm))
    kernels["reference"].run(copies, ScaleRule(algorithm))
    assert all(torch.equal(a, b) for s, c in zip(states, copies) for a, b in zip(s, c)), algorithm
x = torch.randn(33, 70).t()
assert torch.equal(*both("copy", x))
print("the same")
"""


def state(device: str = "cpu") -> State:
    return State(*(torch.zeros(shape, device=device) for shape in ((3, 16), (3,), (3,), (3,))))


class Recorder:
    """Stands in for fp8kernels._cuda: notes the arguments, and answers with an error or 0."""

    workspace_bytes = 48

    def __init__(self, error: int = 0) -> None:
        self.error, self.args = error, ()

    def __getattr__(self, name: str) -> Any:
        def entry(*args: Any) -> int:
            self.args = args
            return self.error

        return entry

    def error_string(self, error: int) -> str:
        return f"error {error} in words"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    for module in (quantize, dequantize, commit, copy, cuda):
        monkeypatch.setattr(module, "_cuda", made)
    monkeypatch.setattr(cuda, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "stream", lambda device: STREAM)
    monkeypatch.setattr(cuda, "processors", lambda device: PROCESSORS)
    monkeypatch.setattr(cuda, "workspace", lambda device: torch.zeros(6, dtype=torch.int64))
    return made


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensors_that_are_not_on_a_gpu(device: str) -> None:
    x, scale = torch.zeros(4, 8, device=device), torch.zeros(1, 1, device=device)
    reasons = (
        quantize.why_not(x, scale, HOW),
        dequantize.why_not(x.byte(), scale, E4M3, torch.bfloat16),
        commit.why_not([state(device)], ScaleRule()),
        copy.why_not(x),
    )
    for reason in reasons:
        if reason is None:
            assert cuda.EMULATED and device == "cpu"
        else:
            assert "does not load" in reason or "no GPU" in reason or f"is on {device}" in reason


def test_nothing_to_commit() -> None:
    reason = commit.why_not([], ScaleRule())
    assert reason is not None and "no state" in reason


def test_what_quantize_does_not_take() -> None:
    x, scale = torch.zeros(4, 8), torch.zeros(1, 1)
    pending, counters = torch.zeros(1), torch.zeros(4, dtype=torch.int64)
    assert quantize.unfit(x, scale, HOW, None) is None
    assert quantize.unfit(x.half(), scale, HOW, Observer(pending, counters)) is None
    assert quantize.unfit(x.bfloat16(), scale, Rounding(HIF8, TENSOR, 15.0, carrier=4), None) is None
    for reason, said in (
        (quantize.unfit(x.double(), scale, HOW, None), "float64"),
        (quantize.unfit(x, scale.half(), HOW, None), "float16"),
        (quantize.unfit(x.to_sparse(), scale, HOW, None), "sparse"),
        (quantize.unfit(x, scale, Rounding(E4M3, TENSOR, 448.0, carrier=1), None), "carrier of e4m3"),
        (quantize.unfit(x, scale, Rounding(HIF8, TENSOR, 15.0, carrier=99), None), "k = 99"),
        (quantize.unfit(x, scale, HOW, Observer(pending.double(), counters)), "pending is torch.float64"),
        (quantize.unfit(x, scale, HOW, Observer(pending, torch.zeros(4, 2).long()[:, 0])), "counters is"),
    ):
        assert reason is not None and said in reason


def test_what_the_others_do_not_take() -> None:
    codes, scale = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(1, 1)
    assert dequantize.unfit(codes, scale, torch.float16) is None
    assert "float64" in str(dequantize.unfit(codes, scale, torch.float64))
    assert "int8" in str(dequantize.unfit(codes.to(torch.int8), scale, torch.float16))
    assert "sparse" in str(dequantize.unfit(codes.to_sparse(), scale, torch.float16))
    assert commit.unfit([state(), state()], ScaleRule("moving_average")) is None
    assert "the algorithm is <function" in str(commit.unfit([state()], ScaleRule(lambda history: history[:, 0])))
    assert "'median'" in str(commit.unfit([state()], ScaleRule("median")))
    assert "target is torch.float64" in str(
        commit.unfit([state()._replace(target=torch.ones(3).double())], ScaleRule())
    )
    assert "history is" in str(commit.unfit([state(), state("meta")], ScaleRule()))


def named(recorder: Recorder) -> dict[str, Any]:
    """The arguments of quantize by the names of python/bind_quantize_cuda.cpp."""
    addresses = ["scale_in", "scale", "amax", "codes", "codes_t", "counts", "pending", "counters"]
    names = ["x", "type", "rows", "cols", "stride", "grid_rows", "grid_cols", *addresses, "fmt", "target", "headroom"]
    names += ["power_of_two", "saturate", "carrier", "workspace", "processors", "stream"]
    return dict(zip(names, recorder.args, strict=True))


def test_quantize_hands_over(recorder: Recorder) -> None:
    x, scale = torch.randn(6, 256)[:, :128].bfloat16(), torch.zeros(6, 1)
    rows = torch.randn(6, 256, dtype=torch.bfloat16)[:, :128]
    pending, counters = torch.zeros(1), torch.zeros(4, dtype=torch.int64)
    how = Rounding(HIF8, BLOCK_1X128, 15.0, margin=2, power_of_two=True, saturate=False, carrier=4)
    out = quantize.quantize(rows, scale, how, transpose=True, observer=Observer(pending, counters))
    seen = named(recorder)
    assert (seen["x"], seen["rows"], seen["cols"], seen["stride"]) == (rows.data_ptr(), 6, 128, 256)  # not copied
    assert (seen["type"], seen["grid_rows"], seen["grid_cols"]) == (1, 6, 1)
    assert (seen["fmt"], seen["target"], seen["headroom"], seen["carrier"]) == (HIF8.code_id, 15.0, 4.0, 4)
    assert (seen["power_of_two"], seen["saturate"]) == (True, False)
    assert (seen["processors"], seen["stream"]) == (PROCESSORS, STREAM)
    for name in ("codes", "codes_t", "scale", "amax", "counts"):
        assert seen[name] == getattr(out, name).data_ptr()
    assert (seen["pending"], seen["counters"]) == (pending.data_ptr(), counters.data_ptr())
    assert out.codes_t is not None and out.codes_t.shape == (128, 6)
    quantize.quantize(x.t(), torch.zeros(1, 1), HOW)
    seen = named(recorder)
    assert seen["x"] != x.data_ptr() and seen["stride"] == 6  # its rows were not contiguous
    assert (seen["codes_t"], seen["pending"], seen["counters"], seen["carrier"]) == (0, 0, 0, -1)
    quantize.quantize(rows[:1], torch.zeros(1, 1), HOW)
    assert named(recorder)["stride"] == 128  # one row: its stride says nothing


def test_quantize_of_nothing(recorder: Recorder) -> None:
    out = quantize.quantize(torch.zeros(0, 8), torch.zeros(0, 1), Rounding(E4M3, ROW, 448.0))
    assert recorder.args == () and out.counts.tolist() == [0, 0, 0, 0]


def test_grids_that_do_not_fit(recorder: Recorder) -> None:
    with pytest.raises(ValueError, match=r"scale is \[2, 1\].*'tensor'"):
        quantize.quantize(torch.zeros(4, 8), torch.zeros(2, 1), HOW)
    with pytest.raises(ValueError, match=r"scale \[3, 1\] does not divide codes \[4, 8\]"):
        dequantize.dequantize(torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(3, 1), E4M3, torch.float32)


def test_dequantize_hands_over(recorder: Recorder) -> None:
    codes, scale = torch.zeros(4, 16, dtype=torch.uint8)[:, :8], torch.ones(4, 1)
    out = dequantize.dequantize(codes, scale, E4M3, torch.float16)
    pointers = codes.data_ptr(), 4, 8, 16, 4, 1, scale.data_ptr(), out.data_ptr()
    assert recorder.args == (*pointers, 2, E4M3.code_id, PROCESSORS, STREAM)
    assert out.dtype == torch.float16 and out.shape == (4, 8)


def test_commit_hands_over_each_state_once(recorder: Recorder) -> None:
    first, second = state(), state()
    commit.commit([first, second, first], ScaleRule("moving_average", margin=1))
    flat, algorithm, headroom, power_of_two, decay, stream = recorder.args

    def numbers(s: State) -> list[int]:
        return [*(x.data_ptr() for x in s), 3, 16]

    assert flat == numbers(first) + numbers(second)
    assert (algorithm, headroom, power_of_two, decay, stream) == (1, 2.0, False, ScaleRule().decay, STREAM)


def test_errors_in_words(recorder: Recorder) -> None:
    recorder.error = 700
    codes = torch.zeros(4, 8, dtype=torch.uint8)
    calls: dict[str, Any] = {
        "quantize": lambda: quantize.quantize(torch.zeros(4, 8), torch.zeros(1, 1), HOW),
        "dequantize": lambda: dequantize.dequantize(codes, torch.ones(1, 1), E4M3, torch.float32),
        "commit": lambda: commit.commit([state()], ScaleRule()),
        "copy": lambda: copy.copy(codes),
    }
    for verb, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{verb} did not start: error 700 in words"):
            call()


def test_a_stream_has_one_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = iter((1, 2, 1, 1))
    captures = iter((False, False, False, True))
    monkeypatch.setattr(cuda, "_cuda", Recorder())
    monkeypatch.setattr(cuda, "_workspaces", {})
    monkeypatch.setattr(cuda, "stream", lambda device: next(streams))
    monkeypatch.setattr(cuda, "EMULATED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: next(captures))
    first, second, again, captured = (cuda.workspace(torch.device("cpu")) for _ in range(4))
    assert first is again and first is not second
    assert captured is not first  # a graph may be replayed beside what the stream does then
    assert first.numel() * first.element_size() == Recorder.workspace_bytes and not first.any()


def test_launchers_with_their_kernels() -> None:
    if importlib.util.find_spec("fp8kernels._cuda_emulated") is None:
        pytest.skip("built without the C++ tests")
    run = subprocess.run(
        [sys.executable, "-c", EMULATED],
        env={**os.environ, "FP8KERNELS_EMULATE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "the same"
