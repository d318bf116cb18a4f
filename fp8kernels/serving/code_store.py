"""Rows of 8-bit codes that grow: the keys, or the values, of one attention layer."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format

BLOCK = 64  # tokens a store grows by, at least
SPARE = 32  # a long store grows by one part in so many of itself: 3 % of memory, and each row is copied few times


def aim(fmt: Format) -> float:
    """Where a scale puts the amax that it was made from: the format's target, or half its largest value if less."""
    return min(fmt.target, fmt.max / 2)


class CodeStore:
    """codes uint8 [B, KH, capacity, D] and one scale fp32 [B, KH] a sequence and head, with x ≈ codes * scale.

    fmt      what the codes mean
    scale    calibrated scales fp32 [KH]; None takes that of the first rows that are appended and not all zero
    length   rows that are filled
    recoded  how often a head was coded anew because a number did not fit

    A scale puts the amax of the first rows at the format's target or at half its largest value, whichever is less, so
    that later rows may be larger. One that does not fit all the same makes its head be coded anew, with a scale larger
    by a power of two. NaN and Inf stay what they are; where the format has no Inf, NaN takes its place.
    """

    def __init__(self, fmt: Format, scale: Tensor | None = None) -> None:
        self.fmt, self.given = fmt, scale
        self.codes: Tensor | None = None
        self.scale: Tensor | None = None
        self.length = self.recoded = 0
        self.aim = aim(fmt)
        self._open = True  # some scale is 0: not known yet

    @property
    def nbytes(self) -> int:
        """Bytes of codes, room to grow included, and scales."""
        return 0 if self.codes is None or self.scale is None else self.codes.nbytes + self.scale.nbytes

    def append(self, x: Tensor) -> None:
        """Code rows x [B, KH, n, D] (fp32, bf16 or fp16) behind those that are there.

        raises   ValueError if x has other sizes than the rows that are there, or scales were given for other heads
        """
        x = x.detach()
        batch, heads, count, width = x.shape
        codes = self._with_room(x, self.length + count)
        rows = x.reshape(batch * heads, count * width)
        new, used, amax, overflowed = self._code(rows)
        if overflowed and self._make_fit(x):
            new, used, amax, _ = self._code(rows)
        if self._open and count:
            assert self.scale is not None
            none = (amax.view(batch, heads) == 0) & (self.scale == 0)  # a head of zeros so far
            self.scale = known = torch.where(none, 0.0, used.view(batch, heads))
            self._open = bool((known == 0).any())
        codes[:, :, self.length : self.length + count] = new.view(batch, heads, count, width)
        self.length += count

    def _code(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Codes of rows [B * KH, n], the scales used and amax [B * KH, 1], and whether a number was too large."""
        assert self.scale is not None
        codes, _, used, amax, counts = torch.ops.fp8kernels.quantize(
            rows, self.scale.view(-1, 1), self.fmt.name, "row", self.aim, 0, False, False, False, None
        )
        return codes, used, amax, bool(counts[1])

    def _make_fit(self, x: Tensor) -> bool:
        """Code the heads anew in which a finite number of x is too large; returns whether there are any."""
        assert self.codes is not None and self.scale is not None
        x = x.float()
        amax = torch.where(x.isfinite(), x.abs(), 0.0).amax((2, 3))  # [B, KH]
        over = (amax / self.scale >= self.fmt.overflow_at) & (self.scale > 0)
        if not bool(over.any()):
            return False
        ratio = torch.exp2(torch.ceil(torch.log2(amax[over] / (self.scale[over] * self.aim))))  # [n]
        larger = self.scale[over] * ratio
        old = self.codes[:, :, : self.length][over]  # [n, length, D]
        numbers = self.fmt.decode(old) * self.scale[over][:, None, None]
        coded = torch.ops.fp8kernels.quantize(
            numbers.flatten(1), larger[:, None], self.fmt.name, "row", self.aim, 0, False, False, False, None
        )[0]
        self.codes[:, :, : self.length][over] = coded.view(old.shape)
        self.scale = self.scale.masked_scatter(over, larger)
        self.recoded += int(over.sum())
        return True

    def _with_room(self, x: Tensor, needed: int) -> Tensor:
        """The codes, grown so that `needed` rows find room."""
        batch, heads, _, width = x.shape
        if self.codes is None or self.scale is None:
            self.scale = self._first_scale(x)
            self.codes = x.new_empty(batch, heads, -(-needed // BLOCK) * BLOCK, width, dtype=torch.uint8)
        elif (batch, heads, width) != (self.codes.shape[0], self.codes.shape[1], self.codes.shape[3]):
            raise ValueError(
                f"rows {list(x.shape)} do not continue a cache of {self.codes.shape[0]} sequences, "
                f"{self.codes.shape[1]} heads and width {self.codes.shape[3]}; begin a new cache"
            )
        elif needed > self.codes.shape[2]:
            step = max(BLOCK, self.length // SPARE // BLOCK * BLOCK)
            capacity = self.length + -(-(needed - self.length) // step) * step
            grown = self.codes.new_empty(batch, heads, capacity, width)
            grown[:, :, : self.length] = self.codes[:, :, : self.length]
            self.codes = grown
        return self.codes

    def _first_scale(self, x: Tensor) -> Tensor:
        batch, heads = x.shape[:2]
        if self.given is None:
            return torch.zeros(batch, heads, dtype=torch.float32, device=x.device)
        if tuple(self.given.shape) != (heads,):
            raise ValueError(f"scales {list(self.given.shape)} were given for {heads} heads of keys and values")
        self._open = bool((self.given == 0).any())
        return self.given.to(x.device, torch.float32).expand(batch, heads).contiguous()

    def filled(self) -> Tensor:
        """The codes that are there: uint8 [B, KH, length, D], a view."""
        assert self.codes is not None
        return self.codes[:, :, : self.length]

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences, in this order; one may come more than once."""
        if self.codes is not None and self.scale is not None:
            sequences = sequences.to(self.codes.device)
            self.codes, self.scale = self.codes[sequences], self.scale[sequences]

    def repeat(self, times: int) -> None:
        """Each sequence so many times, side by side."""
        if self.codes is not None:
            self.select(torch.arange(self.codes.shape[0]).repeat_interleave(times))

    def clear(self) -> None:
        """Forget everything but given scales."""
        self.codes = self.scale = None
        self.length, self._open = 0, True
