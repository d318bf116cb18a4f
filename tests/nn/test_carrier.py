"""HiF8 layers that compute with a carrier, and the backward with codes transposed where they were made."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8kernels
from fp8kernels import CarrierWarning, Recipe, Role, convert, get_recipe, quantize, revert, summary
from fp8kernels.kernels.quantize import carrier
from fp8kernels.nn import function
from fp8kernels.nn.state import ScaledLayer
from fp8kernels.scaling.delayed import GRAD, INPUT, WEIGHT


def recipe(route: str, *, grad: bool = True, scaling: str = "delayed") -> Recipe:
    role = Role("hif8", scaling, route=route)
    return Recipe(f"hif8-{route}", role, role, role if grad else None, window=4)


def model(route: str, *, grad: bool = True, scaling: str = "delayed") -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 16))
    return convert(net, recipe(route, grad=grad, scaling=scaling), verbose=False)


def batch(seed: int) -> Tensor:
    return torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(seed))


def grow(net: nn.Module) -> None:
    """Six steps without learning, in each of which the input is four times as large."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for n in range(6):
        net(batch(0) * 4.0**n).sum().backward()
        optimizer.step()


def train(net: nn.Module, steps: int = 4, lr: float = 0.1) -> list[float]:
    optimizer, losses = torch.optim.SGD(net.parameters(), lr=lr), []
    for n in range(steps):
        loss = net(batch(n)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture
def _fp8_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that says it had FP8 tensor cores."""
    monkeypatch.setattr(carrier, "pays", lambda device: True)


@pytest.mark.parametrize("grad", [True, False], ids=["hif8-grad", "bf16-grad"])
@pytest.mark.parametrize("scaling", ["delayed", "current"])
def test_products_are_those_of_the_carried_codes(scaling: str, *, grad: bool) -> None:
    """Forward and both gradients against the decoded carriers, in fp64, to the roundings of fp32."""
    layer = convert(nn.Linear(64, 96), recipe("carrier", grad=grad, scaling=scaling), verbose=False)
    x, g = torch.randn(5, 64, requires_grad=True), torch.randn(5, 96)
    out = layer(x)
    out.backward(g)
    coded = [quantize(t.detach(), "hif8", carrier=True) for t in (x, layer.weight)]
    assert [q.fmt.name for q in coded] == ["e4m3", "e4m3"]
    x64, w64 = (q.dequantize().double() for q in coded)
    g64 = (quantize(g, "hif8", target=224.0, carrier=True).dequantize() if grad else g).double()
    for got, expected in (
        (out, x64 @ w64.t() + layer.bias.double()),
        (x.grad, g64 @ w64),
        (layer.weight.grad, g64.t() @ x64),
    ):
        torch.testing.assert_close(got.detach().double(), expected, rtol=1e-5, atol=1e-5)


def test_scales_and_amax_are_those_of_hif8() -> None:
    """The state is in units of HiF8: the same numbers, whichever way the codes travel."""
    exact, carried = model("exact", grad=False), model("carrier", grad=False)
    for n in range(4):
        for net in (exact, carried):
            net(batch(n) * 1.5**n).square().mean().backward()
            fp8kernels.commit(net)
    state = carried.state_dict()
    for key, value in exact.state_dict().items():
        if key.endswith(("0.fp8_history", "0.fp8_scale")):
            assert torch.equal(state[key][:2], value[:2]), key


def test_a_layer_is_that_of_hif8_while_nothing_is_lost() -> None:
    """Output and gradients to the bit, and the counters say that nothing saturated or was flushed."""
    x, weight, g = (torch.randn(shape) for shape in ((16, 64), (32, 64), (16, 32)))
    x, weight, g = (t + t.sign() * 0.01 for t in (x, weight, g))  # away from zero
    results = []
    for route in ("exact", "carrier"):
        layer = convert(nn.Linear(64, 32), recipe(route), verbose=False)
        layer.load_state_dict({"weight": weight, "bias": torch.zeros(32)})
        given = x.clone().requires_grad_()
        out = layer(given)
        out.backward(g)
        assert not layer.fp8_counters[:, 1:].any()
        results.append((out, given.grad, layer.weight.grad))
    for exact, carried in zip(*results, strict=True):
        assert torch.equal(exact, carried)


def test_auto_is_exact_on_a_cpu() -> None:
    net = model("auto")
    assert net[0].fp8_carrier(INPUT, torch.device("cpu")) is None
    assert train(net) == train(model("exact"))


@pytest.mark.usefixtures("_fp8_cores")
def test_auto_is_a_carrier_where_it_pays() -> None:
    net = model("auto")
    assert [net[0].fp8_carrier(i, torch.device("cpu")) for i in (INPUT, WEIGHT, GRAD)] == [4, 4, 0]
    assert train(net) == train(model("carrier"))
    assert [row.route for row in summary(net)] == ["carrier"] * 6


@pytest.mark.parametrize(("capability", "pays"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)])
def test_where_it_pays(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, *, pays: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    carrier._capability.cache_clear()
    assert carrier.pays(torch.device("cuda", 0)) is pays
    carrier._capability.cache_clear()
    assert not carrier.pays(torch.device("cpu"))


def test_the_recipe_checks_the_route() -> None:
    with pytest.raises(ValueError, match="e4m3 has no carrier"):
        Role("e4m3", route="carrier")
    with pytest.raises(ValueError, match="target=1000 lies beyond 448"):
        Role("hif8", target=1000.0, route="carrier")
    with pytest.raises(ValueError, match=r"unknown route 'carier'.*did you mean 'carrier'"):
        Role("hif8", route="carier")
    carried = recipe("carrier")
    assert carried.with_format(input="e4m3").input.route == "auto"
    assert carried.frozen().input.route == "carrier"
    assert [carried.carrier(i) for i in range(3)] == [4, 4, 0], "a delayed amax may be exceeded by half"
    now = Recipe("now", Role("hif8"), Role("hif8"), Role("hif8", "current"))
    assert now.carrier(GRAD) == 1, "a current amax is not exceeded"
    assert carried.replace(margin=2).carrier(INPUT) == 4, "margin is head-room that the carrier keeps"
    assert [get_recipe("e4m3-delayed").carrier(i) for i in range(3)] == [None] * 3
    assert recipe("exact").carrier(INPUT) is None
    assert Recipe("wide", Role("hif8", target=1000.0), Role("hif8")).carrier(INPUT) is None


@pytest.mark.usefixtures("_fp8_cores")
def test_a_tensor_that_does_not_fit_leaves_its_carrier() -> None:
    """An input that grows fourfold in each step saturates E4M3 but not HiF8; only that role of that layer leaves."""
    net = nn.Sequential(nn.Linear(64, 64))
    convert(net, recipe("auto", grad=False), verbose=False)
    with pytest.warns(CarrierWarning, match=r"0: input leaves its carrier: for 3 steps in a row") as told:
        grow(net)
    assert len([w for w in told if issubclass(w.category, CarrierWarning)]) == 1
    assert net[0].fp8_routes == ("exact", "auto", "exact")
    assert [row.route for row in summary(net, verbose=False)] == ["exact", "carrier"]
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin[0].fp8_routes == ("exact", "auto", "exact")
    before = int(net[0].fp8_counters[INPUT, 1])
    net(batch(0) * 4.0**6)
    assert int(net[0].fp8_counters[INPUT, 1]) == before, "HiF8 itself does not saturate"


def test_an_explicit_carrier_stays_and_is_reported() -> None:
    net = nn.Sequential(nn.Linear(64, 64))
    convert(net, recipe("carrier", grad=False), verbose=False)
    with pytest.warns(fp8kernels.SaturationWarning, match=r"largest value of hif8's carrier; .* \* 28 = "):
        grow(net)
    assert net[0].fp8_routes[INPUT] == "carrier"


def test_summary_names_the_carrier(capsys: pytest.CaptureFixture[str]) -> None:
    net = model("carrier")
    train(net, 1)
    rows = summary(net, batch(0))
    assert "hif8 (carrier)" in capsys.readouterr().out
    assert all(row.fmt == "hif8" and row.route == "carrier" for row in rows)
    assert all(row.sqnr_db is not None and row.sqnr_db > 28 for row in rows if row.role != "grad")


def test_export_writes_hif8_codes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A checkpoint holds the format itself, and the same bytes whichever way the layer computed."""
    from safetensors.torch import load_file

    files = []
    for route in ("exact", "carrier"):
        torch.manual_seed(3)
        net = nn.ModuleDict({"proj": nn.Linear(64, 32)})
        convert(net, recipe(route), verbose=False)
        fp8kernels.commit(net)
        fp8kernels.export(net, tmp_path / route)
        files.append(load_file(next((tmp_path / route).glob("*.safetensors"))))
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        assert torch.equal(value.view(torch.uint8), files[1][key].view(torch.uint8)), key


def test_revert_and_checkpoints() -> None:
    net, other = model("carrier"), model("exact")
    train(net, 2)
    other.load_state_dict(net.state_dict())
    assert net.state_dict().keys() == other.state_dict().keys()
    assert other[0].fp8_routes == ("exact",) * 3, "the route is the recipe's, not the checkpoint's"
    plain = revert(net)
    assert not any(key.startswith("fp8_") for key in vars(plain[0]))


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.usefixtures("_fp8_cores")
def test_compiled_whole(backend: str) -> None:
    eager, net = model("carrier"), model("carrier")
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    assert train(eager) == train(compiled)


def test_a_compiled_function_may_ask_whether_it_pays() -> None:
    """The question that a GPU is asked once is a constant for torch.compile."""

    def scaled(x: Tensor) -> Tensor:
        return x * (2 if carrier._has_fp8_cores(x.ndim) else 3)

    asked: list[int | None] = []

    def capability(device: int | None) -> tuple[int, int]:
        asked.append(device)
        return (9, 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", capability)
        patch.setattr(torch.version, "hip", None)
        carrier._capability.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch.compile warns where it looks into the cached function
            out = torch.compile(scaled, fullgraph=True, backend="eager")(torch.ones(2))
    carrier._capability.cache_clear()
    assert out.tolist() == [2.0, 2.0]
    assert asked == [1]


def test_importing_the_package_does_not_load_the_compiler() -> None:
    """Telling torch.compile so is a mark on the function: its own call would load all of it, for seconds."""
    code = "import sys, fp8kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- transposed codes -----------------------------------------------------------------------------------------------


def test_when_codes_are_kept_transposed() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert function.keeps_transposed(gpu, recipe("exact"))
    assert not function.keeps_transposed(cpu, recipe("exact"))
    assert not function.keeps_transposed(gpu, recipe("exact", grad=False))
    assert not function.keeps_transposed(gpu, get_recipe("e4m3-row").with_format(grad="e5m2"))


@pytest.fixture(params=["exact", "carrier"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Sequential, nn.Sequential]:
    return model(request.param), model(request.param)


def test_transposed_codes_change_no_bit(
    pair: tuple[nn.Sequential, nn.Sequential], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, gradients, scales and counters with transposed codes against those with transposed views."""
    views = train(pair[0])
    monkeypatch.setattr(function, "keeps_transposed", lambda device, recipe: True)
    assert train(pair[1]) == views
    for key, value in pair[0].state_dict().items():
        assert torch.equal(value, pair[1].state_dict()[key]), key


def test_only_the_transposed_codes_are_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte an element of input and weight, and nothing of an operand whose partner needs no gradient."""
    monkeypatch.setattr(function, "keeps_transposed", lambda device, recipe: True)
    for x_needs, w_needs, elements in ((True, True, 48 * 64 + 96 * 64), (False, True, 48 * 64), (True, False, 96 * 64)):
        layer = convert(nn.Linear(64, 96, bias=False), recipe("exact"), verbose=False)
        layer.weight.requires_grad_(w_needs)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, keep=saved: keep.append(t) or t, lambda t: t):
            out = layer(torch.randn(3, 16, 64, requires_grad=x_needs))
        codes = [t for t in saved if t.dtype == torch.uint8]
        assert sum(t.nbytes for t in codes) == elements
        assert all(t.is_contiguous() and t.shape[0] == 64 for t in codes)
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_transposed_codes_under_checkpointing(monkeypatch: pytest.MonkeyPatch, *, reentrant: bool) -> None:
    monkeypatch.setattr(function, "keeps_transposed", lambda device, recipe: True)
    plain, inner = model("exact"), model("exact")

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant)  # type: ignore[return-value]

    assert train(plain) == train(Checkpointed())
    assert isinstance(inner[0], ScaledLayer)
    assert torch.equal(plain[0].fp8_history, inner[0].fp8_history)
