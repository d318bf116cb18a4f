"""The verb decode_attention: what it refuses, in words; its schema, under torch.compile too; who runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerance import attention_bound, bounded
from torch import Tensor

import fp8kernels
from fp8kernels.formats import E4M3, HIF8
from fp8kernels.kernels.decode_attention import HeadCodes


def arguments(batch: int = 2, kv_heads: int = 2, tokens: int = 70, width: int = 32) -> tuple[Any, ...]:
    keys, values = (HIF8.encode(torch.randn(batch, kv_heads, tokens, width) * 4) for _ in range(2))
    return torch.randn(batch, 4, 1, width), keys, torch.rand(2, 2) + 0.1, values, torch.rand(2, 2) + 0.1, "hif8"


def test_the_default_scaling_is_that_of_the_width() -> None:
    q, keys, key_scale, values, value_scale, _ = args = arguments()
    out = fp8kernels.decode_attention(*args)
    heads = HeadCodes(keys, key_scale), HeadCodes(values, value_scale)
    bounded(out, *attention_bound(q, *heads, HIF8, 32**-0.5, None))
    assert torch.equal(out, fp8kernels.decode_attention(*args, scaling=32**-0.5))
    assert not torch.equal(out, fp8kernels.decode_attention(*args, scaling=1.0))
    assert not torch.equal(out, fp8kernels.decode_attention(*args[:-1], E4M3))


def test_values_of_another_width_and_a_mask_for_each_head_take_the_reference() -> None:
    q, keys, key_scale, values, value_scale, _ = args = arguments()
    mask = torch.rand(2, 4, 1, 70) < 0.5
    said = fp8kernels.explain("decode_attention", *args, mask=mask)
    assert said.kernel == "reference" and "head to head" in said[0].reason
    each = [
        fp8kernels.decode_attention(q[:, h : h + 1], keys[:, h // 2 :][:, :1], key_scale[:, h // 2 :][:, :1],
                                    values[:, h // 2 :][:, :1], value_scale[:, h // 2 :][:, :1], "hif8",
                                    mask=mask[:, h : h + 1])
        for h in range(4)
    ]  # fmt: skip
    assert torch.allclose(fp8kernels.decode_attention(*args, mask=mask), torch.cat(each, 1), atol=1e-4)
    narrow = (q, keys, key_scale, values[..., :24], value_scale, "hif8")
    assert fp8kernels.explain("decode_attention", *narrow).kernel == "reference"
    assert fp8kernels.decode_attention(*narrow).shape == (2, 4, 1, 24)
    assert fp8kernels.explain("decode_attention", *args).kernel == "cpu"


def test_what_is_refused() -> None:
    q, keys, key_scale, values, value_scale, fmt = arguments()

    def refused(error: type[Exception], said: str, *given: Any, **more: Any) -> None:
        with pytest.raises(error, match=said):
            fp8kernels.decode_attention(*given, **more)

    rest = key_scale, values, value_scale, fmt
    refused(TypeError, "q is torch.float64", q.double(), keys, *rest)
    refused(TypeError, "codes are torch.float32", q, keys.float(), *rest)
    refused(ValueError, r"q \[4, 1, 32\].*four dimensions", q[0], keys, *rest)
    refused(ValueError, "batch, tokens and the width", q, keys[:, :, :3], *rest)
    refused(ValueError, "batch, tokens and the width", q[:1], keys, *rest)
    refused(ValueError, "must divide those of q", q[:, :3], keys, *rest)
    refused(ValueError, r"key_scale is torch.float32 \[2\], it is fp32 \[2, 2\]", q, keys, key_scale[0], *rest[1:])
    refused(ValueError, "value_scale is torch.float64", q, keys, key_scale, values, value_scale.double(), fmt)
    refused(ValueError, "unknown format", q, keys, key_scale, values, value_scale, "int8")
    refused(TypeError, "mask is torch.float32", q, keys, *rest, mask=torch.zeros(1, 1, 1, 70))
    refused(
        ValueError, r"mask is \[1, 1, 1, 60\].*\[2, 4, 1, 70\]", q, keys, *rest, mask=torch.ones(1, 1, 1, 60).bool()
    )
    refused(ValueError, "different devices", q.to("meta"), keys, *rest)


def test_it_compiles_whole_and_gives_no_gradient() -> None:
    q, keys, key_scale, values, value_scale, fmt = arguments()

    def attend(x: Tensor) -> Tensor:
        return fp8kernels.decode_attention(x * 2, keys, key_scale, values, value_scale, fmt) + 1

    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(q), attend(q))
    assert not attend(q.requires_grad_()).requires_grad
