"""An 8-bit format is a table of 256 numbers; everything else about it follows from the table."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """What each of the 256 codes stands for, and how a number between two of them is rounded.

    name         the name users type
    code_id      the number the compiled kernels know the format by
    values       256 floats, indexed by code
    ties         "away" (from zero) or "even" (the neighbour whose code is even)
    beyond       the finite value that would follow the largest one; numbers past the midpoint overflow
    nan_code     the one code that NaN encodes to
    target       default amax of scaled activations and weights
    grad_target  default amax of scaled gradients
    carrier      torch dtype with the same codes, or None (the codes then travel as uint8)
    """

    name: str
    code_id: int
    values: tuple[float, ...] = field(repr=False)
    ties: str
    beyond: float
    nan_code: int
    target: float
    grad_target: float
    carrier: torch.dtype | None = None

    def __post_init__(self) -> None:
        if len(self.values) != 256:
            raise ValueError(f"format {self.name!r}: the table has {len(self.values)} values, it needs 256")
        if self.ties not in ("away", "even"):
            raise ValueError(f"format {self.name!r}: ties is {self.ties!r}, it is 'away' or 'even'")

    @cached_property
    def magnitudes(self) -> tuple[tuple[float, int], ...]:
        """The non-negative finite (value, code) pairs in ascending order of value."""
        pairs = ((value, code) for code, value in enumerate(self.values) if math.copysign(1, value) > 0)
        return tuple(sorted((value, code) for value, code in pairs if math.isfinite(value)))

    @cached_property
    def max(self) -> float:
        """The largest finite value."""
        return self.magnitudes[-1][0]

    @cached_property
    def smallest(self) -> float:
        """The smallest positive value."""
        return self.magnitudes[1][0]

    @cached_property
    def inf_code(self) -> int | None:
        """The code of +Inf, or None where the format has none."""
        return self.values.index(math.inf) if math.inf in self.values else None

    @cached_property
    def has_negative_zero(self) -> bool:
        return self.values[0x80] == 0.0

    @cached_property
    def overflow_at(self) -> float:
        """The smallest fp32 magnitude that overflows: it saturates, or becomes Inf or NaN."""
        midpoint = (self.max + self.beyond) / 2
        tie_goes_down = self.ties == "even" and self.magnitudes[-1][1] % 2 == 0
        if not tie_goes_down:
            return midpoint
        return float(
            torch.nextafter(torch.tensor(midpoint, dtype=torch.float32), torch.tensor(math.inf, dtype=torch.float32))
        )

    def table(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """The 256 values as a tensor [256]; fp32, bf16 and fp16 hold every value of every format exactly."""
        return torch.tensor(self.values, dtype=dtype, device=device)

    def decode(self, codes: Tensor) -> Tensor:
        """What the codes stand for: uint8 codes of any shape to fp32 of the same shape."""
        return self.table(device=codes.device)[codes.long()]

    def encode(self, y: Tensor, *, saturate: bool = True) -> Tensor:
        """Round to the nearest value of the table.

        y        fp32, bf16 or fp16, any shape
        returns  uint8 codes of the same shape
        error    |y - decode(code)| is at most half the gap between the neighbours of y, below overflow_at
        saturate True: overflow and Inf become the largest finite value of their sign. False: Inf, or NaN where
                 the format has no Inf. NaN becomes `nan_code` either way.
        """
        grid = torch.tensor([value for value, _ in self.magnitudes], dtype=torch.float64, device=y.device)  # [n]
        codes = torch.tensor([code for _, code in self.magnitudes], dtype=torch.uint8, device=y.device)  # [n]
        midpoints = (grid[1:] + grid[:-1]) / 2  # [n - 1] exact: the values have few bits
        magnitude = y.double().abs().contiguous()  # exact
        above = torch.searchsorted(midpoints, magnitude, right=True)  # a tie goes up, away from zero
        if self.ties == "even":
            below = torch.searchsorted(midpoints, magnitude)  # a tie goes down
            above = torch.where(codes[above.clamp(max=len(grid) - 1)] % 2 == 0, above, below)
        out = codes[above]
        overflow = magnitude >= self.overflow_at
        if saturate:
            out = torch.where(overflow, codes[-1], out)
        else:
            out = torch.where(overflow, self.nan_code if self.inf_code is None else self.inf_code, out)
        signed = torch.signbit(y) if self.has_negative_zero else torch.signbit(y) & (out != 0)
        out = torch.where(signed, out | 0x80, out)
        is_nan = torch.isnan(y)
        if not saturate and self.inf_code is None:
            is_nan = is_nan | overflow  # one NaN code, without a sign
        return torch.where(is_nan, self.nan_code, out).to(torch.uint8)

    def __repr__(self) -> str:
        return f"Format({self.name!r}, max={self.max:g}, target={self.target:g})"
