"""decode_attention on CPU cores: the compiled kernels of csrc/decode_attention (AVX-512, AVX2 or plain C++).

method  one pass over keys and values: codes are decoded in registers, and softmax runs along with a running maximum.
        Every 512 tokens give a partial result of their own; these are merged in order. README.md tells the ideas
limits  CPU tensors; keys and values of one width; a mask that is the same for all heads
equal   to the reference within the rounding of fp32 sums; the bits do not depend on the number of threads
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...formats import Format
from ..compiled import load
from . import HeadCodes

_cpu, MISSING = load("_cpu")

QUERY_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # QueryType of csrc/decode_attention
ALIGNED = 16  # floats in the 64 bytes that the workspace starts at a multiple of


def why_not(
    q: Tensor, keys: HeadCodes, values: HeadCodes, fmt: Format, scaling: float, mask: Tensor | None
) -> str | None:
    """Why these arguments cannot run here, or None."""
    if _cpu is None:
        return MISSING
    given = (q, *keys, *values) if mask is None else (q, *keys, *values, mask)
    if not all(x.is_cpu for x in given):
        return f"the tensors are on {', '.join(sorted({str(x.device) for x in given}))}: this kernel takes CPU tensors"
    if q.dtype not in QUERY_TYPES:
        return f"q is {q.dtype}: this kernel takes fp32, bf16 and fp16"
    if keys.codes.shape != values.codes.shape or keys.codes.shape[3] != q.shape[3]:
        return (
            f"q {list(q.shape)}, keys {list(keys.codes.shape)} and values {list(values.codes.shape)} differ in width: "
            "this kernel takes one width for all"
        )
    if mask is not None and mask.ndim == 4 and mask.shape[1] != 1:
        return f"mask {list(mask.shape)} differs from head to head: this kernel takes one mask for all heads"
    return None


def decode_attention(
    q: Tensor, keys: HeadCodes, values: HeadCodes, fmt: Format, scaling: float, mask: Tensor | None
) -> Tensor:
    """softmax(q @ k.T * scaling) @ v; see reference.py for every argument."""
    batch, heads, queries, width = q.shape
    kv_heads, tokens = keys.codes.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype)
    if out.numel() == 0:
        return out
    rows = heads // kv_heads * queries
    floats = _cpu.decode_attention_workspace(batch, kv_heads, rows, tokens, width)
    workspace = torch.empty(floats + ALIGNED, dtype=torch.float32)
    q = q if q.stride(3) == 1 else q.contiguous()
    k, v = (_plain(each) for each in (keys, values))
    address, mask_strides = 0, [0, 0]
    if mask is not None and tokens:
        mask = mask[:, 0] if mask.ndim == 4 else mask  # [B, Q, T], each may be 1 or missing
        mask = mask if mask.shape[-1] == tokens and mask.stride(-1) == 1 else mask.expand(*mask.shape[:-1], tokens)
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        mask = mask.expand(batch, queries, tokens)
        address, mask_strides = mask.data_ptr(), list(mask.stride()[:2])
    _cpu.decode_attention(
        q.data_ptr(),
        *q.stride()[:3],
        (k.codes.data_ptr(), *k.codes.stride()[:3], k.scale.data_ptr()),
        (v.codes.data_ptr(), *v.codes.stride()[:3], v.scale.data_ptr()),
        batch,
        kv_heads,
        heads // kv_heads,
        queries,
        tokens,
        width,
        scaling,
        address,
        *mask_strides,
        out.data_ptr(),
        workspace.data_ptr() + -workspace.data_ptr() % (4 * ALIGNED),
        QUERY_TYPES[q.dtype],
        fmt.code_id,
        torch.get_num_threads(),
    )
    return out


def _plain(of: HeadCodes) -> HeadCodes:
    """With a token's numbers side by side, and the scales dense."""
    return HeadCodes(of.codes if of.codes.stride(3) == 1 else of.codes.contiguous(), of.scale.contiguous())
