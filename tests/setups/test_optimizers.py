"""Who steps: several optimizers, one in the backward, one that evaluates many times, one that skips, one of yours."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from setups.models import batch
from setups.runs import FULL, QAT, Ledger, converted, loss_of, same_models, sgd, state, step, train
from torch import Tensor, nn

from fp8kernels import commit, convert
from fp8kernels.nn import kept
from fp8kernels.nn.kept import MissingCommitWarning
from fp8kernels.nn.state import ScaledLayer
from fp8kernels.nn.step import layers
from fp8kernels.scaling.delayed import GRAD

STEPS = 5


class Several(torch.optim.Optimizer):
    """Steps others in turn; what some trainers pass around as one optimizer."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([p for part in parts for g in part.param_groups for p in g["params"]], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_optimizer_for_each_part(*, wrapped: bool) -> None:
    """The second optimizer of a step has nothing left to commit; the run is that of one optimizer."""
    plain, net = converted("llama"), converted("llama")
    parts = [sgd(net.model.layers[0]), sgd(net.model.layers[1])]
    parts.append(sgd(nn.ModuleList([net.model.embed_tokens, net.model.norm, net.lm_head])))
    both = Several(parts) if wrapped else None
    losses = []
    for n in range(STEPS):
        loss = loss_of(net, "llama", n)
        loss.backward()
        losses.append(float(loss.detach()))
        for optimizer in parts if both is None else [both]:
            optimizer.step()
        net.zero_grad()
    assert losses == train(plain, "llama", range(STEPS))
    same_models(plain, net)


def mlp(*widths: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*parts[:-1])


@pytest.mark.parametrize("again", [True, False], ids=["two forwards", "one forward"])
def test_two_models_in_turns(*, again: bool) -> None:
    """A generator and a discriminator: each commits with its own optimizer, also with its forward kept across both."""
    torch.manual_seed(0)
    generator = convert(mlp(8, 16, 16), FULL, fuse=False, verbose=False)
    critic = convert(mlp(16, 16, 1), FULL, fuse=False, verbose=False)
    books, optimizers = (Ledger(generator), Ledger(critic)), (sgd(generator), sgd(critic))
    for n in range(STEPS):
        draw = torch.Generator().manual_seed(n)
        real, noise = torch.randn(6, 16, generator=draw), torch.randn(6, 8, generator=draw)
        fake = generator(noise)
        (critic(fake.detach()).mean() - critic(real).mean()).backward()
        before = state(generator)
        optimizers[1].step()
        books[1].commit()
        assert all(torch.equal(value, before[key]) for key, value in state(generator).items())
        (-critic(generator(noise) if again else fake).mean()).backward()
        optimizers[0].step()
        books[0].commit()
        for optimizer in optimizers:
            optimizer.zero_grad()


def test_accelerate() -> None:
    """prepare() wraps model and optimizer; accumulate() steps every second time."""
    from accelerate import Accelerator

    plain, net = converted("llama"), converted("llama")
    optimizer = sgd(net)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, wrapped = accelerator.prepare(net, optimizer)
    assert wrapped is not optimizer
    for n in range(2 * STEPS):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, "llama", n))
            wrapped.step()
            wrapped.zero_grad()
    usual = sgd(plain)
    for n in range(STEPS):
        step(plain, usual, "llama", 2 * n, 2 * n + 1, weight=0.5)
    same_models(plain, net)
    assert {int(layer.fp8_step) for layer in layers(net)} == {STEPS}


