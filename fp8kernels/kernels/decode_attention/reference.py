"""What decode_attention means, in plain torch and fp64.

source  attention as in arXiv 1706.03762, with groups of queries on one head of keys as in arXiv 2305.13245
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from . import HeadCodes


def why_not(
    q: Tensor, keys: HeadCodes, values: HeadCodes, fmt: Format, scaling: float, mask: Tensor | None
) -> str | None:
    """The reference takes everything that the verb takes."""
    return None


def decode_attention(
    q: Tensor, keys: HeadCodes, values: HeadCodes, fmt: Format, scaling: float, mask: Tensor | None
) -> Tensor:
    """softmax(q @ k.T * scaling) @ v, with k and v the codes times their scales.

    q        fp32, bf16 or fp16 [B, H, Q, D]; KH divides H, and heads h * H / KH and on read keys of head h
    mask     bool, broadcasts to [B, H, Q, T], True where a query sees a token; None: query i of Q sees the tokens up to
             T - Q + i
    returns  [B, H, Q, V] in the dtype of q; 0 for a query that sees no token. A token that is not seen weighs 0, so
             that its NaN or Inf still shows (0 * NaN), as in torch's own attention
    """
    (batch, heads, queries, _), (tokens, width) = q.shape, values.codes.shape[2:]
    groups = heads // keys.codes.shape[1]
    k, v = (_decoded(each, fmt).repeat_interleave(groups, 1) for each in (keys, values))  # [B, H, T, D]
    scores = q.double() @ k.transpose(-1, -2) * scaling  # [B, H, Q, T]
    if tokens == 0:
        return q.new_zeros(batch, heads, queries, width)
    if mask is None:
        mask = torch.ones(queries, tokens, dtype=torch.bool, device=q.device).tril(tokens - queries)
    scores = scores.masked_fill(~mask, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - torch.where(largest == -torch.inf, 0.0, largest)).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights @ v / torch.where(total == 0, 1.0, total)).to(q.dtype)


def _decoded(of: HeadCodes, fmt: Format) -> Tensor:
    return fmt.decode(of.codes).double() * of.scale.double()[:, :, None, None]
