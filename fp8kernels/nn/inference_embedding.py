"""An embedding that holds codes only, for serving; its codes may be those of the model's head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import dequantize  # noqa: F401  registers torch.ops.fp8kernels.dequantize
from .state import keep_dtypes


class InferenceEmbedding(nn.Module):
    """y[…] = decode(weight_codes[ids]): the rows that are asked for, and no others, are decoded.

    weight_codes  uint8 [num_embeddings, embedding_dim]; a tensor that a head may share
    weight_scale  fp32 [num_embeddings, 1]
    fmt           what a code stands for
    dtype         of the result: the one that the embedding had; `.to(dtype)` changes it
    ids           int64 or int32 [...]
    returns       [..., embedding_dim]
    raises        IndexError for an id outside the table, as torch.nn.Embedding
    """

    weight_codes: Tensor
    weight_scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, fmt: str, dtype: torch.dtype, *, padding_idx: int | None = None):
        super().__init__()
        self.num_embeddings, self.embedding_dim = codes.shape
        self.fmt, self.dtype, self.padding_idx = fmt, dtype, padding_idx
        self.register_buffer("weight_codes", codes)
        self.register_buffer("weight_scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        codes = nn.functional.embedding(ids, self.weight_codes)  # [..., embedding_dim] uint8
        scale = nn.functional.embedding(ids, self.weight_scale).reshape(-1, 1)  # [ids, 1] fp32
        out: Tensor = torch.ops.fp8kernels.dequantize(codes, scale, self.fmt, self.dtype)
        return out

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Codes and scales keep their dtypes; what `.to(dtype)` names is the dtype of results."""
        before = dict(self._buffers)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_codes.device)).dtype
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        return self

    def extra_repr(self) -> str:
        """What the layer's line in print(model) says."""
        return f"{self.num_embeddings}, {self.embedding_dim}, weight={self.fmt}"
