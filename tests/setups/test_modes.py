"""autocast, eval and inference mode in the middle of training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from setups.models import FAMILIES, batch
from setups.runs import FULL, Ledger, converted, fused_pair, loss_of, same, same_models, sgd, state, step, train
from tolerance import bounded, gemm_bound
from torch import nn

from fp8kernels.nn.step import layers
from fp8kernels.scaling.delayed import INPUT, WEIGHT

STEPS = 5
BF16 = torch.bfloat16


def look(net: nn.Module, family: str, *, training: bool, mode: Callable[[], AbstractContextManager[None]]) -> None:
    """A forward that is no part of training, on data that it must not remember."""
    loud = batch(family, 77)
    if family == "vit":
        loud["pixel_values"] = loud["pixel_values"] * 100
    before = state(net)
    net.train(training)
    with mode():
        net(**loud)
    net.train()
    same(before, state(net))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [(False, nullcontext), (False, torch.no_grad), (False, torch.inference_mode), (True, torch.inference_mode)],
    ids=["eval", "eval, no_grad", "eval, inference", "train, inference"],
)
def test_looking_at_a_model_changes_nothing(
    family: str, how: tuple[bool, Callable[[], AbstractContextManager[None]]]
) -> None:
    """Before the first step, between steps and between micro-batches; gradients are kept as zeros between steps."""
    plain, net = converted(family), converted(family)
    optimizers = sgd(plain), sgd(net)
    for n in range(STEPS):
        a = step(plain, optimizers[0], family, 2 * n, 2 * n + 1)
        losses = []
        for micro in (2 * n, 2 * n + 1):
            look(net, family, training=how[0], mode=how[1])
            loss = loss_of(net, family, micro)
            look(net, family, training=how[0], mode=how[1])
            loss.backward()
            losses.append(float(loss.detach()))
        optimizers[1].step()
        look(net, family, training=how[0], mode=how[1])
        optimizers[1].zero_grad(set_to_none=False)
        assert a == losses
    same_models(plain, net)


def test_eval_of_a_part_and_a_frozen_batch() -> None:
    """A block in eval mode within a model that trains: its state stays as it is, and the others go on."""
    net = converted("llama", fuse=False)
    ledger, optimizer = Ledger(net), sgd(net)
    for n in range(2 * STEPS):
        net.model.layers[0].train(n < STEPS)
        step(net, optimizer, "llama", n)
        ledger.commit()
    assert {int(layer.fp8_step) for layer in layers(net.model.layers[0])} == {STEPS}
    assert {int(layer.fp8_step) for layer in layers(net.model.layers[1])} == {2 * STEPS}


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str) -> None:
    """Scales are those of the tensors that arrive, the weight's of the fp32 weight."""
    net = converted(family, fuse=False)
    ledger, optimizer = Ledger(net), sgd(net)
    for n in range(STEPS):
        weights = [layer.weight.abs().max() for layer in layers(net)]
        with torch.autocast("cpu", BF16):
            step(net, optimizer, family, 2 * n, 2 * n + 1)
        ledger.commit()
        assert all(layer.fp8_history[WEIGHT, 0] == w for layer, w in zip(layers(net), weights, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_of_fused_modules(family: str) -> None:
    pair = fused_pair(family)
    optimizers = [sgd(net) for net in pair]
    for n in range(STEPS):
        with torch.autocast("cpu", BF16):
            a, b = (step(net, o, family, 2 * n, 2 * n + 1) for net, o in zip(pair, optimizers, strict=True))
        assert a == b
    same_models(*pair)


def test_autocast_of_the_forward_alone() -> None:
    """As torch recommends: backward and step outside of the context. Its cache of cast weights is not ours."""
    inside, outside = converted("bert"), converted("bert")
    optimizers = sgd(inside), sgd(outside)
    for n in range(STEPS):
        with torch.autocast("cpu", BF16):
            step(inside, optimizers[0], "bert", n)
        with torch.autocast("cpu", BF16):
            loss = loss_of(outside, "bert", n)
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    same_models(inside, outside)


def test_a_forward_multiplies_codes_of_the_committed_scales() -> None:
    """Also where the tensor at hand is another one than those that the scales were made of."""
    net = converted("llama")
    train(net, "llama", range(2))
    for layer in layers(net):
        x = torch.randn(5, layer.in_features) * 3
        q_x, q_w = (quantized(layer, t, role) for t, role in ((x, INPUT), (layer.weight.detach(), WEIGHT)))
        bounded(layer(x).detach(), q_x @ q_w.T, gemm_bound(q_x, q_w, None, torch.float32))


def test_autocast_is_bf16_where_it_says_so() -> None:
    """The output of a layer is the fp32 product of its codes, rounded once to bf16."""
    net = converted("llama")
    train(net, "llama", range(2))
    layer = layers(net)[0].eval()
    x = torch.randn(5, layer.in_features)
    with torch.autocast("cpu", BF16):
        low = layer(x)
    assert low.dtype == BF16
    high = layer(x)
    # fp32 sums of K products in two orders differ by at most 2 K u |x||w|; each is then within half a place of bf16
    q_x, q_w = (quantized(layer, t, role) for t, role in ((x, INPUT), (layer.weight.detach(), WEIGHT)))
    sums = 2 * (layer.in_features + 2) * 2.0**-24 * (q_x.abs() @ q_w.abs().T)
    bound = sums + 2.0**-8 * (high.double().abs() + sums)
    assert ((low.double() - high.double()).abs() <= bound).all()


def quantized(layer: nn.Module, x: torch.Tensor, role: int) -> torch.Tensor:
    from fp8kernels import quantize

    out: torch.Tensor = quantize(x, FULL.input.fmt, scale=float(layer.fp8_scale[role])).dequantize(torch.float32)
    return out.double()
