"""Training runs to compare, and a ledger that says from the outside what histories and scales must be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from setups.models import batch, build
from torch import Tensor, nn

from fp8kernels import Recipe, convert, get_recipe
from fp8kernels.nn.state import ScaledLayer
from fp8kernels.nn.step import layers
from fp8kernels.scaling.delayed import GRAD, INPUT, ROLES, WEIGHT, is_state

QAT = get_recipe("hif8-qat").replace(window=3)  # gradients as torch makes them
FULL = QAT.with_format(grad="hif8")  # all three roles have delayed scales
RECOMPUTED = ("fp8_counters",)  # what is computed twice is counted twice

Optimizer = torch.optim.Optimizer
Forward = Callable[..., Any]


def converted(family: str, recipe: Recipe = FULL, *, seed: int = 0, fuse: bool = True) -> nn.Module:
    """A converted model of a family."""
    return convert(build(family, seed), recipe, fuse=fuse, verbose=False)


def fused_pair(family: str) -> tuple[nn.Module, nn.Module]:
    """An unfused and a fused model, whose runs have the same bits."""
    return converted(family, fuse=False), converted(family, fuse=True)


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def loss_of(forward: Forward, family: str, seed: int) -> Tensor:
    out: Tensor = forward(**batch(family, seed)).loss
    return out


def step(forward: Forward, optimizer: Optimizer, family: str, *seeds: int, weight: float = 1.0) -> list[float]:
    """One optimizer step over micro-batches, each with its own backward; returns their losses."""
    losses = []
    for seed in seeds:
        loss = loss_of(forward, family, seed)
        (loss * weight).backward()
        losses.append(float(loss.detach()))
    optimizer.step()
    optimizer.zero_grad()
    return losses


def train(net: nn.Module, family: str, seeds: Iterable[int], forward: Forward | None = None) -> list[float]:
    """The plain loop: one batch a step."""
    optimizer = sgd(net)
    return [step(forward or net, optimizer, family, seed)[0] for seed in seeds]


def state(net: nn.Module) -> dict[str, Tensor]:
    """A copy of the scaling state."""
    return {key: value.clone() for key, value in net.state_dict().items() if is_state(key)}


def same(a: dict[str, Tensor], b: dict[str, Tensor], *, but: tuple[str, ...] = ()) -> None:
    """The same bits, except for state of these names."""
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    assert a
    for key in a:
        if key.rpartition(".")[2] not in but:
            assert torch.equal(a[key], b[key]), f"{key}: {a[key]} against {b[key]}"


def same_models(a: nn.Module, b: nn.Module, *, but: tuple[str, ...] = ()) -> None:
    """Weights, buffers and scaling state with the same bits."""
    assert any(is_state(key) for key in a.state_dict())
    same(a.state_dict(), b.state_dict(), but=but)


class Ledger:
    """The step law, written down a second time: hooks see each tensor, and each optimizer step ends with `commit`.

    Hooks on its layers keep a norm from handing codes on; the model must be converted with fuse=False.
    """

    def __init__(self, net: nn.Module) -> None:
        self.layers: list[ScaledLayer] = layers(net)
        assert self.layers
        self.rows: dict[tuple[ScaledLayer, int], list[float]] = {}  # newest first, at most a window
        self.seen: dict[tuple[ScaledLayer, int], float] = {}
        self.steps = dict.fromkeys(self.layers, 0)
        for layer in self.layers:
            layer.register_forward_hook(self._forward)

    def _forward(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if not layer.training or torch.is_inference_mode_enabled():
            return
        assert isinstance(layer, ScaledLayer)
        self._note(layer, INPUT, args[0])
        self._note(layer, WEIGHT, layer.weight)
        if out.requires_grad and layer.fp8_recipe.grad is not None:
            out.register_hook(lambda g: self._note(layer, GRAD, g))

    def _note(self, layer: ScaledLayer, role: int, x: Tensor) -> None:
        amax = float(x.detach().abs().max())
        if 0 < amax < float("inf"):  # NaN is not, either
            self.seen[layer, role] = max(self.seen.get((layer, role), 0.0), amax)

    def commit(self) -> None:
        """An optimizer step is over: what was seen becomes the newest slot of each history. Checks the layers."""
        for (layer, role), amax in self.seen.items():
            row = self.rows.setdefault((layer, role), [])
            row.insert(0, amax)
            del row[layer.fp8_recipe.window :]
        for layer in {layer for layer, _ in self.seen}:
            self.steps[layer] += 1
        self.seen.clear()
        self.check()

    def check(self) -> None:
        """Histories, scales and steps are those of the ledger, to the bit."""
        for layer in self.layers:
            name, recipe = layer.fp8_name, layer.fp8_recipe
            assert int(layer.fp8_step) == self.steps[layer], (
                f"{name}: {int(layer.fp8_step)} steps, not {self.steps[layer]}"
            )
            for role in range(len(ROLES)):
                row = self.rows.get((layer, role), [])
                want = row + [0.0] * (recipe.window - len(row))
                got = layer.fp8_history[role].tolist()
                assert got == want, f"{name}, {ROLES[role]}: history {got}, it must be {want}"
                scale = torch.tensor(max(want)) / recipe.target(role)  # 0 while nothing was seen
                assert layer.fp8_scale[role] == scale, f"{name}, {ROLES[role]}: {layer.fp8_scale[role]}, not {scale}"
