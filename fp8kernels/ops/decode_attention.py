"""The verb decode_attention: few queries against 8-bit keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Format, get_format
from ..kernels.decode_attention import HeadCodes
from . import check
from .library import register
from .table import choose


def decode_attention(
    q: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    fmt: Format | str,
    *,
    scaling: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(q @ k.T * scaling) @ v over keys and values that are read as codes, once, and never written out.

    q            [B, H, Q, D] fp32, bf16 or fp16: the newest Q tokens, few; any strides
    key_codes    uint8 [B, KH, T, D], any strides, so that a cache with room to spare is given as `codes[:, :, :T]`. KH
                 divides H: query heads h * H / KH and on read head h
    key_scale    fp32 [B, KH], one a sequence and head
    value_codes  uint8 [B, KH, T, V]; value_scale fp32 [B, KH]
    fmt          "hif8", "e4m3", "e5m2" or a Format
    scaling      of the scores; D**-0.5 by default
    mask         bool, broadcasts to [B, 1 or H, Q, T], True where a query sees a token; None: query i of Q sees the
                 tokens up to T - Q + i
    returns      [B, H, Q, V] in the dtype of q, without a gradient; 0 for a query that sees no token
    error        of fp32 sums and one rounding to the dtype of q: docs/NUMERICS.md. The same bits for any number of
                 threads
    raises       TypeError for other dtypes; ValueError naming the shapes that do not fit together
    source       online softmax as in arXiv 1805.02867, splits of the tokens as in Flash-Decoding (Dao et al. 2023)
    """
    fmt = get_format(fmt)
    check.float_tensor(q, "decode_attention", "q")
    shapes = f"q {list(q.shape)}, keys {list(key_codes.shape)}, values {list(value_codes.shape)}"
    if not q.ndim == key_codes.ndim == value_codes.ndim == 4:
        raise ValueError(f"decode_attention: {shapes}: each has four dimensions [batch, heads, tokens, width]")
    if key_codes.dtype != torch.uint8 or value_codes.dtype != torch.uint8:
        raise TypeError(f"decode_attention: codes are {key_codes.dtype} and {value_codes.dtype}, they are uint8")
    batch, kv_heads = key_codes.shape[:2]
    if key_codes.shape[:3] != value_codes.shape[:3] or batch != q.shape[0] or key_codes.shape[3] != q.shape[3]:
        raise ValueError(f"decode_attention: {shapes}: batch, tokens and the width of q and keys must be the same")
    if kv_heads == 0 or q.shape[1] % kv_heads:
        raise ValueError(f"decode_attention: {shapes}: the heads of the keys must divide those of q")
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if scale.dtype != torch.float32 or tuple(scale.shape) != (batch, kv_heads):
            raise ValueError(
                f"decode_attention: {name} is {scale.dtype} {list(scale.shape)}, it is fp32 {[batch, kv_heads]}"
            )
    if mask is not None:
        _check_mask(mask, q, key_codes.shape[2])
    check.same_device(
        "decode_attention", q=q, keys=key_codes, key_scale=key_scale, values=value_codes, value_scale=value_scale,
        mask=mask,
    )  # fmt: skip
    scaling = q.shape[3] ** -0.5 if scaling is None else float(scaling)
    out: Tensor = torch.ops.fp8kernels.decode_attention(
        q.detach(), key_codes, key_scale, value_codes, value_scale, fmt.name, scaling, mask
    )
    return out


def _check_mask(mask: Tensor, q: Tensor, tokens: int) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"decode_attention: mask is {mask.dtype}, it is bool, True where a query sees a token")
    wanted = (q.shape[0], q.shape[1], q.shape[2], tokens)
    fits = mask.ndim == 4 and all(have in (1, want) for have, want in zip(mask.shape, wanted, strict=True))
    if not fits:
        raise ValueError(f"decode_attention: mask is {list(mask.shape)}, it must broadcast to {list(wanted)}")


def _decode_attention(
    q: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    fmt: str,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    keys, values = HeadCodes(key_codes, key_scale), HeadCodes(value_codes, value_scale)
    args = (q, keys, values, get_format(fmt), scaling, mask)
    out: Tensor = choose("decode_attention", *args).run(*args)
    return out


def _fake(
    q: Tensor,
    key_codes: Tensor,
    key_scale: Tensor,
    value_codes: Tensor,
    value_scale: Tensor,
    fmt: str,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    return q.new_empty(*q.shape[:3], value_codes.shape[3])


register(
    "decode_attention(Tensor q, Tensor key_codes, Tensor key_scale, Tensor value_codes, Tensor value_scale, str fmt, "
    "float scaling, Tensor? mask) -> Tensor",
    _decode_attention,
    _fake,
)
