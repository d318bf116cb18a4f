"""The lines of ops/table.py as test parameters, and inputs for them.

Every line runs where its tensors can be: the compiled CPU kernels here, the others on a GPU (marker `gpu`), Triton also
in its interpreter (TRITON_INTERPRET=1), CUDA also on the host (FP8KERNELS_EMULATE=1). The tests are the same functions
for all, so a machine without a GPU runs the code of the tests.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fp8kernels.formats import FORMATS, HIF8, Format
from fp8kernels.kernels.compiled import EMULATED
from fp8kernels.kernels.gemm import Operand
from fp8kernels.kernels.quantize import Rounding, carrier
from fp8kernels.kernels.triton_jit import INTERPRETED
from fp8kernels.ops.table import TABLE, Kernel
from fp8kernels.scaling.block import BLOCKS, Block, get_block

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST = 2.0**-126  # scale
CPU, CUDA = "cpu", "cuda"
STRIDE = 17  # shares no factor with the lengths of the lists that are combined


class Line(NamedTuple):
    """One line of a verb's table, and where its tensors are."""

    verb: str
    kernel: Kernel
    device: str

    def takes(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the kernel takes these arguments; a reason to refuse is a text."""
        reason = self.kernel.why_not(*args, **kwargs)
        assert reason is None or len(reason) > 10
        return reason is None

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The reference on the CPU, given the tensors of this line's arguments."""
        run = next(kernel.run for kernel in TABLE[self.verb] if kernel.name == "reference")
        return run(*to(args, CPU), **to(kwargs, CPU))


def lines(verb: str, *, but: tuple[str, ...] = ()) -> list[Any]:
    """The verb's lines; on a CPU the reference stands aside, as it would be compared with itself."""
    found = []
    for kernel in TABLE[verb]:
        if kernel.name in but:
            continue
        here = {"cpu": True, "triton": INTERPRETED, "cuda": EMULATED, "stream": EMULATED}
        on_cpu = here.get(kernel.name, False)
        if on_cpu:
            found.append(pytest.param(Line(verb, kernel, CPU), id=kernel.name))
        if kernel.name != "cpu":
            found.append(pytest.param(Line(verb, kernel, CUDA), id=f"{kernel.name}-gpu", marks=pytest.mark.gpu))
    return found


def to(value: Any, device: str) -> Any:
    """Arguments of a kernel with their tensors moved."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_replace"):
        return type(value)(*(to(each, device) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(to(each, device) for each in value)
    if isinstance(value, dict):
        return {key: to(each, device) for key, each in value.items()}
    return value


def some(line: Line, *factors: Iterable[Any]) -> list[Any]:
    """All combinations on a GPU; every 17th on a CPU, whose kernels have thorough tests of their own."""
    return list(itertools.product(*factors))[:: 1 if line.device == CUDA else STRIDE]


CONTENTS = ("normal", "zeros", "huge", "tiny", "special")


def numbers(shape: tuple[int, int], dtype: torch.dtype, content: str, random_bits: torch.Generator) -> Tensor:
    """A matrix on the CPU: normal numbers, zeros of both signs, near overflow, near underflow, or with NaN and Inf."""
    x = torch.randn(shape, generator=random_bits)
    if content == "zeros":
        x = torch.zeros(shape)
        x[..., ::2] = -0.0
    elif content == "huge":
        x = x.sign() * torch.finfo(dtype).max * torch.rand(shape, generator=random_bits) ** 2
    elif content == "tiny":
        x = x * 1e-39
    elif content == "special":
        values = (float("nan"), float("inf"), -float("inf"), -0.0, 1e-45)
        for i, value in enumerate(values):
            x.view(-1)[(i * 37 + 5) % x.numel()] = value
    return x.to(dtype)


class Draw:
    """Random choices from a seed; `text` says what was drawn, for the message of a failure."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.bits = torch.Generator().manual_seed(seed)
        self.text = f"seed {seed}"

    def one(self, name: str, values: Any) -> Any:
        value = self.random.choice(list(values))
        self.text += f", {name} {getattr(value, 'name', value)}"
        return value

    def size(self, name: str, most: int) -> int:
        """1 to most, small sizes as often as large ones, and often near a power of two."""
        value = int(2 ** self.random.uniform(0, most.bit_length() - 1))
        if self.random.random() < 0.4:
            value = (1 << value.bit_length()) + self.random.choice((-1, 0, 1))
        value = max(1, min(most, value))
        self.text += f", {name} {value}"
        return value

    def matrix(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """On the CPU; sometimes with rows further apart than they are long, transposed, or off its alignment."""
        content = self.one("content", CONTENTS)
        layout = self.one("layout", ("contiguous", "contiguous", "rows apart", "transposed", "off by one"))
        if layout == "transposed":
            return numbers((cols, rows), dtype, content, self.bits).t()
        if layout == "rows apart":
            return numbers((rows, cols + 3), dtype, content, self.bits)[:, :cols]
        if layout == "off by one":
            flat = numbers((1, rows * cols + 1), dtype, content, self.bits)
            return flat.view(-1)[1:].view(rows, cols)
        return numbers((rows, cols), dtype, content, self.bits)

    def grid(self, rows: int, cols: int) -> tuple[Block, tuple[int, int]]:
        """A block that divides the shape."""
        fitting = [
            block
            for block in BLOCKS.values()
            if (block.rows is None or rows % block.rows == 0) and (block.cols is None or cols % block.cols == 0)
        ]
        block = self.one("block", fitting)
        return block, block.grid(rows, cols)

    def scale(self, grid: tuple[int, int]) -> Tensor:
        """Given scales, unknown ones (0), or some of each."""
        kind = self.one("scale", ("given", "unknown", "mixed"))
        scale = torch.rand(grid, generator=self.bits) + 0.01
        if kind == "unknown":
            return torch.zeros(grid)
        if kind == "mixed":
            scale.view(-1)[::2] = 0
        return scale

    def rounding(self, block: Block) -> Rounding:
        fmt = self.one("fmt", FORMATS.values())
        k = carrier.shift(fmt.target) if fmt is HIF8 and self.one("carrier", (True, False)) else None
        return Rounding(
            fmt, block, fmt.target, margin=self.one("margin", (0, 0, 1)), power_of_two=self.one("pow2", (False, True)),
            saturate=self.one("saturate", (True, False)) if k is None else True, carrier=k,
        )  # fmt: skip

    def operand(self, name: str, rows: int, cols: int, fmt: Format, block: str) -> Operand:
        """Codes of normal numbers with scales around 1; sometimes a transposed view."""
        values = torch.randn(rows, cols, generator=self.bits) * 3
        codes = fmt.encode(values)
        if self.one(f"{name} layout", ("contiguous", "contiguous", "transposed")) == "transposed":
            codes = codes.t().contiguous().t()
        grid = get_block(block).grid(rows, cols)
        return Operand(codes, torch.rand(grid, generator=self.bits) + 0.01, fmt)
