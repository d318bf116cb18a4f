"""Every Triton kernel compiled for every architecture: no spills on Hopper, wide loads, exact divisions."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime.jit import JITFunction

import fp8kernels
from fp8kernels.formats import E4M3, E5M2, HIF8
from fp8kernels.kernels.act_backward import triton_jit as act_backward
from fp8kernels.kernels.act_quantize import triton_jit as act_quantize
from fp8kernels.kernels.commit import ScaleRule, State
from fp8kernels.kernels.commit import triton_jit as commit
from fp8kernels.kernels.copy import triton_jit as copy
from fp8kernels.kernels.dequantize import triton_jit as dequantize
from fp8kernels.kernels.norm_backward import triton_jit as norm_backward
from fp8kernels.kernels.norm_quantize import Norm
from fp8kernels.kernels.norm_quantize import triton_jit as norm_quantize
from fp8kernels.kernels.quantize import Observer, Rounding
from fp8kernels.kernels.quantize import triton_jit as quantize
from fp8kernels.scaling.block import BLOCK_1X128, BLOCK_128X128, ROW, TENSOR, Block

from . import aot

ELSEWHERE = {"product_kernel", "parts_kernel", "decode_kernel"}  # gemm's, in test_gemm.py
SPILLS = 64  # bytes that ptxas may put aside on other architectures to fit more programs on a multiprocessor
SIZE = 4096


def half(rows: int = SIZE, cols: int = SIZE) -> Tensor:
    return torch.empty(rows, cols, dtype=torch.bfloat16)


def seen() -> Observer:
    return Observer(torch.empty(1), torch.empty(4, dtype=torch.int64))


def codes_of(fmt: fp8kernels.Format, block: Block, x: Tensor, *, transpose: bool, carrier: int | None = None) -> None:
    how = Rounding(fmt, block, fmt.target, carrier=carrier)
    quantize.quantize(x, torch.empty(block.grid(*x.shape)), how, transpose=transpose, observer=seen())


def quantize_tensor() -> None:
    codes_of(HIF8, TENSOR, half(), transpose=False)
    codes_of(HIF8, TENSOR, half(), transpose=True, carrier=4)
    codes_of(E5M2, TENSOR, half(SIZE, 2 * SIZE)[:, :SIZE].float(), transpose=False)


def quantize_patches() -> None:
    codes_of(HIF8, ROW, half(), transpose=False)
    codes_of(HIF8, ROW, half(SIZE, 8192), transpose=True, carrier=4)
    codes_of(E4M3, BLOCK_1X128, half(), transpose=True)
    codes_of(HIF8, BLOCK_128X128, half().float(), transpose=False)


def act() -> None:
    for activation, transpose in (("silu", True), ("gelu", False), ("gelu_tanh", False)):
        how = Rounding(HIF8, TENSOR, 15.0)
        act_quantize.act_quantize(half(), half(), activation, torch.empty(1, 1), how, transpose=transpose)
        act_backward.act_backward(half(), half(), half(), activation)
    act_quantize.act_quantize(half(), half(), "silu", torch.empty(SIZE, 1), Rounding(E4M3, ROW, E4M3.target))


def norm() -> None:
    for cols, center, block in ((1024, False, TENSOR), (8192, True, BLOCK_1X128)):
        vector = torch.empty(cols, dtype=torch.bfloat16)
        kind = Norm(vector, vector if center else None, 1e-6, center)
        scale, how = torch.empty(block.grid(SIZE, cols)), Rounding(HIF8, block, 15.0)
        norm_quantize.norm_quantize(half(SIZE, cols), scale, kind, how, observer=seen())
        mean = torch.empty(SIZE) if center else None
        norm_backward.norm_backward(half(SIZE, cols), half(SIZE, cols), torch.empty(SIZE), mean, kind)
    how = Rounding(HIF8, TENSOR, 15.0, carrier=4)
    norm_quantize.norm_quantize(half(SIZE, cols), torch.empty(1, 1), kind, how, transpose=True)


def others() -> None:
    copy.copy(half())
    dequantize.dequantize(torch.empty(SIZE, SIZE, dtype=torch.uint8), torch.empty(1, 1), HIF8, torch.bfloat16)
    dequantize.dequantize(torch.empty(SIZE, SIZE, dtype=torch.uint8), torch.empty(SIZE, 32), E4M3, torch.float32)
    state = State(torch.empty(3, 64), torch.empty(3), torch.empty(3), torch.empty(3))
    for algorithm in commit.ALGORITHMS:
        commit.commit([state], ScaleRule(algorithm, power_of_two=True))


LAUNCHES: dict[str, Callable[[], None]] = {
    launch.__name__: launch for launch in (quantize_tensor, quantize_patches, act, norm, others)
}


@pytest.fixture(autouse=True)
def not_interpreted() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("this run interprets all kernels, so that none can be compiled: unset TRITON_INTERPRET")


def compiled(launch: str, target: str) -> list[aot.Built]:
    """What the launchers would launch there; those that are compiled already come from Triton's cache."""
    with aot.launches(target) as built:
        LAUNCHES[launch]()
    assert built
    return built