def scaled_steps(net: nn.Module, seeds: Iterable[int], bad: Iterable[int], books: Ledger | None = None) -> None:
    """Training with a GradScaler; a step of `bad` first meets an Inf, is skipped, and is taken again."""
    optimizer, scaler, bad = sgd(net), torch.amp.GradScaler("cpu", init_scale=1024.0), set(bad)
    for n in seeds:
        for factor in [math.inf, 1.0] if n in bad else [1.0]:
            before = [p.clone() for p in net.parameters()]
            scaler.scale(loss_of(net, "llama", n) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            stepped = any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
            assert stepped == (factor == 1.0)
            if stepped and books is not None:
                books.commit()


def test_a_skipped_step_is_as_if_it_never_was() -> None:
    """The loss scale is a power of two, so gradients without 8-bit formats have the bits of a run without the skip."""
    plain, net = converted("llama", QAT), converted("llama", QAT)
    scaled_steps(plain, range(STEPS), bad=[])
    scaled_steps(net, range(STEPS), bad=[0, 3])
    same_models(plain, net, but=("fp8_counters",))


def test_an_inf_gradient_enters_no_history() -> None:
    net = converted("llama", FULL, fuse=False)
    scaled_steps(net, range(STEPS), bad=[0, 3], books=Ledger(net))
    for layer in layers(net):
        assert int(layer.fp8_step) == STEPS
        assert torch.isfinite(layer.fp8_history).all()
        assert torch.isfinite(layer.fp8_scale).all()
    assert any(layer.fp8_counters[GRAD, 3] > 0 for layer in layers(net)), "the Inf was met"


@pytest.mark.parametrize("fmt", ["hif8", "e5m2", "e4m3"])
def test_an_inf_behind_layers_without_bias_is_not_hidden(fmt: str) -> None:
    """Codes saturate; a GradScaler must find the Inf in the parameters' gradients all the same, and skip the step."""
    torch.manual_seed(0)
    bare = nn.Sequential(*[nn.Linear(16, 16, bias=False) for _ in range(3)])
    net = convert(bare, QAT.with_format(grad=fmt), verbose=False)
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", init_scale=2.0)
    for n in range(STEPS):
        before = [p.clone() for p in net.parameters()]
        loss = net(torch.randn(4, 16)).sum() * (math.inf if n % 2 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
        assert moved == [n % 2 == 0] * 3, f"step {n}, {fmt}"


def in_backward(net: nn.Module, how: str) -> None:
    """Each parameter steps as soon as its gradient is there."""
    if how == "torch":
        from torch.distributed.optim import _apply_optimizer_in_backward

        _apply_optimizer_in_backward(torch.optim.SGD, net.parameters(), {"lr": 0.1, "momentum": 0.9})
        return
    for parameter in net.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)

        def hook(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            p.grad = None

        parameter.register_post_accumulate_grad_hook(hook)


@pytest.mark.parametrize("family", ["llama", "bert", "vit"])
@pytest.mark.parametrize("how", ["torch", "hooks"])
def test_optimizer_in_backward(family: str, how: str) -> None:
    """One commit, when the backward is over: the bits of the plain loop."""
    plain, net = converted(family), converted(family)
    in_backward(net, how)
    losses = []
    for n in range(STEPS):
        loss = loss_of(net, family, n)
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses == train(plain, family, range(STEPS))
    same_models(plain, net)
    assert {int(layer.fp8_step) for layer in layers(net) if layer.fp8_pending.sum() == 0} == {STEPS}


def test_lbfgs_commits_once_a_step() -> None:
    """A step evaluates its closure many times: the largest amax of all enters, once, and scales move after it."""
    torch.manual_seed(0)
    net = convert(mlp(16, 16, 4), FULL, fuse=False, verbose=False)
    ledger = Ledger(net)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=5)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(len(calls)))
        loss: Tensor = net(x).square().mean()
        loss.backward()
        calls.append(loss)
        return loss

    kept._warned = False  # as in a process that has not been warned
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            optimizer.step(closure)
            ledger.commit()
    assert not [w for w in told if issubclass(w.category, MissingCommitWarning)], "it misses no commit"
    assert len(calls) > 2 * STEPS


class SignDescent(torch.optim.Optimizer):
    """A user's optimizer, with torch's class behind it."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, through_data: bool) -> None:
        super().__init__(parameters, {"lr": 1e-3})
        self.through_data = through_data

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            descend(group["params"], through_data=self.through_data)


def descend(parameters: Iterable[nn.Parameter], *, through_data: bool) -> None:
    for p in parameters:
        if p.grad is not None and through_data:
            p.data -= 1e-3 * p.grad.data.sign()  # past the version counter
        elif p.grad is not None:
            with torch.no_grad():
                p -= 1e-3 * p.grad.sign()


@pytest.mark.parametrize("through_data", [True, False])
@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("own_class", [True, False], ids=["subclass", "by hand"])
def test_an_optimizer_of_your_own(*, through_data: bool, none: bool, own_class: bool) -> None:
    """A subclass of torch's commits by itself, anything else with a line; no weight's codes outlive its update."""
    net = converted("llama", fuse=False)
    ledger = Ledger(net)
    parameters = list(net.parameters())
    optimizer = SignDescent(parameters, through_data=through_data) if own_class else None
    with warnings.catch_warnings():
        warnings.simplefilter("error", MissingCommitWarning)
        for n in range(STEPS):
            for micro in (2 * n, 2 * n + 1):
                loss_of(net, "llama", micro).backward()
            if optimizer is not None:
                optimizer.step()
            else:
                descend(parameters, through_data=through_data)
                commit(net)
            ledger.commit()
            net.zero_grad(set_to_none=none)
            assert_fresh(net, n)


def assert_fresh(net: nn.Module, seed: int) -> None:
    """The layers multiply the weights as they are now: in training mode as in eval, which keeps no codes."""
    with torch.no_grad(), torch.inference_mode():
        trained = net(**batch("llama", seed)).logits
        evaluated = net.eval()(**batch("llama", seed)).logits
    net.train()
    assert torch.equal(trained, evaluated)


def test_an_optimizer_of_another_model_commits_nothing() -> None:
    net, other = converted("bert"), converted("bert", seed=1)
    loss_of(net, "bert", 0).backward()
    train(other, "bert", range(2))
    for layer in layers(net):
        assert isinstance(layer, ScaledLayer)
        assert (layer.fp8_history == 0).all()
        assert layer.fp8_pending[0] > 0
