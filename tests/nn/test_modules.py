"""The drop-in modules against the float modules they stand for."""

from __future__ import annotations

import itertools

import pytest
import torch
from recipes import ANYWHERE
from torch import Tensor, nn
from torch.nn import functional as F

import fp8kernels
from fp8kernels import convert, get_recipe, quantize
from fp8kernels.telemetry import sqnr_db

# A product of two operands with SQNR s each has s - 3 dB; a Gaussian quantized with one scale has 31.5 dB (HiF8, E4M3).
PRODUCT_DB = 26.0


@pytest.mark.parametrize("recipe", ANYWHERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(256,), (5, 256), (2, 3, 256), (0, 256)])
def test_linear(recipe: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    plain = nn.Linear(256, 128, dtype=dtype)
    x = torch.randn(shape, dtype=dtype)
    expected = F.linear(x.float(), plain.weight.float(), plain.bias.float())
    out = convert(plain, recipe, verbose=False)(x)
    assert (out.shape, out.dtype) == (expected.shape, dtype)
    if x.numel():
        assert sqnr_db(expected, out) > PRODUCT_DB


def test_linear_is_a_linear_and_stands_alone() -> None:
    layer = fp8kernels.nn.Linear(64, 32, recipe="e4m3-row")
    assert isinstance(layer, nn.Linear)
    assert "fp8='e4m3-row'" in repr(layer)
    out = layer(torch.randn(3, 64))
    out.sum().backward()
    assert layer.weight.grad is not None
    plain = fp8kernels.revert(layer)
    assert type(plain) is nn.Linear
    assert list(plain.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("recipe", ANYWHERE)
def test_gradients_are_those_of_the_decoded_operands(recipe: str) -> None:
    """Straight through: dx = g @ decode(w), dw = g.T @ decode(x), to the roundings of fp32."""
    layer = convert(nn.Linear(256, 128), recipe, verbose=False)
    x, g = torch.randn(6, 256, requires_grad=True), torch.randn(6, 128)
    layer(x).backward(g)
    rules = get_recipe(recipe)
    x_decoded = quantize(x.detach(), rules.input.fmt, block=rules.input.block).dequantize()
    w_decoded = quantize(layer.weight.detach(), rules.weight.fmt, block=rules.weight.block).dequantize()
    torch.testing.assert_close(x.grad, g @ w_decoded, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, g.t() @ x_decoded, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, g.sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("fmt", "db"), [("e5m2", 20.0), ("hif8", 20.0), ("e4m3", 20.0)])
@pytest.mark.parametrize("recipe", ANYWHERE)
def test_eight_bit_gradients(recipe: str, fmt: str, db: float) -> None:
    """E5M2 and HiF8 at target 224 have 25.6 dB; with the other operand's 31.5 dB the product keeps more than 20."""
    plain = nn.Linear(256, 128)
    x = torch.randn(64, 256, requires_grad=True)
    plain(x).square().sum().backward()
    expected = x.grad, plain.weight.grad
    x.grad = plain.weight.grad = None
    layer = convert(plain, get_recipe(recipe).with_format(grad=fmt), verbose=False)
    layer(x).square().sum().backward()
    for ours, theirs in zip((x.grad, layer.weight.grad), expected, strict=True):
        assert sqnr_db(theirs, ours) > db


def test_autocast_decides_the_output() -> None:
    layer = convert(nn.Linear(64, 32), verbose=False)
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad is not None
    assert (x.grad.dtype, layer.weight.grad.dtype) == (torch.float32, torch.float32)


def test_the_backward_keeps_codes_only() -> None:
    """Saved for the backward: one byte an element of input and weight, not two or four."""
    layer = convert(nn.Linear(256, 256), verbose=False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(512, 256, requires_grad=True))
    elements = 512 * 256 + 256 * 256
    assert elements <= sum(t.nbytes for t in saved) <= elements + 64


CONVOLUTIONS = [
    (nn.Conv1d, 3, (8,), (40,)),
    (nn.Conv2d, 3, (4, 6), (17, 18)),
    (nn.Conv3d, 1, (2, 4, 4), (6, 9, 8)),
]


@pytest.mark.parametrize(("kind", "channels", "kernel", "space"), CONVOLUTIONS)
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "single"])
def test_patch_embeddings(kind: type, channels: int, kernel: tuple, space: tuple, *, batched: bool) -> None:
    conv = kind(channels, 32, kernel, kernel)
    x = torch.randn(*([2] if batched else []), channels, *space, requires_grad=True)
    expected = conv(x)
    expected.square().sum().backward()
    gradient, x.grad = x.grad, None
    convert(conv, verbose=False)
    assert isinstance(conv, kind)
    out = conv(x)
    out.square().sum().backward()
    assert out.shape == expected.shape
    assert sqnr_db(expected, out) > PRODUCT_DB
    assert sqnr_db(gradient, x.grad) > PRODUCT_DB - 3