def kernels() -> Iterator[str]:
    """Every function of the package that a launcher launches: those that are named so."""
    root = Path(fp8kernels.__file__).parent
    for path in sorted(root.rglob("triton_jit.py")):
        module = importlib.import_module(".".join(["fp8kernels", *path.relative_to(root).with_suffix("").parts]))
        for name, found in vars(module).items():
            if isinstance(found, JITFunction) and name.endswith("_kernel"):
                yield name


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_it_compiles(launch: str, target: str) -> None:
    for kernel in compiled(launch, target):
        assert kernel.spills <= (0 if target == "sm_90" else SPILLS), f"{kernel.name}: {kernel.resources}"


def test_no_kernel_is_left_out() -> None:
    there = {kernel.name for launch in LAUNCHES for kernel in compiled(launch, "sm_90")}
    assert there | ELSEWHERE == set(kernels())


def test_codes_on_hopper() -> None:
    """16 bytes a load and a store, no slow path of a division in the loop, one launch after that of the amax."""
    amax, tensor, *_ = compiled("quantize_tensor", "sm_90")
    assert [amax.name, tensor.name] == ["amax_kernel", "tensor_kernel"]
    assert "LDG.E.128" in amax.sass and "LDG.E.128" in tensor.sass and "STG.E.128" in tensor.sass
    assert tensor.text.count("div.rn.f32") == 2  # amax / target, 1 / scale
    assert tensor.text.count("fma.rn.f32") >= 4 * quantize.USUAL_TILE // (32 * quantize.WARPS)
    assert not re.search(r"\b(mul|fma|add)\.(rn\.)?ftz", tensor.text)


def test_codes_elsewhere() -> None:
    amax, tensor, *_ = compiled("quantize_tensor", "gfx950")
    assert "buffer_load_dwordx4" in amax.text and "buffer_load_dwordx4" in tensor.text
    assert "v_div_fixup_f32" in tensor.text and "v_pk_fma_f32" in tensor.text


@pytest.mark.parametrize("shape", ((1, 1), (1000, 1)), ids=str)
def test_extents_and_strides_of_one(shape: tuple[int, int]) -> None:
    """A launcher makes constants of arguments that are 1, which a kernel must take as well."""
    x, vector, one, how = half(*shape), half(1, shape[1])[0], torch.empty(1, 1), Rounding(E5M2, TENSOR, 15.0)
    kind = Norm(vector, vector, 1e-6, center=True)
    with aot.launches("sm_90") as built:
        for transpose in (False, True):
            codes_of(HIF8, ROW, x, transpose=transpose)
            act_quantize.act_quantize(x, x, "relu", one, how, transpose=transpose)
            norm_quantize.norm_quantize(x, one, kind, how, transpose=transpose)
        act_backward.act_backward(x, x, x, "silu")
        norm_backward.norm_backward(x, x, torch.empty(shape[0]), torch.empty(shape[0]), kind)
        dequantize.dequantize(torch.empty(shape, dtype=torch.uint8), torch.empty(shape[0], 1), E5M2, torch.float16)
        commit.commit([State(torch.empty(1, 1), torch.empty(1), torch.empty(1), torch.empty(1))], ScaleRule())
    assert len({kernel.name for kernel in built}) == 10


def test_a_whole_model_commits_in_one_launch() -> None:
    states = [State(torch.empty(3, 64), torch.empty(3), torch.empty(3), torch.empty(3)) for _ in range(40)]
    with aot.launches("sm_90") as built:
        commit.commit(states, ScaleRule())
    assert [kernel.name for kernel in built] == ["commit_kernel"]
