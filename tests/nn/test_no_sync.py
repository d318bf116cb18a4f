"""Nothing in a training step makes the host wait for a GPU, and the state keeps its addresses.

There is no GPU here: CPU tensors stand in, and everything that on a GPU would wait raises, in torch's ops, inside
ours, and in the methods that turn tensors into Python numbers. The alarm reads CPU counters at once, those of a GPU
not, so it is taken off here; how it reads a GPU's is tested below with a transfer that arrives late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fusions import handed
from nn.blocks import Block, Heads
from recipes import ANYWHERE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fp8kernels
from fp8kernels import Recipe, Role, convert, get_recipe
from fp8kernels.kernels.quantize import carrier
from fp8kernels.nn import function, producer, step
from fp8kernels.nn import mlp as fused_mlp
from fp8kernels.nn import norm as fused_norm
from fp8kernels.telemetry import reading

ATEN = torch.ops.aten
# A Python number or the size of the result depends on what is in the tensor; lift_fresh: made from Python numbers
WAITS = {ATEN._local_scalar_dense, ATEN.is_nonzero, ATEN.equal, ATEN.nonzero, ATEN.masked_select, ATEN._unique2}
WAITS |= {ATEN.bincount, ATEN.lift_fresh}
MASKED = {ATEN.index, ATEN.index_put, ATEN.index_put_}  # they wait where an index is a mask
TO_PYTHON = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class Waited(AssertionError):
    """A step did what makes the host wait for a GPU."""


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masks = func.overloadpacket in MASKED and any(x is not None and x.dtype == torch.bool for x in args[1])
        if func.overloadpacket in WAITS or masks:
            raise Waited(str(func))
        devices = {str(x.device) for x in args if isinstance(x, Tensor)} | {str(kwargs.get("device") or "cpu")}
        if func.overloadpacket in (ATEN._to_copy, ATEN.copy_) and len(devices) > 1:
            raise Waited(f"{func} between {devices}")
        if func.namespace == "fp8kernels":  # go on watching inside
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def no_waiting() -> Iterator[None]:
    def refuse(name: str) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            raise Waited(f"Tensor.{name}")

        return method

    with pytest.MonkeyPatch.context() as patch:
        for name in TO_PYTHON:
            patch.setattr(Tensor, name, refuse(name))
        with _NoWaiting():
            yield


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Instead of the alarm: the number of layers of each commit."""
    seen: list[int] = []
    monkeypatch.setattr(step, "after_commit", [lambda found: seen.append(len(found))])
    return seen


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.to("meta"),
        lambda x: x + torch.tensor([1.0]),
        lambda x: torch.where(x > 0)[0],
    ],
)
def test_the_watch_sees(wait: Callable[[Tensor], object]) -> None:
    x = torch.randn(4)
    with pytest.raises(Waited), no_waiting():
        wait(x)


ROLE, CUT = Role("hif8", route="carrier"), Role("hif8", clamp=True)
CASES: dict[str, Recipe] = {
    **ANYWHERE,
    "hif8 gradients": get_recipe("hif8-qat").with_format(grad="hif8"),
    "e4m3-row, e5m2 gradients": get_recipe("e4m3-row").with_format(grad="e5m2"),
    "moving average": get_recipe("hif8-qat").replace(algorithm="moving_average", power_of_two=True),
    "static": get_recipe("hif8-qat").frozen(),
    "interval": get_recipe("hif8-qat").replace(interval=2),
    "clamp": Recipe("clamp", CUT, CUT, CUT, straight_through="clipped"),
    "carrier": Recipe("carrier", ROLE, ROLE, ROLE),
}