def test_patch_embedding_refuses_what_does_not_fit() -> None:
    conv = convert(nn.Conv2d(3, 8, 4, 4), verbose=False)
    for shape in ((1, 4, 8, 8), (1, 3, 3, 8), (3, 8)):
        with pytest.raises(ValueError, match=r"does not fit a patch embedding: \[batch, 3,"):
            conv(torch.randn(shape))


ATTENTION = list(itertools.product([True, False], [True, False], [True, False]))


@pytest.mark.parametrize(("batch_first", "same", "weights"), ATTENTION)
def test_attention(*, batch_first: bool, same: bool, weights: bool) -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=batch_first)
    q = torch.randn(3, 7, 64)
    k = q if same else torch.randn(3, 9, 64)
    if not batch_first:
        q, k = (q.transpose(0, 1), k.transpose(0, 1))
        k = q if same else k
    padding = torch.zeros(3, 7 if same else 9, dtype=torch.bool)
    padding[1, -2:] = True
    call = {"key_padding_mask": padding, "need_weights": weights}
    expected, expected_weights = attention(q, k, k, **call)
    convert(attention, verbose=False)
    out, out_weights = attention(q, k, k, **call)
    assert out.shape == expected.shape
    assert sqnr_db(expected, out) > 20  # scores, values and out-projection add their noise
    if weights:
        assert expected_weights is not None
        assert out_weights.shape == expected_weights.shape
        assert sqnr_db(expected_weights, out_weights) > 20
    out.square().sum().backward()
    assert attention.in_proj_weight.grad is not None
    assert (attention.fp8_pending[:2] > 0).all()


def test_attention_of_other_widths_masks_and_extras() -> None:
    attention = nn.MultiheadAttention(32, 2, kdim=24, vdim=40, add_bias_kv=True, add_zero_attn=True)
    q, k, v = torch.randn(5, 2, 32), torch.randn(6, 2, 24), torch.randn(6, 2, 40)
    mask = torch.triu(torch.full((5, 6), -torch.inf), 1)
    expected, expected_weights = attention(q, k, v, attn_mask=mask, average_attn_weights=False)
    convert(attention, verbose=False)
    out, weights = attention(q, k, v, attn_mask=mask, average_attn_weights=False)
    assert weights.shape == expected_weights.shape
    assert sqnr_db(expected, out) > 20
    assert attention(q[:, 0], k[:, 0], v[:, 0])[0].shape == (5, 32)
    with pytest.raises(ValueError, match="is_causal=True needs attn_mask"):
        attention(q, k, v, is_causal=True)


def test_a_transformer_encoder_goes_through_the_layers_also_in_eval() -> None:
    """torch's fused encoder layer reads the weights itself; a converted one must not take it."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        expected = encoder(x)
        out = convert(encoder, verbose=False)(x)
        assert not torch.equal(out, expected)
        assert sqnr_db(expected, out) > 20
        assert torch.equal(fp8kernels.revert(encoder)(x), expected)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.randn(4, 63), ValueError, r"\(4, 63\) and weight \(32, 64\)"),
        (torch.randn(4, 64, dtype=torch.float64), TypeError, "float64"),
        (torch.ones(4, 64, dtype=torch.int64), TypeError, "int64"),
        (torch.randn(4, 64, device="meta"), ValueError, "input is on meta, weight on cpu"),
    ],
)
def test_bad_input_names_the_layer(x: Tensor, error: type[Exception], says: str) -> None:
    net = convert(nn.Sequential(nn.Linear(64, 32)), verbose=False)
    with pytest.raises(error, match=rf"layer '0': .*{says}"):
        net(x)


def test_only_the_bias_is_trained() -> None:
    layer = convert(nn.Sequential(nn.Linear(32, 16)), verbose=False)[0]
    layer.weight.requires_grad_(False)
    g = torch.randn(4, 16)
    layer(torch.randn(4, 32)).backward(g)
    assert torch.equal(layer.bias.grad, g.sum(0))
    assert layer.weight.grad is None
