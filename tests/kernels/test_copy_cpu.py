"""The tutorial verb through every backend, and the proof that each toolchain works."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from fp8kernels.kernels.copy import cpu, cuda, reference, triton_jit

CASES = (
    torch.arange(100_000, dtype=torch.float32),
    torch.randn(33, 70).bfloat16().t(),
    torch.randn(4, 5, 6)[:, ::2],
    torch.tensor(3.5, dtype=torch.float64),
    torch.empty(0, 7),
    torch.tensor([True, False, True]),
    torch.randn(5, dtype=torch.complex64).conj(),
)
IN_THE_INTERPRETER = """
import torch
from fp8kernels.kernels.copy import triton_jit
for x in (torch.arange(5000.0), torch.randn(33, 70).bfloat16().t(), torch.empty(0), torch.tensor([True, False])):
    assert triton_jit.why_not(x) is None, triton_jit.why_not(x)
    out = triton_jit.copy(x)
    assert out.is_contiguous() and out.dtype == x.dtype and torch.equal(out, x)
print("copied")
"""


@pytest.mark.parametrize("case", range(len(CASES)))
def test_cpu(case: int) -> None:
    x = CASES[case]
    assert cpu.why_not(x) is None
    out = cpu.copy(x)
    assert out.is_contiguous()
    assert out.dtype == x.dtype
    assert out.data_ptr() != x.data_ptr() or x.numel() == 0
    assert torch.equal(out, reference.copy(x))


def test_reasons() -> None:
    x = torch.ones(3)
    assert "meta" in cpu.why_not(x.to("meta"))
    assert cuda.why_not(x) is not None  # no module, no GPU, or not a CUDA tensor: always a reason for a CPU tensor
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert "TRITON_INTERPRET=1" in triton_jit.why_not(x) or "triton does not load" in triton_jit.why_not(x)


@pytest.mark.gpu
def test_cuda() -> None:
    for x in CASES:
        x = x.cuda()
        assert cuda.why_not(x) is None
        assert torch.equal(cuda.copy(x), reference.copy(x))


def test_cuda_module_loads_without_a_driver() -> None:
    if importlib.util.find_spec("fp8kernels._cuda") is None:
        pytest.skip("built without nvcc")
    from fp8kernels import _cuda

    assert _cuda.device_count() == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert _cuda.error_string(0) == "no error"


def test_triton_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    run = subprocess.run(
        [sys.executable, "-c", IN_THE_INTERPRETER],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "copied"


def test_triton_compiles_for_hopper() -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = triton_jit.copy_kernel
    signature = {"from_ptr": "*u8", "to_ptr": "*u8", "count": "i32", "BLOCK": "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"BLOCK": triton_jit.BLOCK})
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in built.asm["ptx"]
    assert len(built.asm["cubin"]) > 0
