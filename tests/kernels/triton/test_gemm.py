"""Triton's gemm without a GPU: its machine code for five architectures, and its tiles. See in_interpreter_gemm.py."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fp8kernels.formats import E4M3, E5M2, HIF8, Format
from fp8kernels.kernels.gemm import PLAIN, Epilogue, Operand, fast_accumulation, triton_jit
from fp8kernels.kernels.gemm.triton_tile import FEW_ROWS, FEWEST_STEPS, tile, tiles
from fp8kernels.kernels.quantize import Observer, Rounding
from fp8kernels.scaling.block import TENSOR

from . import aot

MACHINES = {
    "sm_80": triton_jit.Machine((8, 0), 108, takes_codes=False),
    "sm_89": triton_jit.Machine((8, 9), 142, takes_codes=True),
    "sm_90": triton_jit.Machine((9, 0), 132, takes_codes=True),
    "sm_100": triton_jit.Machine((10, 0), 148, takes_codes=True),
    "gfx950": triton_jit.Machine(None, 256, takes_codes=True),
}
SHARED_MEMORY = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx950": 160}  # KiB that a program can have
# instructions that multiply: codes as they are, and values decoded to bf16
MULTIPLIES = {
    "sm_80": (None, r"HMMA\.\S*F32\.BF16"),
    "sm_89": (r"QMMA\.\S*E4M3", r"HMMA\.\S*F32\.BF16"),
    "sm_90": (r"QGMMA\.\S*E4M3", r"HGMMA\.\S*F32\.BF16"),
    "sm_100": (r"UTCQMMA", r"UTCHMMA"),
    "gfx950": (r"v_mfma_f32_32x32x64_f8f6f4", r"v_mfma_f32_32x32x16_bf16"),
}
SIZE = 2048


def operand(rows: int, cols: int, fmt: Format, grid: tuple[int, int] = (1, 1)) -> Operand:
    return Operand(torch.empty(rows, cols, dtype=torch.uint8), torch.empty(grid), fmt)


def compiled(target: str, x: Operand, w: Operand, epilogue: Epilogue = PLAIN) -> list[aot.Built]:
    """What the launcher would launch for bf16 out and bias on that architecture."""
    bias = torch.empty(w.codes.shape[0], dtype=torch.bfloat16)
    here = mock.patch.object(triton_jit, "machine", return_value=MACHINES[target])
    with aot.launches(target) as built, here:
        triton_jit.gemm(x, w, bias, torch.bfloat16, epilogue)
    return built


def has(built: aot.Built, pattern: str) -> bool:
    text = built.text if built.target == "gfx950" else built.sass
    return re.search(rf"\b{pattern}", text) is not None


def check_resources(built: list[aot.Built]) -> None:
    """No spills on sm_90; elsewhere ptxas may put a few bytes aside to fit more programs on a multiprocessor."""
    for kernel in built:
        assert kernel.spills <= (0 if kernel.target == "sm_90" else 64), f"{kernel.name}: {kernel.resources}"
        assert kernel.shared <= SHARED_MEMORY[kernel.target] * 1024


@pytest.mark.parametrize("target", aot.TARGETS)
def test_codes_go_to_the_tensor_cores_as_they_are(target: str) -> None:
    built = compiled(target, operand(SIZE, SIZE, E4M3, (SIZE, 1)), operand(SIZE, SIZE, E4M3))
    codes, decoded = MULTIPLIES[target]
    assert [kernel.name for kernel in built[:-1]] == ([] if codes else ["decode_kernel", "decode_kernel"])
    assert has(built[-1], codes or decoded)
    assert codes is None or not has(built[-1], decoded)
    assert has(built[-1], "UTMALDG") == (target in ("sm_90", "sm_100"))
    check_resources(built)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_hif8_is_decoded_to_bf16(target: str) -> None:
    """With everything that an epilogue has."""
    observer = Observer(torch.empty(1), torch.empty(4, dtype=torch.int64))
    how = Rounding(HIF8, TENSOR, 15.0)
    epilogue = Epilogue("gelu", torch.empty(SIZE, SIZE, dtype=torch.bfloat16), how, torch.empty(1, 1), observer)
    built = compiled(target, operand(SIZE, SIZE, HIF8), operand(SIZE, SIZE, HIF8), epilogue)
    assert [kernel.name for kernel in built] == ["decode_kernel", "decode_kernel", "product_kernel"]
    codes, decoded = MULTIPLIES[target]
    assert has(built[2], decoded) and not (codes and has(built[2], codes))
    assert has(built[2], "UTMALDG") == (target in ("sm_90", "sm_100"))
    check_resources(built)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_few_rows_and_split_k(target: str) -> None:
    """HiF8 is decoded in registers; codes that the tensor cores know are widened there by the hardware."""
    built = compiled(target, operand(16, SIZE, HIF8), operand(768, SIZE, E4M3))
    assert [kernel.name for kernel in built] == ["product_kernel", "parts_kernel"]
    built += compiled(target, operand(64, SIZE, E5M2), operand(SIZE, SIZE, E4M3))
    if target in ("sm_89", "sm_90", "sm_100"):
        assert has(built[2], r"F2FP\.F16\.E4M3")
    check_resources(built)


def test_block_scales_on_hopper() -> None:
    """The products of each 128 of K leave the tensor cores before they are scaled."""
    grids = (SIZE, SIZE // 128), (SIZE // 128, SIZE // 128)
    built = compiled("sm_90", operand(SIZE, SIZE, E4M3, grids[0]), operand(SIZE, SIZE, E4M3, grids[1]))
    assert has(built[0], "QGMMA") and has(built[0], "UTMALDG")
    built += compiled("sm_90", operand(SIZE, SIZE, HIF8, grids[0]), operand(SIZE, SIZE, HIF8, grids[1]))
    assert has(built[3], "HGMMA")
    check_resources(built)


def test_unaligned_operands_on_hopper() -> None:
    """K of no multiple of 16 is padded, so that descriptors read it all the same; mixed formats, codes out."""
    epilogue = Epilogue("silu", None, Rounding(HIF8, TENSOR, 15.0, carrier=4), torch.empty(1, 1))
    built = compiled("sm_90", operand(SIZE, 1027, E5M2), operand(SIZE, 1027, E4M3), epilogue)
    assert has(built[0], "QGMMA") and has(built[0], "UTMALDG")
    check_resources(built)


@pytest.mark.parametrize("target", ["sm_89", "sm_90"])
def test_sums_of_codes_move_to_fp32_unless_asked_otherwise(target: str) -> None:
    """One addition for each of a thread's sums and each step of K."""
    x, w = operand(SIZE, SIZE, E4M3), operand(SIZE, SIZE, E4M3)
    before = fast_accumulation(on=False)
    try:
        promoted = compiled(target, x, w)
        fast_accumulation(on=True)
        fast = compiled(target, x, w)
    finally:
        fast_accumulation(on=before)
    sums = 128 * 128 // 256  # of a thread
    assert promoted[0].sass.count("FADD") >= fast[0].sass.count("FADD") + sums
    check_resources(promoted + fast)


