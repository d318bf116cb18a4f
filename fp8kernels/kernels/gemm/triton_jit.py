"""gemm in Triton: NVIDIA GPUs from sm_80 on, AMD's gfx950, and CPU tensors in Triton's interpreter.

method  one tile of out a program, in groups that share w in the L2 cache. E4M3 and E5M2 go to the tensor cores as they
        are where those take them (sm_89 and newer, gfx950), moved to fp32 every 128 of K. HiF8, and everything on older
        GPUs, is decoded to bf16: by a kernel of its own before the product, or, for up to 64 rows of x, in registers.
        From sm_90 on aligned operands are read through tensor descriptors (TMA), others through pointers and strides.
        Where out has few tiles, K is split and the parts are added in a fixed order by a second kernel. README.md tells
        the ideas
limits  scales that change along K do so every multiple of 128
equal   within docs/NUMERICS.md, "Products", of the reference; decoded products are exact, sums fp32
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...formats import HIF8
from .. import triton_jit as shared
from ..quantize import Quantized
from ..triton_jit import E4M3_ID, constexpr, decode, jit, round_to, to_fp32
from . import ACTIVATIONS, PLAIN, Epilogue, Operand, fast_accumulation
from .ending.triton_jit import conclude, ending_of, load_scale, scaled, scales_of, sink_of, span_of, write
from .triton_tile import FEW_ROWS, Tile, tile, tiles

if shared.triton is not None:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

STEP = constexpr(128)  # of K: what a scale covers at least, and what is summed before it moves to fp32
ALIGNED = 16  # bytes: what a tensor descriptor asks of addresses and of rows
LONGEST = 2**31 - 2**16  # elements of M, N or K: counted in 32 bits with a tile's overhang (offsets have 64)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NATIVE_FROM = (8, 9)  # compute capability whose tensor cores take E4M3 and E5M2
AMD_NATIVE = ("gfx950",)  # older ones have 8-bit floats of other values
DESCRIPTORS_FROM = (9, 0)
AUTOTUNE = "FP8KERNELS_AUTOTUNE"  # =1: times the tiles below on the first product of a shape and keeps the fastest
CODES, WIDENED, DECODED, BF16 = (constexpr(i) for i in range(4))  # how operands are read: multiplied as codes, made
# fp16 by the hardware, made bf16 by integer arithmetic, or bf16 in memory
KEPT, PARTLY, APART = (constexpr(i) for i in range(3))  # sums of codes: kept in the tensor cores; moved to fp32 by
# Triton's own means, which exist for wgmma; or made from zero for each step and added
DECODED_TILE = (32, 128)  # rows and columns of codes that a program decodes: 16 a thread, runs of 256 bytes
PARTS_TILE = (16, 256)  # rows and columns of out that a program adds the parts of K of
INTERPRETED = constexpr(shared.INTERPRETED)


def why_not(
    x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN
) -> str | None:
    """Why these arguments cannot run here, or None."""
    if x.codes.is_cpu and not shared.INTERPRETED:
        return f"x is on the CPU: {shared.ON_CPU}"
    tensors = {"x": x.codes, "x's scale": x.scale, "w": w.codes, "w's scale": w.scale, "bias": bias}
    pending, counters = epilogue.observer or (None, None)
    tensors |= {"residual": epilogue.residual, "out's scale": epilogue.scale, "pending": pending, "counters": counters}
    reason = shared.why_not(tensors)
    if reason is not None:
        return reason
    for name, operand in (("x", x), ("w", w)):
        if operand.codes.dtype != torch.uint8 or operand.scale.dtype != torch.float32:
            return f"{name} is {operand.codes.dtype} with {operand.scale.dtype} scales: it takes uint8 with fp32"
        if max(operand.codes.shape) > LONGEST:
            return f"{name} is {list(operand.codes.shape)}: this kernel takes up to {LONGEST} rows and columns"
        step = operand.codes.shape[1] // operand.scale.shape[1]
        if operand.scale.shape[1] > 1 and step % STEP.value:
            return f"{name}'s scales change every {step} elements of K: this kernel takes multiples of {STEP}"
    for name, tensor in (("bias", bias), ("residual", epilogue.residual)):
        if tensor is not None and tensor.dtype not in FLOATS:
            return f"{name} is {tensor.dtype}: this kernel takes fp32, bf16 and fp16"
    if out_dtype not in FLOATS:
        return f"out would be {out_dtype}: this kernel makes fp32, bf16 and fp16"
    if epilogue.observer is not None and not all(state.is_contiguous() for state in epilogue.observer):
        return "the observer's tensors are not contiguous"
    return None


def gemm(
    x: Operand, w: Operand, bias: Tensor | None, out_dtype: torch.dtype, epilogue: Epilogue = PLAIN
) -> Tensor | Quantized:
    """activation(x[M, K] @ w[N, K].T + bias) + residual; see reference.py for every argument."""
    out = empty(x.codes.shape[0], w.codes.shape[0], out_dtype, epilogue, x.codes.device)
    with torch.cuda.device_of(x.codes):
        how = plan(x, w)
        launch(readable(x, how.read), readable(w, how.read), bias, epilogue, out, how)
    return out


class Plan(NamedTuple):
    """What decides which program is compiled, apart from the epilogue.

    read         how the kernel takes operands: CODES, WIDENED, DECODED or BF16
    descriptors  for x and for w: read through a tensor descriptor
    """

    tile: Tile
    read: int
    descriptors: tuple[bool, bool]


def plan(x: Operand, w: Operand) -> Plan:
    """How to multiply these operands on their device."""
    here = machine(x.codes.device)
    (m, k), n = x.codes.shape, w.codes.shape[0]
    takes_codes = here.takes_codes and HIF8 not in (x.fmt, w.fmt)
    if m <= FEW_ROWS:
        read = WIDENED if takes_codes else DECODED
    else:
        read = CODES if takes_codes else BF16
    native = bool(read == CODES)
    chosen = tile(m, n, k, here.capability, native=native, blocked=is_blocked(x, w), processors=here.processors)
    if here.capability is None or here.capability < DESCRIPTORS_FROM:
        return Plan(chosen, read.value, (False, False))
    many = m > FEW_ROWS  # which `readable` aligns
    return Plan(chosen, read.value, (many or is_aligned(x.codes), many or is_aligned(w.codes)))


class Machine(NamedTuple):
    """Compute capability, or None for AMD; multiprocessors; whether the tensor cores take E4M3 and E5M2 codes."""

    capability: tuple[int, int] | None
    processors: int
    takes_codes: bool


@functools.cache
def machine(device: torch.device) -> Machine:
    """What a device is. The interpreter stands for an sm_90 of two multiprocessors; it has no Inf and NaN in 8 bits."""
    if device.type == "cpu":
        return Machine(DESCRIPTORS_FROM, 2, takes_codes=False)
    processors = shared.processors(device)
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return Machine(None, processors, takes_codes=name.split(":")[0] in AMD_NATIVE)
    capability = torch.cuda.get_device_capability(device)
    return Machine(capability, processors, takes_codes=capability >= NATIVE_FROM)


def promotion(capability: tuple[int, int] | None) -> int:
    """How sums of codes move to fp32: KEPT, PARTLY or APART.

    The tensor cores of sm_89 and sm_90 keep about 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2;
    SageAttention2, arXiv 2411.10958), and what sm_12x keeps is not known. Those of sm_10x and of AMD are taken to add
    in fp32.
    """
    if fast_accumulation() or capability is None or capability[0] in (10, 11):
        return KEPT.value
    return PARTLY.value if capability[0] == 9 else APART.value


def is_blocked(x: Operand, w: Operand) -> bool:
    """Whether scales change along K, so that they are applied inside the sum."""
    return x.scale.shape[1] > 1 or w.scale.shape[1] > 1


def is_aligned(codes: Tensor) -> bool:
    """Whether a tensor descriptor can describe codes [rows, K]: K innermost, rows apart by multiples of 16 bytes."""
    row, col = codes.stride()
    return col == 1 and row >= codes.shape[1] and row % ALIGNED == 0 and codes.data_ptr() % ALIGNED == 0


def empty(m: int, n: int, out_dtype: torch.dtype, epilogue: Epilogue, device: torch.device) -> Any:
    """What the result is written into: a tensor [M, N], or Quantized."""
    if epilogue.rounding is None:
        return torch.empty(m, n, dtype=out_dtype, device=device)
    return Quantized(
        torch.empty(m, n, dtype=torch.uint8, device=device),
        None,
        torch.empty(1, 1, dtype=torch.float32, device=device),
        torch.empty(1, 1, dtype=torch.float32, device=device),
        torch.empty(4, dtype=torch.int64, device=device),
    )


def launch(x: Operand, w: Operand, bias: Tensor | None, epilogue: Epilogue, out: Any, how: Plan) -> None:
    """One kernel, or two where K is split."""
    (m, k), n, device = x.codes.shape, w.codes.shape[0], x.codes.device
    splits = how.tile.splits
    sums = torch.empty(splits, m, n, dtype=torch.float32, device=device) if splits > 1 else None  # [splits, M, N] fp32
    ending, kept = ending_of(bias, epilogue, out), sink_of(epilogue, out)
    scales = scales_of(x), scales_of(w)
    constants = {
        "BLOCKED": is_blocked(x, w),
        "SPLITS": splits,
        "ACTIVATION": ACTIVATIONS.index(epilogue.activation),
        "FMT": None if epilogue.rounding is None else epilogue.rounding.fmt.code_id,
        "SATURATE": epilogue.rounding is None or epilogue.rounding.saturate,
        "CARRIER": None if epilogue.rounding is None else epilogue.rounding.carrier,
    }
    tunes = os.environ.get(AUTOTUNE) == "1" and sums is None and epilogue.rounding is None
    kernel, sides = (autotuned(), {}) if tunes else (product_kernel, sides_of(how.tile))
    kernel[lambda meta: (tiles(m, n, meta["TILE_ROWS"], meta["TILE_COLS"]), splits)](
        pointer(x, how, 0), pointer(w, how, 1), *scales, ending, kept, sums, m, n, k,
        *x.codes.stride(), *w.codes.stride(),
        X_FMT=x.fmt.code_id, W_FMT=w.fmt.code_id, X_SPAN=span_of(x), W_SPAN=span_of(w),
        X_DESCRIPTOR=how.descriptors[0], W_DESCRIPTOR=how.descriptors[1], READ=how.read,
        PROMOTE=promotion(machine(device).capability), **constants, **sides,
    )  # fmt: skip
    if sums is not None:
        rows, cols = PARTS_TILE
        parts_kernel[(tiles(m, n, rows, cols),)](
            sums, *scales, ending, kept, m, n, **constants, TILE_ROWS=rows, TILE_COLS=cols, num_warps=4
        )


def readable(operand: Operand, read: int) -> Operand:
    """The operand with contiguous scales, and with codes that are as `read` wants them.

    BF16 are the decoded values. CODES and BF16 have rows that can be read 16 bytes at a time; what is copied for it is
    padded with zeros, which add nothing to a sum, so that K is a multiple of 16. For few rows of x w is read once, and
    a copy would read it twice: codes are then taken with the strides they have.
    """
    codes = operand.codes
    rows, k = codes.shape
    if read == BF16:
        codes = torch.empty(rows, k + -k % ALIGNED, dtype=torch.bfloat16, device=codes.device)
        sides = {"TILE_ROWS": DECODED_TILE[0], "TILE_COLS": DECODED_TILE[1]}
        decode_kernel[(tiles(rows, codes.shape[1], *DECODED_TILE),)](
            operand.codes, codes, rows, k, codes.shape[1], *operand.codes.stride(), FMT=operand.fmt.code_id, **sides
        )
    elif read == CODES and k % ALIGNED:
        codes = torch.nn.functional.pad(codes, (0, -k % ALIGNED))
    elif read == CODES and not is_aligned(codes):
        codes = codes.clone(memory_format=torch.contiguous_format)
    return Operand(codes, operand.scale.contiguous(), operand.fmt)


def pointer(operand: Operand, how: Plan, side: int) -> Any:
    """What the kernel reads codes through: a descriptor of the tile's extent, or the tensor."""
    codes = operand.codes
    if not how.descriptors[side]:
        return codes
    if how.read in (CODES, WIDENED) and operand.fmt.carrier is not None:
        codes = codes.view(operand.fmt.carrier)
    return TensorDescriptor.from_tensor(codes, [how.tile[side], how.tile.depth])


