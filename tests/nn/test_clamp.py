"""Role.clamp: what lies beyond target * scale is cut before it is rounded; against arithmetic in float64 by hand."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8kernels
from fp8kernels import Alarm, FallbackWarning, Recipe, Role, SaturationWarning, commit, convert, export
from fp8kernels.convert import plan_fusion
from fp8kernels.formats import get_format
from fp8kernels.kernels.quantize import carrier
from fp8kernels.nn import fallback
from fp8kernels.nn.tensor_parallel import with_scale
from fp8kernels.scaling.delayed import GRAD, INPUT, WEIGHT

M, K, N = 24, 40, 32
U = 2.0**-24  # of fp32, in which products are summed
GROWTH = 3.0  # times the amax that the scales were made of
QUIET = Alarm("ignore")


def recipe(fmt: str = "hif8", **changes: object) -> Recipe:
    role = Role(fmt, clamp=True)
    return Recipe("test", role, role, role, window=1, alarm=QUIET).replace(**changes)


def open_ended(clamped: Recipe) -> Recipe:
    """The same without clamp."""
    roles = [None if r is None else Role(r.fmt, r.scaling, r.block, r.target, r.route) for r in clamped.roles()]
    return clamped.replace(input=roles[INPUT], weight=roles[WEIGHT], grad=roles[GRAD])


def layer(rules: Recipe, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A converted layer whose scales were made of smaller numbers than those to come."""
    torch.manual_seed(0)
    net = convert(nn.Linear(K, N, dtype=dtype), rules, verbose=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    net(torch.randn(M, K, dtype=dtype)).backward(torch.randn(M, N, dtype=dtype))
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        net.weight.mul_(GROWTH)
    return net


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Input and output gradient, of which some lie beyond the scales."""
    random = torch.Generator().manual_seed(1)
    x = (GROWTH * torch.randn(M, K, generator=random)).to(dtype).requires_grad_()
    return x, (GROWTH * torch.randn(M, N, generator=random)).to(dtype)


def by_hand(x: Tensor, scale: Tensor, target: float, fmt: str) -> Tensor:
    """x [...] float64: cut, divided as docs/NUMERICS.md has it (once, in fp32), rounded by the format, multiplied."""
    rules, limit = get_format(fmt), target * scale.double()
    y = x.detach().double().clamp(-limit, limit).float() / scale
    return rules.decode(rules.encode(y)).double() * scale.double()


@pytest.mark.parametrize("straight_through", ["plain", "clipped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("fmt", "target"), [("hif8", None), ("hif8", 7.5), ("e4m3", 240.0), ("e4m3", None)])
def test_all_three_tensors_are_cut(fmt: str, target: float | None, dtype: torch.dtype, straight_through: str) -> None:
    role = Role(fmt, target=target, clamp=True)
    rules = recipe(input=role, weight=role, grad=role, straight_through=straight_through)
    net = layer(rules, dtype)
    x, g = batch(dtype)
    scale, before = net.fp8_scale.clone(), net.fp8_counters.clone()
    out = net(x)
    out.backward(g)

    tensors = {INPUT: x.detach(), WEIGHT: net.weight.detach(), GRAD: g}
    at = {index: rules.target(index) for index in tensors}
    cut = {i: tensors[i].abs().double() > at[i] * scale[i].double() * (1 + 2.0**-22) for i in tensors}
    decoded = {index: by_hand(tensors[index], scale[index], at[index], fmt) for index in tensors}
    wanted = {
        "out": decoded[INPUT] @ decoded[WEIGHT].T + net.bias.detach().double(),
        "x": decoded[GRAD] @ decoded[WEIGHT],
        "weight": decoded[GRAD].T @ decoded[INPUT],
    }
    if straight_through == "clipped":
        wanted["x"], wanted["weight"] = wanted["x"] * ~cut[INPUT], wanted["weight"] * ~cut[WEIGHT]
    size = {index: value.abs() for index, value in decoded.items()}
    u_out = 0.0 if dtype == torch.float32 else 2.0**-8
    for got, name, bound, terms in (
        (out, "out", size[INPUT] @ size[WEIGHT].T + net.bias.detach().abs(), K + 1),
        (x.grad, "x", size[GRAD] @ size[WEIGHT], N),
        (net.weight.grad, "weight", size[GRAD].T @ size[INPUT], M),
    ):
        error = (got.double() - wanted[name]).abs()
        assert (error <= (terms + 4) * U * bound + u_out * wanted[name].abs()).all(), name
    counted = net.fp8_counters - before
    for index, tensor in tensors.items():
        assert cut[index].any()
        assert counted[index].tolist()[:2] == [tensor.numel(), int(cut[index].sum())]
        assert counted[index, 3] == 0
        assert net.fp8_pending[index] == tensor.abs().max()


@pytest.mark.parametrize("fmt", ["hif8", "e4m3"])
def test_what_flushes_is_counted_as_without_clamp(fmt: str) -> None:
    nets = layer(recipe(fmt)), layer(open_ended(recipe(fmt)))
    x = torch.randn(M, K) * torch.logspace(-8, 1, K)
    counted = []
    for net in nets:
        before = net.fp8_counters.clone()
        net(x)
        counted.append((net.fp8_counters - before)[INPUT].tolist())
    assert counted[0][2] == counted[1][2] > 0
    assert counted[0][1] > 0


def test_hif8_without_clamp_keeps_what_lies_beyond() -> None:
    """What the option is for: the same step, where HiF8's head-room takes what the clamp cuts."""
    x, _ = batch()
    top = []
    for rules in (recipe(), open_ended(recipe())):
        net = layer(rules)
        before = net.fp8_counters.clone()
        coded = net.fp8_quantize(x, INPUT)
        decoded = torch.ops.fp8kernels.dequantize(coded.codes, coded.scale, coded.fmt, torch.float32)
        top.append((float(decoded.abs().max() / net.fp8_scale[INPUT]), int((net.fp8_counters - before)[INPUT, 1])))
    assert top[0][0] == 15.0
    assert top[0][1] > 0
    assert top[1][0] > 30.0
    assert top[1][1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_stays_and_inf_is_cut(bad: float) -> None:
    net = layer(recipe(straight_through="clipped"))
    before, scale = net.fp8_counters.clone(), net.fp8_scale.clone()
    x = torch.zeros(M, K)
    x[3, 4], x[5, 6] = bad, 0.5
    x.requires_grad_()
    out = net(x)
    counted = (net.fp8_counters - before)[INPUT].tolist()
    assert counted == [M * K, int(math.isinf(bad)), 0, 1]
    assert net.fp8_pending[INPUT] == 0, "an amax that is not finite is noted nowhere"
    out.sum().backward()
    if math.isnan(bad):
        assert out[3].isnan().all()
        assert not out[[n for n in range(M) if n != 3]].isnan().any()
        return
    again = torch.zeros(M, K)
    again[3, 4], again[5, 6] = math.copysign(15.0, bad) * float(scale[INPUT]), 0.5
    assert torch.equal(out, net(again))
    assert x.grad[3, 4] == 0
    assert x.grad[5, 6] != 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_seen_behind_the_layer(bad: float) -> None:
    net = layer(recipe())
    x, g = batch()
    g[0, 0] = bad
    net(x).backward(g)
    assert not x.grad.isfinite().any()
    assert not net.weight.grad.isfinite().any()


@pytest.mark.parametrize("straight_through", ["plain", "clipped"])
def test_a_tensor_without_a_scale_is_not_cut(straight_through: str) -> None:
    rules = recipe(straight_through=straight_through)
    nets = [convert(nn.Linear(K, N), each, verbose=False) for each in (rules, open_ended(rules))]
    nets[1].load_state_dict(nets[0].state_dict())
    results = []
    for net in nets:
        x, g = batch()
        out = net(x)
        out.backward(g)
        assert (x.grad != 0).all()
        assert (net.weight.grad != 0).all()
        results.append((out, x.grad, net.weight.grad, net.fp8_counters, net.fp8_pending))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize(("fmt", "target"), [("hif8", 14.0), ("e4m3", 448.0)])
def test_the_amax_that_a_scale_was_made_of_is_not_beyond_it(fmt: str, target: float, *, clamp: bool) -> None:
    """amax / target * target is smaller than amax for some: by a rounding, which is no reason to cut a gradient."""
    rules = recipe(input=Role(fmt, target=target, clamp=True), straight_through="clipped", grad=None, weight=Role(fmt))
    net = convert(nn.Linear(1, 1, bias=False), rules if clamp else open_ended(rules), verbose=False)
    nn.init.ones_(net.weight)
    smaller = 0
    for n in range(1, 200):
        x = torch.tensor([[n / 7]], requires_grad=True)
        net(x)
        commit(net)
        before = net.fp8_counters.clone()
        net(x).backward()
        assert x.grad == 1
        assert net.fp8_counters[INPUT, 1] == before[INPUT, 1]
        smaller += bool(net.fp8_scale[INPUT] * target < x.detach())
    assert smaller > 0


@pytest.mark.parametrize("clamp", [True, False])
def test_what_lies_beyond_is_told_in_fp32_whatever_the_dtype(*, clamp: bool) -> None:
    """1.0078125 is the bfloat16 above 1: it lies beyond a limit of 1.005, which rounds to it."""
    rules = recipe("e4m3", straight_through="clipped", grad=None, weight=Role("e4m3"))
    net = convert(nn.Linear(2, 1, bias=False).bfloat16(), rules if clamp else open_ended(rules), verbose=False)
    nn.init.ones_(net.weight)
    net.fp8_scale[INPUT] = 1.005 / 448
    x = torch.tensor([[1.0078125, 1.0]], dtype=torch.bfloat16, requires_grad=True)
    net(x).backward(torch.ones(1, 1, dtype=torch.bfloat16))
    assert x.grad.tolist() == [[0.0, 1.0]]


def test_a_tensor_without_elements() -> None:
    net = layer(recipe())
    before = net.fp8_counters.clone()
    assert net(torch.zeros(0, K)).shape == (0, N)
    assert torch.equal(net.fp8_counters[INPUT], before[INPUT])


def test_micro_batches_enter_as_their_maximum() -> None:
    net = layer(recipe())
    x, _ = batch()
    net(2 * x)
    net(x)
    assert net.fp8_pending[INPUT] == 2 * x.abs().max()


def test_margin_is_head_room_below_the_cut() -> None:
    net = layer(recipe(margin=1))
    x = torch.zeros(1, K)
    amax = float(net.fp8_history[INPUT, 0])
    x[0, :3] = torch.tensor([1.5, 1.99, 2.01]) * amax
    before = net.fp8_counters.clone()
    net(x)
    assert (net.fp8_counters - before)[INPUT, 1] == 1
    assert net.fp8_recipe.target(INPUT) == 7.5


def test_eval_and_inference_cut_too_and_note_nothing() -> None:
    net = layer(recipe())
    x, _ = batch()
    trained = net(x).detach()
    before = copy.deepcopy(net.state_dict())
    with torch.inference_mode():
        assert torch.equal(net(x), trained)
    net.eval()
    assert torch.equal(net(x), trained)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    static = convert(nn.Linear(K, N), recipe().frozen(), verbose=False)
    static.load_state_dict(before)
    assert torch.equal(static(x), trained)


def test_the_warm_up_counts_what_would_be_cut() -> None:
    net = layer(recipe(warmup_steps=2))
    x, g = batch()
    before = net.fp8_counters.clone()
    net(x).backward(g)
    assert torch.equal(x.grad, g @ net.weight), "in high precision nothing is cut"
    limit = 15 * net.fp8_scale[INPUT]
    counted = (net.fp8_counters - before)[:, 1]
    assert counted[INPUT] == (x.abs() > limit).sum()
    assert (counted > 0).all()


@pytest.mark.parametrize("clamp", [True, False])
def test_hif8_falls_back_where_it_is_cut_and_nowhere_else(*, clamp: bool) -> None:
    rules = recipe(grad=None, alarm=Alarm("fallback", steps=2, recover=4))
    net = convert(nn.Linear(K, N), rules if clamp else open_ended(rules), verbose=False)
    said = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for n in range(4):
            net(2.0**n * torch.randn(M, K, generator=torch.Generator().manual_seed(n)).clamp(-1, 1))
            commit(net)
            said.append(net.fp8_high)
    assert said == ([False, False, True, True] if clamp else [False] * 4)
    messages = [str(w.message) for w in told if w.category is FallbackWarning]
    assert len(messages) == int(clamp)
    assert all("* 15 (hif8 clamped at its target) = " in message for message in messages)


def saturate(net: nn.Module, steps: int) -> None:
    for n in range(steps):
        net(10.0**n * batch()[0])
        commit(net)


def test_the_alarm_says_that_values_are_cut() -> None:
    net = layer(recipe(alarm=Alarm("warn", steps=1), weight=Role("hif8"), grad=None))
    with pytest.warns(SaturationWarning, match="exceed the largest value of hif8 clamped at its target") as told:
        saturate(net, 2)
    assert len([w for w in told if w.category is SaturationWarning]) == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_changes_no_bit(*, reentrant: bool) -> None:
    plain, recomputed = layer(recipe(straight_through="clipped")), layer(recipe(straight_through="clipped"))
    (x, g), (y, _) = batch(), batch()
    out = plain(x)
    out.backward(g)
    again = checkpoint(recomputed, y, use_reentrant=reentrant)
    assert torch.equal(out, again)
    again.backward(g)
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(plain.weight.grad, recomputed.weight.grad)
    commit(plain), commit(recomputed)
    assert torch.equal(plain.fp8_scale, recomputed.fp8_scale)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole_equals_eager(backend: str) -> None:
    torch._dynamo.reset()
    eager, net = layer(recipe(straight_through="clipped")), layer(recipe(straight_through="clipped"))
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    (x, g), (y, _) = batch(), batch()
    eager(x).backward(g)
    compiled(y).backward(g)
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(eager.fp8_counters, net.fp8_counters)
    assert torch.equal(eager.fp8_pending, net.fp8_pending)


def test_patches_and_attention_are_cut() -> None:
    patches = convert(nn.Conv2d(3, 8, 4, 4), recipe(grad=None), verbose=False)
    attention = convert(nn.MultiheadAttention(32, 4), recipe(grad=None), verbose=False)
    x, y = torch.rand(2, 3, 8, 8), torch.rand(6, 2, 32)
    for net, seen in ((patches, (x,)), (attention, (y, y, y))):
        for size in (1.0, 2.0):
            before = net.fp8_counters.clone()
            net(*(size * tensor for tensor in seen))
            counted = net.fp8_counters - before
            commit(net)
        assert 0 < counted[INPUT, 1] < counted[INPUT, 0]


def test_nothing_hands_codes_to_a_layer_that_cuts_its_input() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(self.norm(x))

    def reasons(rules: Recipe) -> list[str | None]:
        return [fusion.reason for fusion in plan_fusion(convert(Block(), rules, fuse=False, verbose=False))]

    assert reasons(recipe()) == ["q clamps its input before it is rounded"]
    assert reasons(recipe(input=Role("hif8"))) == [None]


def test_a_carrier_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "pays", lambda device: True)
    shifts = []
    for role in (Role("hif8", clamp=True), Role("hif8", route="carrier", clamp=True), Role("hif8")):
        net = convert(nn.Linear(K, N), recipe(input=role), verbose=False)
        shifts.append(net.fp8_carrier(INPUT, torch.device("cpu")))
        assert fallback.may_leave_its_carrier(net, INPUT) == (role == Role("hif8"))
    assert shifts == [None, 4, 4]


def test_an_element_is_counted_once_where_the_target_itself_saturates() -> None:
    """448 is a tie of HiF8 and goes to 512, which the carrier cannot hold."""
    role = Role("hif8", target=448.0, route="carrier", clamp=True)
    net = layer(recipe(input=role, grad=None))
    before = net.fp8_counters.clone()
    x, _ = batch()
    net(x)
    cut = x.abs() > 448 * net.fp8_scale[INPUT]
    assert (net.fp8_counters - before)[INPUT, 1] == cut.sum() > 0


def test_scales_from_outside_cut_only_what_is_no_own_scale() -> None:
    """Shards whose scale is made of the whole tensor (tensor parallel, gathered codes) are cut as that would be."""
    net = layer(recipe())
    lent = with_scale(net, net.fp8_scale.clone(), [INPUT])
    assert [lent.fp8_recipe.clamp(index) for index in (INPUT, WEIGHT, GRAD)] == [None, 15.0, 224.0]
    x, _ = batch()
    assert lent.fp8_recipe.input.scaling == "static"
    assert not torch.equal(lent(x), net(x))


def test_export_refuses_a_clamped_input(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="'0' clamps its input"):
        export(convert(nn.Sequential(nn.Linear(K, N)), recipe(), verbose=False), tmp_path / "model")
    clamped_weight = nn.Sequential(nn.Linear(K, N))
    export(convert(clamped_weight, recipe(input=Role("hif8")), verbose=False), tmp_path / "model")
    assert (tmp_path / "model").is_dir()


def test_clamp_needs_a_scale_of_past_steps() -> None:
    with pytest.raises(ValueError, match="leaves nothing to cut"):
        Role("e4m3", "current", clamp=True)
    assert fp8kernels.get_recipe("hif8-qat").clamp(INPUT) is None
