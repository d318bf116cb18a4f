"""decode_attention: the newest token against 8-bit keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8kernels.formats import Format, get_format
from fp8kernels.kernels.decode_attention import HeadCodes

from .case import Case, Shape, device_of, in_turn, pick, text
from .check import tolerance

LLAMA_8B = (1, 32, 8, 4096, 128)  # batch, heads, heads of keys, tokens, width: Llama-3-8B with a context of 4k
SMALL = (1, 8, 2, 512, 64)
DRAWN = 1 << 16  # numbers that are drawn for a tensor; they repeat
LAYERS = 8  # caches that take turns, as the layers of a model do, so that none is read from the processor's cache


def versus_sdpa(fmt: str, shape: Shape = LLAMA_8B, backend: str = "cpu") -> Case:
    """Against torch's scaled_dot_product_attention on bf16, the queries of a group packed as rows.

    Packing is what transformers does for one token; without it torch's CPU kernel reads the keys of a group for every
    query anew, and takes many times as long.
    """
    batch, heads, kv_heads, tokens, width = shape
    f, device = get_format(fmt), device_of(backend)
    q = torch.randn(batch, heads, 1, width, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    packed = q.view(batch, kv_heads, heads // kv_heads, width)
    ours, theirs = [], []
    for layer in range(LAYERS):
        k, v = numbers(layer, (batch, kv_heads, tokens, width), device)
        keys, values = (HeadCodes(*coded(x, f)) for x in (k, v))
        args = (q, keys, values, f, width**-0.5, None)
        chosen = pick("decode_attention", backend, *args)
        ours.append(lambda run=chosen.run, args=args: run(*args))
        theirs.append(lambda k=k, v=v: torch.nn.functional.scaled_dot_product_attention(packed, k, v))

    def check() -> None:
        want, bound = tolerance.attention_bound(
            q.cpu(), *(HeadCodes(*(x.cpu() for x in each)) for each in (keys, values)), f, width**-0.5, None
        )
        tolerance.bounded(chosen.run(*args).cpu(), want, bound)

    elements = 2 * batch * kv_heads * tokens * width
    return Case(
        "attention", "decode attention, one token", fmt, chosen.name, text(shape), "torch SDPA bf16, group packed",
        in_turn(ours), in_turn(theirs), check, (f"decode_attention/{chosen.name}",),
        moved=elements, baseline_moved=2 * elements, device=device, calls=LAYERS,
    )  # fmt: skip


def numbers(seed: int, shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Normal keys and values in bf16, which repeat."""
    drawn = torch.randn(2, DRAWN, generator=torch.Generator().manual_seed(seed)).to(device, torch.bfloat16)
    return filled(drawn[0], shape), filled(drawn[1], shape)


def coded(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Codes of such numbers, and a scale for each head."""
    scale = x.new_full(x.shape[:2], 4.0 / fmt.target, dtype=torch.float32)
    return filled(fmt.encode(x.flatten()[:DRAWN].float() / scale[0, 0]), x.shape), scale


def filled(x: Tensor, shape: Shape) -> Tensor:
    count = torch.Size(shape).numel()
    return x.repeat(-(-count // x.numel()))[:count].reshape(shape).contiguous()


def test_decode_attention(fmt: str, shape: Shape, backend: str, race: Callable[[Case], None]) -> None:
    race(versus_sdpa(fmt, shape, backend))
