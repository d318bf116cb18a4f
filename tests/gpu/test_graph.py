"""A whole training step of a converted model, as a CUDA graph: no wait for the GPU, no address that moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fp8kernels

DEVICES = (pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu))
RECIPES = {
    "e4m3-delayed": fp8kernels.get_recipe("e4m3-delayed").with_format(grad="e5m2"),
    "hif8-qat": fp8kernels.get_recipe("hif8-qat").with_format(grad="hif8"),
    "e4m3-row": fp8kernels.get_recipe("e4m3-row"),
}
WARM_UP, REPLAYS = 4, 3


class Training:
    """A converted model with its optimizer and one batch; `step` is all of an optimizer step."""

    def __init__(self, recipe: str, device: str) -> None:
        torch.manual_seed(0)
        width = 256 if device == "cuda" else 48
        net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)).to(device)
        self.net = fp8kernels.convert(net, RECIPES[recipe], verbose=False)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3, capturable=device == "cuda")
        self.x = torch.randn(128, width, device=device)
        self.loss = torch.zeros((), device=device)

    def step(self) -> None:
        with torch.autocast(self.x.device.type, torch.bfloat16):
            loss = (self.net(self.x).float() - self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.copy_(loss.detach())

    def state(self) -> dict[str, Tensor]:
        return {name: each for name, each in self.net.state_dict().items() if "fp8_" in name}


def repeat(training: Training) -> Callable[[], None]:
    """The step: captured in a graph on a GPU, as it is on a CPU."""
    if training.x.device.type == "cpu":
        return training.step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training.step()
    return graph.replay


def warm(training: Training, steps: int) -> None:
    """On another stream than the default one, as a capture wants it."""
    if training.x.device.type == "cpu":
        for _ in range(steps):
            training.step()
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(steps):
            training.step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_is_captured_and_does_the_same(recipe: str, device: str) -> None:
    """Replays go on where eager steps were: histories roll, scales move, and the loss falls as in an eager twin."""
    ours, twin = Training(recipe, device), Training(recipe, device)
    warm(ours, WARM_UP)
    warm(twin, WARM_UP + REPLAYS)
    addresses = {name: each.data_ptr() for name, each in ours.state().items()}
    before = {name: each.clone() for name, each in ours.state().items()}
    replay = repeat(ours)
    for _ in range(REPLAYS):
        replay()
    assert {name: each.data_ptr() for name, each in ours.state().items()} == addresses
    assert float(ours.loss) == pytest.approx(float(twin.loss), rel=1e-2)
    for name, each in ours.state().items():
        other = twin.state()[name]
        if name.endswith("fp8_history"):
            moved = not torch.equal(each, before[name])
            assert moved or not each.any(), f"{name} did not roll"
        if name.endswith(("fp8_scale", "fp8_step", "fp8_counters")):
            near = torch.allclose(each.double(), other.double(), rtol=2e-2)
            assert near, f"{name}: {each} against the twin's {other}"


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_never_waits_for_the_gpu(recipe: str) -> None:
    training = Training(recipe, "cuda")
    warm(training, WARM_UP)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_serving_is_captured() -> None:
    """A forward in eval, weights and inputs in 8 bits."""
    for recipe in ("e4m3-row", "hif8-qat"):
        training = Training(recipe, "cuda")
        warm(training, WARM_UP)
        net = training.net.eval()
        with torch.inference_mode():
            expected = net(training.x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = net(training.x)
            graph.replay()
            torch.cuda.synchronize()
        assert torch.equal(out, expected)
