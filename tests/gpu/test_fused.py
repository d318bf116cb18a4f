"""Fused modules on a GPU: which layers get codes, that these are right, and what every reader's state says.

On a CPU the same tests run with the modules' own norms and activations.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fusions import handed
from intervals import coded_between, norm_gradients, normal, rounded
from nn.blocks import Block, Heads
from recipes import ANYWHERE
from tolerance import bounded
from torch import Tensor, nn

from fp8kernels import commit, convert, get_block, get_format
from fp8kernels.kernels.quantize import Quantized, Rounding
from fp8kernels.nn.coded import CodedTensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16]
DIM = 256


def model(kind: Callable[[int], nn.Module], recipe: str, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = kind(DIM)
    for norm in net.modules():
        if isinstance(norm, (nn.RMSNorm, nn.LayerNorm)):
            nn.init.normal_(norm.weight)
    return convert(net.to(device, dtype), recipe, verbose=False)


def batch(device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(2, 48, DIM) * 3).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", ANYWHERE)
def test_codes_and_gradients_of_a_norm(recipe: str, dtype: torch.dtype, device: str) -> None:
    net, x = model(Heads, recipe, device, dtype), batch(device, dtype).requires_grad_()
    y = net.norm(x)
    assert isinstance(y, CodedTensor)
    norm, _ = net.norm.fp8_norm(x)
    norm = norm._replace(weight=norm.weight.detach().cpu())
    rows = x.detach().cpu().reshape(-1, DIM)
    want = normal(rows, norm)
    error = rounded(want.y, want.y_error, dtype) if device == "cpu" else want.y_error
    role, codes, scale = net.q.fp8_recipe.input, y.coded.codes.cpu().reshape(-1, DIM), y.coded.scale.cpu()
    fmt = get_format(y.coded.fmt)  # E4M3 where a carrier stands in for HiF8
    if fmt.name == role.fmt:
        how = Rounding(fmt, get_block(role.block), net.q.fp8_recipe.target(0))
        counts = net.q.fp8_counters[0].cpu()
        coded_between(Quantized(codes, None, scale, scale * how.target, counts), want.y, error, scale * 0, how)
    dy: list[Tensor] = []
    y.register_hook(dy.append)
    (net.q(y).float().sum() + net.v(y).float().square().sum()).backward()
    values, errors = norm_gradients(dy[0].cpu().reshape(-1, DIM), rows, norm)
    if device != "cpu" or dtype == torch.float32:  # torch's own backward on a CPU rounds more often in 16 bits
        for got, value, bound in zip((x.grad.reshape(-1, DIM), net.norm.weight.grad), values, errors, strict=False):
            bounded(got.cpu(), value, rounded(value, bound, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [Heads, Block])
def test_who_gets_codes_and_what_their_states_say(kind: type[nn.Module], device: str) -> None:
    net, x = model(kind, "hif8-qat", device), batch(device)
    mlp = [] if device == "cpu" else ["mlp.down_proj" if kind is Heads else "mlp.fc2"]
    assert handed(net, x) == (["q", "k", "v"] if kind is Heads else ["attn.qkv", "mlp.fc1"]) + mlp
    net(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    commit(net)
    if kind is Heads:
        q, k, v = ({n: b[0].cpu() for n, b in layer.named_buffers() if b.ndim} for layer in (net.q, net.k, net.v))
        for name in ("fp8_history", "fp8_scale", "fp8_counters"):
            assert torch.equal(q[name], k[name]) and torch.equal(q[name], v[name])
        assert q["fp8_scale"] > 0 and q["fp8_counters"][0] == 2 * x.numel()  # two forwards
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net.eval()
    with torch.inference_mode():
        net(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
