"""Attention for models of transformers that reads 8-bit keys and values as they are: attention "fp8kernels".

A cache of codes hands `CachedTensor`s to the model, which passes them on to attention. There, few queries go to the
verb decode_attention; everything else goes to transformers' own "sdpa", with the numbers that the codes stand for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..formats import Format
from ..ops import decode_attention

NAME = "fp8kernels"
MOST_QUERIES = 16  # beyond it decoding once for all queries is cheaper than once for every four
ON = ("cpu",)  # where decode_attention has a kernel; elsewhere decoding and torch's own attention are faster
UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")  # arguments of attention that the verb has not


class CachedTensor(torch.Tensor):
    """Codes of a cache that pass for keys or values [B, KH, T, D] of the model's dtype.

    codes  uint8 [B, KH, T, D], a view into the cache; scale fp32 [B, KH]; fmt

    Every operation but attention sees the decoded numbers, so a model that looks at its keys works too. It cannot be
    written in place.
    """

    codes: Tensor
    scale: Tensor
    fmt: Format

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # results are plain tensors

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, fmt: Format, dtype: torch.dtype) -> CachedTensor:
        out: CachedTensor = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)
        out.codes, out.scale, out.fmt = codes, scale, fmt
        return out

    def decode(self) -> Tensor:
        """The numbers that the codes stand for, in the dtype that this tensor shows."""
        batch, heads = self.codes.shape[:2]
        matrix = self.codes.reshape(batch * heads, -1)
        out: Tensor = torch.ops.fp8kernels.dequantize(matrix, self.scale.view(-1, 1), self.fmt.name, self.dtype)
        return out.view(self.codes.shape)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return CachedTensor(args[0].codes, args[0].scale, args[0].fmt, args[0].dtype)
        if func._schema.is_mutable:
            raise RuntimeError(f"{func} would write into the 8-bit cache: write into a copy (.clone())")
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CachedTensor({tuple(self.shape)}, {self.dtype}, {self.fmt}, device={str(self.device)!r})"


def plain(x: Any) -> Any:
    """x, decoded if it is codes of a cache."""
    return x.decode() if isinstance(x, CachedTensor) else x


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,  # noqa: FBT001 - transformers names the arguments
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls with query [B, H, Q, D], and key and value [B, KH, T, D].

    returns  [B, Q, H, D] and None in place of weights
    """
    if isinstance(key, CachedTensor) and isinstance(value, CachedTensor):
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if why_not(query, key, value, attention_mask, dropout, kwargs, causal=causal) is None:
            out = decode_attention(
                query, key.codes, key.scale, value.codes, value.scale, key.fmt, scaling=scaling, mask=attention_mask
            )  # [B, H, Q, D]
            return out.transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module,
        query,
        plain(key),
        plain(value),
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )


def why_not(
    query: Tensor,
    key: CachedTensor,
    value: CachedTensor,
    mask: Tensor | None,
    dropout: float,
    more: dict[str, Any],
    *,
    causal: bool,
) -> str | None:
    """Why these codes are decoded for transformers' own attention instead, or None."""
    if query.device.type not in ON:
        return f"decode_attention has no kernel for {query.device.type}"
    if query.shape[2] > MOST_QUERIES:
        return f"{query.shape[2]} queries: decoding once is cheaper from {MOST_QUERIES + 1} on"
    if key.shape[3] != value.shape[3]:
        return f"keys are {key.shape[3]} wide and values {value.shape[3]}"
    if dropout:
        return f"dropout is {dropout}"
    if query.requires_grad:
        return "the query wants a gradient"
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[3] != key.shape[2]):
        return f"the mask is {mask.dtype} {list(mask.shape)}"
    if mask is None and query.shape[2] > 1 and not causal:
        return "every query sees every token"
    unknown = [name for name in UNKNOWN if more.get(name) is not None]
    return f"{', '.join(unknown)} is given" if unknown else None


def register() -> str:
    """Make the attention known to transformers; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
