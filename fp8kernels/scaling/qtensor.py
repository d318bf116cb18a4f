"""A QTensor is codes, the scales that decode them, and what both mean."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..formats import Format
from .block import Block


@dataclass(frozen=True, eq=False)
class QTensor:
    """x ≈ codes * scale, block by block.

    codes    uint8, the shape of x, any strides
    scale    fp32 [M / rows, K / cols] with x seen as [M, K] (leading dimensions flattened)
    fmt      what a code stands for
    block    which elements share a scale
    codes_t  uint8 [K, M], the codes transposed and contiguous, where they were asked for
    """

    codes: Tensor
    scale: Tensor
    fmt: Format
    block: Block
    codes_t: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return self.codes.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """code * scale in fp32, bf16 or fp16, the shape of the codes."""
        out: Tensor = torch.ops.fp8kernels.dequantize(self.codes, self.scale, self.fmt.name, dtype)
        return out

    def t(self) -> QTensor:
        """The transposed matrix: a view, or the contiguous transposed codes where they were kept.

        raises   ValueError if this is not a matrix
        """
        if self.codes.ndim != 2:
            raise ValueError(f"t() takes a matrix, this QTensor has shape {tuple(self.shape)}")
        codes = self.codes.t() if self.codes_t is None else self.codes_t
        return QTensor(codes, self.scale.t(), self.fmt, self.block.transposed(), self.codes)

    def to(self, device: torch.device | str) -> QTensor:
        """The same on another device."""
        codes_t = None if self.codes_t is None else self.codes_t.to(device)
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), codes_t=codes_t)

    def float8(self) -> Tensor:
        """The codes as torch's own 8-bit dtype, a view.

        raises   TypeError where torch has none (HiF8)
        """
        if self.fmt.carrier is None:
            raise TypeError(f"torch has no dtype for {self.fmt.name!r}; its codes travel as uint8")
        return self.codes.view(self.fmt.carrier)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"QTensor({shape}, {self.fmt.name}, block={self.block.name!r}, device={str(self.device)!r})"
