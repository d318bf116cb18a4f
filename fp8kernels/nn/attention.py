"""MultiheadAttention whose projections compute on 8-bit codes."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .function import scaled_linear
from .high import high_linear
from .state import ScaledLayer


class MultiheadAttention(ScaledLayer, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention; the in-projection (one state for q, k and v) and the out-projection are 8-bit.

    Arguments and results are those of torch's module. The out-projection is an fp8kernels Linear of its own.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True needs attn_mask, as in torch.nn.MultiheadAttention")
        batched, same = query.ndim == 3, query is key and key is value
        if not batched:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if self.batch_first and batched:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if same:
            key = value = query
        q, k, v = self._project(query, key, value, same)  # [L, B, E]
        (length, batch, embed), source = q.shape, k.shape[0]
        mask = _mask(key_padding_mask, attn_mask, batch, self.num_heads, q.dtype)  # broadcasts to [B, H, L, S]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(1, batch, -1)])
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(1, batch, -1)])
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(1, batch, embed)]) for t in (k, v))
        if mask is not None and k.shape[0] > source:
            mask = F.pad(mask, (0, k.shape[0] - source))
        heads = [t.reshape(t.shape[0], batch, self.num_heads, self.head_dim).permute(1, 2, 0, 3) for t in (q, k, v)]
        dropout = self.dropout if self.training else 0.0
        attended, weights = _attend(heads[0], heads[1], heads[2], mask, dropout, need_weights)
        out = self.out_proj(attended.permute(2, 0, 1, 3).reshape(length, batch, embed))  # [L, B, E]
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return out.transpose(0, 1) if self.batch_first else out, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> list[Tensor]:
        if self._qkv_same_embed_dim and same:
            return list(self._linear(query, cast(Tensor, self.in_proj_weight), self.in_proj_bias).chunk(3, -1))
        if self._qkv_same_embed_dim:
            weights = list(cast(Tensor, self.in_proj_weight).chunk(3))
        else:
            weights = [cast(Tensor, w) for w in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)]
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        return [self._linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return (scaled_linear if self.fp8_on else high_linear)(self, x, weight, bias)


def _mask(padding: Tensor | None, mask: Tensor | None, batch: int, heads: int, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one additive mask that broadcasts to [B, H, L, S]."""

    def additive(m: Tensor) -> Tensor:
        if m.dtype != torch.bool:
            return m.to(dtype)
        return torch.zeros(m.shape, dtype=dtype, device=m.device).masked_fill(m, -torch.inf)

    parts = []
    if padding is not None:
        parts.append(additive(padding)[:, None, None, :])  # [B, 1, 1, S]
    if mask is not None:
        parts.append(additive(mask) if mask.ndim == 2 else additive(mask).reshape(batch, heads, *mask.shape[-2:]))
    return sum(parts[1:], parts[0]) if parts else None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """[B, H, L, D] each -> [B, H, L, D], and the weights [B, H, L, S] where they are asked for."""
    if not need_weights:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return weights.to(v.dtype) @ v, weights