class Net(nn.Module):
    def __init__(self, *, recompute: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(128, 256)
        self.second = nn.Linear(256, 128)
        self.attention = nn.MultiheadAttention(128, 2, batch_first=True)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        def feed_forward(x: Tensor) -> Tensor:
            return self.second(nn.functional.gelu(self.first(x)))

        x = x + (checkpoint(feed_forward, x, use_reentrant=False) if self.recompute else feed_forward(x))
        return x + self.attention(x, x, x, need_weights=False)[0]


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for x in batches:
        net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing(name: str, commits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of two micro-batches with recomputation, the optimizer's step and the commit that follows it."""
    recipe = CASES[name]
    transposed = recipe.grad is not None and function.one_scale(recipe)  # as it is on a GPU
    monkeypatch.setattr(function, "keeps_transposed", lambda device, recipe: transposed)
    net = convert(Net(recompute=True), recipe, verbose=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = [torch.randn(2, 5, 128) for _ in range(2)]
    train_step(net, optimizer, batches)
    with no_waiting():
        train_step(net, optimizer, batches)
        train_step(net, optimizer, batches)
    assert commits == [4, 4, 4]


@pytest.mark.parametrize("kind", [Block, Heads])
@pytest.mark.parametrize("name", ["e4m3-row", "hif8 gradients", "carrier"])
def test_a_step_of_fused_modules_waits_for_nothing(
    kind: type[nn.Module], name: str, commits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same where one kernel makes codes of a norm or an activation, as on a GPU."""
    recipe = CASES[name]
    transposed = recipe.grad is not None and function.one_scale(recipe)
    for module in (function, producer):
        monkeypatch.setattr(module, "keeps_transposed", lambda device, recipe: transposed)
    for module in (fused_norm, fused_mlp):
        monkeypatch.setattr(module, "pays", lambda device: True)
    net = convert(kind(128), recipe, verbose=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = [torch.randn(2, 5, 128) for _ in range(2)]
    with no_waiting():
        for _ in range(2):
            train_step(net, optimizer, batches)
    assert len(commits) == 2
    assert handed(net, batches[0])


def test_a_step_of_fused_blocks_waits_for_nothing(commits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and MLPs that make the codes themselves; transformers' loop around the blocks reads its mask: left out."""
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaModel(LlamaConfig(vocab_size=64, **sizes))
    monkeypatch.setattr(function, "keeps_transposed", lambda device, recipe: True)
    blocks = convert(model, CASES["hif8 gradients"], verbose=False).layers
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(2, 5, 128)
    embeddings = model.rotary_emb(x, torch.arange(5)[None])

    def one() -> None:
        y = x
        for block in blocks:
            y = block(y, attention_mask=None, position_embeddings=embeddings)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    one()
    with no_waiting():
        one()
        one()
    assert commits == [14, 14, 14]


@pytest.mark.usefixtures("commits")
def test_only_warm_up_waits() -> None:
    """Whether warm-up is over is read from the state while it lasts, and then never again."""
    net = convert(Net(recompute=False), get_recipe("hif8-qat").replace(warmup_steps=2), verbose=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = [torch.randn(2, 5, 128)]
    with pytest.raises(Waited), no_waiting():
        train_step(net, optimizer, batches)
    for _ in range(2):
        train_step(net, optimizer, batches)
    assert net.first.fp8_warm
    with no_waiting():
        train_step(net, optimizer, batches)


def addresses(net: nn.Module) -> dict[str, int]:
    return {name: x.data_ptr() for name, x in net.named_buffers() if ".fp8_" in name}


@pytest.mark.parametrize("name", CASES)
def test_the_state_keeps_its_addresses(name: str) -> None:
    """A captured CUDA graph replays on addresses: no step, recomputation, commit, checkpoint or mode may move them."""
    net = convert(Net(recompute=True), CASES[name], verbose=False)
    before = addresses(net)
    assert len(before) == 4 * 8
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for n in range(3):
        train_step(net, optimizer, [torch.randn(2, 5, 128) * 2.0**n])
        assert addresses(net) == before
    net.load_state_dict({key: value.clone() for key, value in net.state_dict().items()})
    fp8kernels.commit(net)
    net.eval()(torch.randn(2, 5, 128))
    net.train().float()
    assert addresses(net) == before


# ---- how the alarm reads what lies on a GPU -------------------------------------------------------------------------


class LateTransfer:
    """A transfer that arrives when `late` is taken away; it holds what the layers had counted when it began."""

    late = True
    started = 0

    def __init__(self, members: list[Any]) -> None:
        LateTransfer.started += 1
        counters, scale = reading.stack(members)
        self.members, self.held = members, reading.Reading(members, counters, scale)

    def arrived(self) -> bool:
        return not LateTransfer.late

    def reading(self) -> reading.Reading | None:
        return self.held


def test_a_reading_from_a_gpu_is_taken_when_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LateTransfer, "started", 0)
    monkeypatch.setattr(reading.Transfer, "start", LateTransfer)
    layer = convert(nn.Linear(16, 16), verbose=False)
    members = [layer]
    layer(torch.randn(4, 16))
    assert reading.arrival(members) is None, "it has only begun"
    layer(torch.randn(4, 16))
    assert reading.arrival(members) is None, "it is on its way, and nobody waits"
    assert LateTransfer.started == 1
    monkeypatch.setattr(LateTransfer, "late", False)
    got = reading.arrival(members)
    assert got is not None
    assert got.counters[0][0][0] == 64, "what was counted when it began"
    assert LateTransfer.started == 2, "and the next one is on its way"
    assert reading.arrival(members).counters[0][0][0] == 128


@pytest.mark.filterwarnings("error")
def test_a_layer_on_a_gpu_leaves_its_carrier_by_late_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same decision as on a CPU, some steps later."""
    monkeypatch.setattr(LateTransfer, "late", False)
    monkeypatch.setattr(reading.Transfer, "start", LateTransfer)
    monkeypatch.setattr(reading, "readings", lambda found: [r for r in [reading.arrival(found)] if r is not None])
    monkeypatch.setattr("fp8kernels.telemetry.alarm.readings", reading.readings)
    monkeypatch.setattr(carrier, "pays", lambda device: True)
    net = convert(nn.Sequential(nn.Linear(16, 16)), "hif8-qat", verbose=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    x = torch.randn(64, 16)
    for n in range(4):
        net(x * 4.0**n).sum().backward()
        optimizer.step()
        assert net[0].fp8_routes[0] == "auto"
    with pytest.warns(fp8kernels.CarrierWarning):
        fp8kernels.commit(net)
    assert net[0].fp8_routes[:2] == ("exact", "auto")
