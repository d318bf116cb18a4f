"""accelerate: prepare, accumulate, save_state and a wrapped optimizer, around a loop that knows nothing of 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.common import ACCUMULATED, RATE, STEPS
from setups.models import batch, build
from setups.runs import FULL, RECOMPUTED, converted, same, same_models, state
from torch import Tensor, nn

from fp8kernels import convert
from fp8kernels.nn.step import layers

accelerate = pytest.importorskip("accelerate")
BATCHES = STEPS * ACCUMULATED


def prepared(net: nn.Module, precision: str = "no") -> tuple[Any, nn.Module, Any]:
    """Accelerator, model and optimizer, as its users make them."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, mixed_precision=precision)
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    return accelerator, *accelerator.prepare(net, optimizer)


def loop(accelerator: Any, net: nn.Module, optimizer: Any, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        with accelerator.accumulate(net):
            loss = net(**batch("llama", seed)).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()  # does nothing until the last micro-batch
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def by_hand(net: nn.Module, *, autocast: bool) -> list[float]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE)
    losses = []
    for seed in range(BATCHES):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = net(**batch("llama", seed)).loss
        (loss / ACCUMULATED).backward()
        losses.append(float(loss.detach()))
        if (seed + 1) % ACCUMULATED == 0:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_bits_of_a_bare_loop(precision: str) -> None:
    plain, net = converted("llama"), converted("llama")
    want = by_hand(plain, autocast=precision == "bf16")
    assert loop(*prepared(net, precision), range(BATCHES)) == want
    same_models(plain, net)
    assert {int(layer.fp8_step) for layer in layers(net)} == {STEPS}


def test_scales_stand_still_while_gradients_accumulate() -> None:
    net = converted("llama")
    accelerator, net, optimizer = prepared(net)
    loop(accelerator, net, optimizer, range(ACCUMULATED))
    before = state(net)
    loop(accelerator, net, optimizer, range(2, 3))  # half a step: optimizer.step() is called and skips
    after = state(net)
    for key in before:
        if key.endswith(("fp8_scale", "fp8_history", "fp8_step")):
            assert torch.equal(before[key], after[key]), key
    assert any(not torch.equal(before[key], after[key]) for key in before if key.endswith("fp8_pending"))


def test_converting_what_is_prepared_already() -> None:
    first, second = converted("llama"), build("llama")
    want = loop(*prepared(first, "bf16"), range(BATCHES))
    accelerator, net, optimizer = prepared(second, "bf16")
    convert(net, FULL, verbose=False)
    assert loop(accelerator, net, optimizer, range(BATCHES)) == want
    same_models(first, second)


@pytest.mark.parametrize("safe", [True, False])
def test_saved_state_resumes_to_the_same_bits(tmp_path: Path, *, safe: bool) -> None:
    """Saved after a step, and loaded over a model with other weights and other scales."""
    half = BATCHES // 2
    accelerator, net, optimizer = prepared(converted("llama"), "bf16")
    loop(accelerator, net, optimizer, range(half))
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    saved = state(net)
    want = loop(accelerator, net, optimizer, range(half, BATCHES))

    accelerator, again, optimizer = prepared(converted("llama", seed=1), "bf16")
    loop(accelerator, again, optimizer, range(2))
    accelerator.load_state(str(tmp_path))
    same(saved, state(again))
    assert loop(accelerator, again, optimizer, range(half, BATCHES)) == want
    same_models(net, again, but=RECOMPUTED)


def test_a_step_that_the_scaler_skips_commits_nothing() -> None:
    """The wrapped optimizer finds an infinite gradient; what was seen waits for the next step."""
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)  # sets up what the wrapped optimizer asks
    net, plain = converted("llama"), converted("llama")
    inner = torch.optim.SGD(net.parameters(), lr=RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)

    def step(seed: int, factor: float) -> Tensor:
        loss = net(**batch("llama", seed)).loss
        scaler.scale(loss * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step(0, 1.0)
    assert not optimizer.step_was_skipped
    before, weights = state(net), [p.clone() for p in net.parameters()]
    step(1, float("inf"))
    assert optimizer.step_was_skipped
    assert all(torch.equal(old, new) for old, new in zip(weights, net.parameters(), strict=True))
    for key, value in state(net).items():
        if key.endswith(("fp8_scale", "fp8_history", "fp8_step")):
            assert torch.equal(before[key], value), key
    step(2, 1.0)

    # the same without a scaler: batch 1 is seen, and its gradients thrown away
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    for seed, keeps in ((0, True), (1, False), (2, True)):
        loss = plain(**batch("llama", seed)).loss
        if keeps:
            loss.backward()
            plain_optimizer.step()
        plain_optimizer.zero_grad()
    inputs = [layer.fp8_history[:2] for model in (net, plain) for layer in layers(model)]
    half = len(inputs) // 2
    assert all(torch.equal(a, b) for a, b in zip(inputs[:half], inputs[half:], strict=True))
    assert all(layer.fp8_history.isfinite().all() and layer.fp8_scale.isfinite().all() for layer in layers(net))