SHAPES = list(itertools.product((1, 16, 17, 64, 65, 128, 1000, 9618), (1, 48, 768, 4096), (1, 128, 1027, 8192)))


@pytest.mark.parametrize("target", MACHINES)
def test_tiles(target: str) -> None:
    capability, processors, takes_codes = MACHINES[target]
    for (m, n, k), native, blocked in itertools.product(SHAPES, (False, True), (False, True)):
        if native and (m <= FEW_ROWS or not takes_codes):
            continue
        chosen = tile(m, n, k, capability, native=native, blocked=blocked, processors=processors)
        assert chosen.rows >= 16 and chosen.cols >= 16 and chosen.depth >= 32  # what tl.dot takes
        assert 128 % chosen.depth == 0  # scales that change along K
        assert m > FEW_ROWS or m <= chosen.rows <= max(16, 2 * m)
        size = 2 if m > FEW_ROWS and not native else 1  # bytes of bf16 or of a code
        assert chosen.stages * (chosen.rows + chosen.cols) * chosen.depth * size <= SHARED_MEMORY[target] * 1024
        steps = -(-k // chosen.depth)
        assert chosen.splits == 1 or steps >= chosen.splits * FEWEST_STEPS
        count = tiles(m, n, chosen.rows, chosen.cols) * chosen.splits
        assert count <= processors or chosen.splits == 1


def test_tiles_to_try_are_few_and_fit_their_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8KERNELS_AUTOTUNE=1 times each of them once; only with it."""
    assert len(triton_jit.TILES_TO_TRY) <= 8
    timed = []

    def time(run: Callable[[], None], quantiles: object) -> list[float]:
        if len(timed) in (1, 7):  # the widest and the tallest; compiling all of them would take long
            run()
        timed.append(run)
        return [1.0, 1.0, 1.0]

    x, w = operand(SIZE, SIZE, E4M3), operand(SIZE, SIZE, E4M3)
    monkeypatch.setitem(vars(triton_jit.autotuned()), "do_bench", time)
    compiled("sm_90", x, w)
    assert not timed
    monkeypatch.setenv(triton_jit.AUTOTUNE, "1")
    built = compiled("sm_90", x, w)
    assert len(timed) == len(triton_jit.TILES_TO_TRY) and len(built) == 2 + 1  # and that which runs
    assert all(has(kernel, "QGMMA") for kernel in built)
    compiled("sm_90", x, w)
    assert len(timed) == len(triton_jit.TILES_TO_TRY)


@pytest.mark.parametrize("capability", [(8, 6), (12, 0), (12, 1)])
def test_small_gpus_have_tiles_that_fit(capability: tuple[int, int]) -> None:
    """sm_86 and sm_12x have 99 KiB as sm_89, and their instructions."""
    for native in (False, True):
        assert tile(4096, 4096, 4096, capability, native=native) == tile(4096, 4096, 4096, (8, 9), native=native)


def test_a_few_rows_of_x_use_the_whole_gpu() -> None:
    """By the numbers of an H200: w is spread over at least half of its multiprocessors, and K is not cut to shreds."""
    for n, k in ((768, 3072), (2112, 7168), (4096, 7168), (7168, 2048), (24576, 1536)):
        chosen = tile(16, n, k, (9, 0), native=False)
        assert tiles(16, n, chosen.rows, chosen.cols) * chosen.splits >= 66