def sides_of(chosen: Tile) -> dict[str, int]:
    sides = {"TILE_ROWS": chosen.rows, "TILE_COLS": chosen.cols, "TILE_DEPTH": chosen.depth, "GROUP": chosen.group}
    return {**sides, "num_warps": chosen.warps, "num_stages": chosen.stages}


TILES_TO_TRY = (  # by FP8KERNELS_AUTOTUNE; the shape each is meant for
    Tile(128, 128, 128, 8, 1, 8, 4),  # large products of codes
    Tile(128, 256, 128, 8, 1, 8, 3),  # the same where sums are not in registers (sm_100)
    Tile(128, 128, 64, 8, 1, 8, 3),  # large products of decoded values
    Tile(128, 64, 128, 8, 1, 4, 4),  # few tiles
    Tile(64, 128, 128, 8, 1, 4, 4),  # few rows of x
    Tile(64, 64, 128, 8, 1, 4, 4),  # small products
    Tile(64, 256, 64, 8, 1, 8, 3),  # wide w
    Tile(256, 64, 64, 8, 1, 8, 3),  # tall x
)


@functools.cache
def autotuned() -> Any:
    """product_kernel, which times TILES_TO_TRY when it first meets a shape."""

    def fit_descriptors(arguments: dict[str, Any]) -> None:
        for name, rows in (("x_ptr", "TILE_ROWS"), ("w_ptr", "TILE_COLS")):
            if isinstance(arguments[name], TensorDescriptor):
                arguments[name].block_shape = [arguments[rows], arguments["TILE_DEPTH"]]

    configs = []
    for sides in map(sides_of, TILES_TO_TRY):
        warps, stages = sides.pop("num_warps"), sides.pop("num_stages")
        configs.append(triton.Config(sides, num_warps=warps, num_stages=stages, pre_hook=fit_descriptors))
    shape = ["m", "n", "k", "X_FMT", "W_FMT", "READ", "BLOCKED", "X_DESCRIPTOR", "W_DESCRIPTOR"]
    return triton.autotune(configs=configs, key=shape)(product_kernel)


