"""What nvcc made of the CUDA kernels, read from the built module: every kernel is there for every architecture, and on
sm_90a none of them keeps registers in local memory."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

STRICT = "sm_90a"  # what the kernels are tuned for
KERNELS = (  # by their names in the source
    "copy_kernel",
    "commit_layers",
    "dequantize_tiles",
    "prepare_scales",
    "quantize_runs",
    "quantize_tiles",
    "transpose_codes",
    "stream_kernel",
    "prepare_tensor_scale",
    "encode_rows",
    "act_backward_kernel",
    "norm_backward_kernel",
    "sum_columns",
)
# what a kernel is for shows in its instructions: products of FP8 codes by warpgroups and tiles from the copy engine, or
# fp16 products by warps
INSTRUCTIONS = {"gemm_sm90_kernel": ("QGMMA", "UTMALDG"), "stream_kernel": ("HMMA",)}


class Usage(NamedTuple):
    """What a thread of one kernel takes on one architecture; stack and local are bytes of local memory."""

    kernel: str
    registers: int
    stack: int
    local: int


def tool() -> str | None:
    """cuobjdump: of the CUDA toolkit, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found or spec is None or spec.origin is None:
        return found
    brought = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(brought) if brought.exists() else None


def resources(architecture: str) -> str:
    spec = importlib.util.find_spec("fp8kernels._cuda")
    if spec is None or spec.origin is None:
        pytest.skip("built without nvcc")
    cuobjdump = tool()
    if cuobjdump is None:
        pytest.skip("triton is not installed, whose cuobjdump reads the machine code")
    command = [cuobjdump, "-res-usage", "-arch", architecture, spec.origin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def architectures() -> list[str]:
    if importlib.util.find_spec("fp8kernels._cuda") is None:
        return []
    from fp8kernels import _cuda

    return list(_cuda.architectures())


@functools.cache
def usages(architecture: str) -> tuple[Usage, ...]:
    text = resources(architecture)
    rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    return tuple(Usage(name, int(registers), int(stack), int(local)) for name, registers, stack, local in rows)


@pytest.mark.parametrize("architecture", architectures() or ["none"])
def test_every_kernel_is_built(architecture: str) -> None:
    names = [usage.kernel for usage in usages(architecture)]
    assert [kernel for kernel in KERNELS if not any(kernel in name for name in names)] == []


def test_no_kernel_spills() -> None:
    """Local memory is off the chip: one spilled register costs more than what a kernel here can hide."""
    if architectures() and STRICT not in architectures():
        assert usages(architectures()[0])  # built for other GPUs: there the kernels only have to be there
        return
    found = usages(STRICT)
    assert len(found) >= len(KERNELS)
    assert [usage for usage in found if usage.stack or usage.local] == []


def test_the_pattern_reads_what_the_tool_prints() -> None:
    """A change of the tool's words must not look like kernels without spills."""
    for usage in usages(STRICT if STRICT in architectures() else (architectures() or [STRICT])[0]):
        assert 0 < usage.registers <= 255


@pytest.mark.parametrize("kernel", INSTRUCTIONS)
def test_kernels_use_the_instructions_they_are_written_for(kernel: str) -> None:
    if architectures() and STRICT not in architectures():
        assert usages(architectures()[0])
        return
    names = [usage.kernel for usage in usages(STRICT) if kernel in usage.kernel]
    assert names, f"{kernel} is not built"
    for name, code in listings(names).items():
        missing = [word for word in INSTRUCTIONS[kernel] if word not in code]
        assert not missing, f"{name} has no {missing}"


def listings(names: list[str]) -> dict[str, str]:
    """The instructions of some kernels on sm_90a."""
    spec, cuobjdump = importlib.util.find_spec("fp8kernels._cuda"), tool()
    assert spec is not None and spec.origin is not None and cuobjdump is not None
    command = [cuobjdump, "-sass", "-arch", STRICT, "-fun", ",".join(names), spec.origin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n\s*Function : (\S+)\n", text)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(found) == set(names)
    return found
