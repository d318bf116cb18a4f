"""Which tile the Triton gemm takes: a pure function of the product and the GPU, with the reason beside each choice."""

from __future__ import annotations

from typing import NamedTuple

FEW_ROWS = 64  # up to here a product is bound by reading w once, not by multiplying
FEWEST_STEPS = 4  # of TILE_K that a part of K is worth: below, writing and reading its sums costs more than it saves
MOST_SPLITS = 16  # parts of K; each writes an fp32 matrix [M, N] that is read again


class Tile(NamedTuple):
    """What a program computes: out[rows, cols], `depth` of K at a time; K in `splits` parts that are added after.

    group   rows of tiles that are gone through together, so that they find w in the L2 cache
    warps   of 32 threads (64 on AMD)
    stages  of the pipeline from memory
    """

    rows: int
    cols: int
    depth: int
    group: int
    splits: int
    warps: int
    stages: int


def tile(
    m: int,
    n: int,
    k: int,
    capability: tuple[int, int] | None,
    *,
    native: bool,
    blocked: bool = False,
    processors: int = 132,
) -> Tile:
    """The tile for out[m, n] over k.

    capability  compute capability of an NVIDIA GPU, or None for AMD
    native      operands of many rows are codes, which the tensor cores take as they are; else they are bf16
    blocked     scales change along K: a second set of sums is in registers
    processors  multiprocessors of the GPU
    """
    if m <= FEW_ROWS:
        # x is padded to the 16 rows an instruction takes at least. 64 columns of w at 128 of K are 8 KiB a stage: with
        # several programs on a multiprocessor and 4 stages each, enough bytes are under way to keep the memory busy.
        rows, cols, depth, warps, stages = max(16, pow2(m)), 64, 128, 4, 4
    elif capability is None:
        # gfx950: four wavefronts with a quarter of 128x128 each; two stages of 32 KiB, of 160
        rows, cols, depth, warps, stages = 128, 128, 128 if native else 64, 4, 2
    elif capability[0] in (10, 11):
        # sums stay in tensor memory; 128x256 is the largest single instruction. 48 KiB a stage, of 227. Scaled sums
        # are in registers: 128 columns of them
        rows, cols, depth, warps, stages = 128, 128 if blocked else 256, 128 if native else 64, 8, 4
    elif capability[0] == 9 and native:
        # two warp groups with 64x128 each: 64 sums a thread, and as many of the 128 of K that are not yet promoted.
        # 128x256 would need 256 registers for both. 32 KiB a stage, of 227
        rows, cols, depth, warps, stages = 128, 128, 128, 8, 4
    elif capability[0] == 9:
        # bf16 is never promoted: 128 sums a thread of 128x256 fit, and such a tile reads shared memory least.
        # 48 KiB a stage, of 227
        rows, cols, depth, warps, stages = 128, 128 if blocked else 256, 64, 8, 4
    else:
        # 64 sums a thread. sm_86, sm_89 and sm_12x have 99 KiB of shared memory: 3 stages of the 32 KiB of bf16, 4 of
        # the 16 of codes; sm_80 has 163
        rows, cols, depth, warps, stages = 128, 128, 64, 8, 4 if native or capability == (8, 0) else 3
    if m > FEW_ROWS and tiles(m, n, rows, cols) < processors:
        # too few tiles to go round: smaller ones keep more multiprocessors busy
        cols = 64
    splits = 1
    count = tiles(m, n, rows, cols)
    if count * 2 <= processors:
        # more than half of the multiprocessors would idle: split K among them
        splits = max(1, min(processors // count, -(-k // depth) // FEWEST_STEPS, MOST_SPLITS))
    return Tile(rows, cols, depth, 8, splits, warps, stages)  # 8 rows of tiles of x with one of w: 9 KiB of codes a K


def tiles(m: int, n: int, rows: int, cols: int) -> int:
    """How many tiles cover out."""
    return -(-m // rows) * -(-n // cols)


def pow2(extent: int) -> int:
    """The next power of two, which the sides of a tile are."""
    return 1 << (extent - 1).bit_length()