@jit
def product_kernel(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, x_scales, w_scales, ending, sink, sums_ptr, m, n, k, x_row, x_col, w_row, w_col,
    X_FMT: tl.constexpr, W_FMT: tl.constexpr, X_SPAN: tl.constexpr, W_SPAN: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr, W_DESCRIPTOR: tl.constexpr, READ: tl.constexpr, PROMOTE: tl.constexpr,
    BLOCKED: tl.constexpr, SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr, FMT: tl.constexpr, SATURATE: tl.constexpr, CARRIER: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr, TILE_DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of out over all of K; with SPLITS its sums over one part of K."""
    X_ONE: tl.constexpr = X_SPAN % TILE_ROWS == 0
    W_ONE: tl.constexpr = W_SPAN % TILE_COLS == 0
    tile_row, tile_col = place(tl.program_id(0), tl.cdiv(m, TILE_ROWS), tl.cdiv(n, TILE_COLS), GROUP)
    top, left = tile_row * TILE_ROWS, tile_col * TILE_COLS
    row, col = top + tl.arange(0, TILE_ROWS), left + tl.arange(0, TILE_COLS)
    x_at, w_at = tl.minimum(row, m - 1), tl.minimum(col, n - 1)  # what lies beyond is read again and never written
    steps = tl.cdiv(k, TILE_DEPTH)
    part = tl.cdiv(steps, SPLITS)
    first = tl.program_id(1) * part
    sums = tl.zeros((TILE_ROWS, TILE_COLS), tl.float32)
    for step in range(first, tl.minimum(first + part, steps)):
        depth = step * TILE_DEPTH
        x = load_codes(x_ptr, top, x_at, depth, k, x_row, x_col, X_DESCRIPTOR, TILE_DEPTH)
        w = load_codes(w_ptr, left, w_at, depth, k, w_row, w_col, W_DESCRIPTOR, TILE_DEPTH)
        if not BLOCKED:
            sums = multiply(x, w, sums, X_FMT, W_FMT, READ, PROMOTE)
        else:
            products = multiply(x, w, tl.zeros((TILE_ROWS, TILE_COLS), tl.float32), X_FMT, W_FMT, READ, KEPT)
            x_scale = load_scale(x_scales, top, x_at, depth // x_scales.cols, X_ONE)
            w_scale = load_scale(w_scales, left, w_at, depth // w_scales.cols, W_ONE)
            sums += scaled(products, x_scale[:, None], w_scale[None, :])
    if SPLITS > 1:
        mask = (row < m)[:, None] & (col < n)[None, :]
        at = (tl.program_id(1).to(tl.int64) * m + row)[:, None] * n + col[None, :]
        tl.store(sums_ptr + at, sums, mask=mask)
    else:
        seen = write(
            sums, top, left, m, n, x_scales, w_scales, ending, sink, X_ONE, W_ONE, BLOCKED, ACTIVATION, FMT, SATURATE,
            CARRIER,
        )  # fmt: skip
        conclude(seen, m, n, ending, sink, FMT, CARRIER)


@jit
def parts_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, x_scales, w_scales, ending, sink, m, n, BLOCKED: tl.constexpr, SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr, FMT: tl.constexpr, SATURATE: tl.constexpr, CARRIER: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """Adds the parts of K, first to last."""
    across = tl.cdiv(n, TILE_COLS)
    top, left = tl.program_id(0) // across * TILE_ROWS, tl.program_id(0) % across * TILE_COLS
    row, col = top + tl.arange(0, TILE_ROWS), left + tl.arange(0, TILE_COLS)
    mask = (row < m)[:, None] & (col < n)[None, :]
    sums = tl.zeros((TILE_ROWS, TILE_COLS), tl.float32)
    for part in range(SPLITS):
        at = (tl.cast(part, tl.int64) * m + row)[:, None] * n + col[None, :]
        sums += tl.load(sums_ptr + at, mask=mask, other=0.0)
    seen = write(
        sums, top, left, m, n, x_scales, w_scales, ending, sink, False, False, BLOCKED, ACTIVATION, FMT, SATURATE,
        CARRIER,
    )  # fmt: skip
    conclude(seen, m, n, ending, sink, FMT, CARRIER)


@jit
def place(program, down, across, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which tile a program has: groups of GROUP rows of tiles, each gone through column by column."""
    group = program // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    inside = program % (GROUP * across)
    return group * GROUP + inside % height, inside // height


@jit
def load_codes(ptr, first, at, depth, k, row, col, DESCRIPTOR: tl.constexpr, TILE_DEPTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of codes [rows, TILE_DEPTH]; beyond K they are 0, which stands for zero in every format."""
    if DESCRIPTOR:
        codes = ptr.load([first, depth])
    else:
        along = depth + tl.arange(0, TILE_DEPTH)
        offset = at.to(tl.int64)[:, None] * row + along.to(tl.int64)[None, :] * col
        codes = tl.load(ptr + offset, mask=(along < k)[None, :], other=0)
    return codes


@jit
def multiply(  # type: ignore[no-untyped-def]
    x, w, sums, X_FMT: tl.constexpr, W_FMT: tl.constexpr, READ: tl.constexpr, PROMOTE: tl.constexpr
):
    """sums + x @ w.T in values."""
    if INTERPRETED:  # where products in 16 bits are wrong, and Inf and NaN in 8
        x, w = values(x, X_FMT, READ), values(w, W_FMT, READ)
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    elif READ == CODES and PROMOTE == KEPT:
        sums = tl.dot(typed(x, X_FMT), tl.trans(typed(w, W_FMT)), sums)
    elif READ == CODES and PROMOTE == PARTLY:
        sums = tl.dot(typed(x, X_FMT), tl.trans(typed(w, W_FMT)), sums, max_num_imprecise_acc=x.shape[1])
    elif READ == CODES:  # with a number of its own the product is not joined with the sum
        sums += tl.dot(typed(x, X_FMT), tl.trans(typed(w, W_FMT)), max_num_imprecise_acc=x.shape[1])
    elif READ == WIDENED:  # fp16 holds every value of both formats, and the conversion is one instruction
        x, w = typed(x, X_FMT).to(tl.float16), typed(w, W_FMT).to(tl.float16)
        sums = tl.dot(x, tl.trans(w), sums)
    elif READ == DECODED:
        x, w = decode(x, X_FMT).to(tl.bfloat16), decode(w, W_FMT).to(tl.bfloat16)
        sums = tl.dot(x, tl.trans(w), sums)
    else:
        sums = tl.dot(x, tl.trans(w), sums)
    return sums


@jit
def typed(codes, FMT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes as E4M3 or E5M2; those of a descriptor are that already."""
    if codes.dtype == tl.uint8:
        codes = codes.to(tl.float8e4nv if FMT == E4M3_ID else tl.float8e5, bitcast=True)
    return codes


@jit
def values(x, FMT: tl.constexpr, READ: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the elements read stand for, in fp32; exact."""
    if READ == BF16:
        out = to_fp32(x)
    else:
        out = decode(x, FMT)
    return out


@jit
def decode_kernel(  # type: ignore[no-untyped-def]
    codes_ptr, out_ptr, rows, k, cols, row_stride, col_stride,
    FMT: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLS: tl.constexpr,
):  # fmt: skip
    """Codes [rows, k] of any strides to bf16 [rows, cols], contiguous; 0 beyond k."""
    across = tl.cdiv(cols, TILE_COLS)
    row = (tl.program_id(0) // across * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
    col = (tl.program_id(0) % across * TILE_COLS + tl.arange(0, TILE_COLS)).to(tl.int64)
    is_row = (row < rows)[:, None]
    at = row[:, None] * row_stride + col[None, :] * col_stride
    codes = tl.load(codes_ptr + at, mask=is_row & (col < k)[None, :], other=0)
    out = round_to(decode(codes, FMT), tl.bfloat16)
    tl.store(out_ptr + row[:, None] * cols + col[None, :], out, mask=is_row & (col < cols)[None, :])
