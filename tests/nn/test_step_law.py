"""The step law: scales are frozen within a step, one commit makes them, and repeating either half changes nothing."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fp8kernels
from fp8kernels import commit, convert, get_recipe
from fp8kernels.nn.step import layers

RECIPE = get_recipe("hif8-qat").replace(window=4)
DELAYED_GRAD = RECIPE.with_format(grad="hif8")


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 8))


def converted(recipe: fp8kernels.Recipe = RECIPE, seed: int = 0) -> nn.Sequential:
    return convert(model(seed), recipe, verbose=False)


def batch(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)) * scale


def step(net: nn.Module, optimizer: torch.optim.Optimizer, *batches: Tensor) -> float:
    loss = sum((net(x).square().mean() for x in batches), torch.tensor(0.0))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def state(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items() if ".fp8_" in key or key.startswith("fp8_")}


def same(a: dict[str, Tensor], b: dict[str, Tensor], *, but: tuple[str, ...] = ()) -> None:
    assert a.keys() == b.keys()
    for key in a:
        if not key.endswith(but or ("-",)):
            assert torch.equal(a[key], b[key]), f"{key}: {a[key]} against {b[key]}"


def sgd(net: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def test_scales_do_not_move_within_a_step() -> None:
    net = converted()
    optimizer = sgd(net)
    step(net, optimizer, batch(0))
    before = net[0].fp8_scale.clone()
    net(batch(1, 100.0)).sum().backward()
    assert torch.equal(net[0].fp8_scale, before)
    assert net[0].fp8_pending[0] == batch(1, 100.0).abs().max()
    optimizer.step()
    assert net[0].fp8_scale[0] == batch(1, 100.0).abs().max() / 15


def test_one_step_by_hand() -> None:
    """The history, newest first, and the scale that follows from it, against plain arithmetic."""
    net = converted(RECIPE.replace(algorithm="max"))
    optimizer = sgd(net)
    seen = []
    for n in range(6):
        x = batch(n, 2.0**n if n < 3 else 0.5)
        seen.insert(0, float(x.abs().max()))
        step(net, optimizer, x)
        window = seen[:4]
        assert net[0].fp8_history[0].tolist() == window + [0.0] * (4 - len(window))
        assert net[0].fp8_scale[0] == torch.tensor(max(window)) / 15
        assert int(net[0].fp8_step) == n + 1


def test_committing_twice_changes_nothing() -> None:
    net = converted()
    step(net, sgd(net), batch(0))
    before = state(net)
    commit(net)
    same(state(net), before)


def test_micro_batches_enter_as_their_maximum() -> None:
    net, whole = converted(), converted()
    step(net, sgd(net), batch(0, 3.0), batch(1), batch(2))
    assert net[0].fp8_history[0, 0] == batch(0, 3.0).abs().max()
    assert net[0].fp8_history[0, 1] == 0
    step(whole, sgd(whole), torch.cat([batch(0, 3.0), batch(1), batch(2)]))
    assert torch.equal(net[0].fp8_history[0], whole[0].fp8_history[0])


@pytest.mark.parametrize("recipe", [RECIPE, DELAYED_GRAD], ids=["bf16-grad", "hif8-grad"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(recipe: fp8kernels.Recipe, *, reentrant: bool) -> None:
    plain, recomputed = converted(recipe), converted(recipe)
    optimizers = sgd(plain), sgd(recomputed)

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(recomputed, x.requires_grad_(), use_reentrant=reentrant)  # type: ignore[return-value]

    wrapped = Checkpointed()
    for n in range(5):
        a = step(plain, optimizers[0], batch(n, 2.0**n))
        b = step(wrapped, optimizers[1], batch(n, 2.0**n))
        assert a == b
        same(state(plain), state(recomputed), but=("fp8_counters",))  # what is seen twice is counted twice
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_layer_called_twice_and_one_not_called() -> None:
    net = converted()
    optimizer = sgd(net)
    step(net, optimizer, batch(0))
    before = state(net)
    inner = net[0]
    (inner(batch(1)).sum() + inner(batch(2, 5.0)).sum()).backward()
    optimizer.step()
    after = state(net)
    assert after["0.fp8_history"][0, 0] == batch(2, 5.0).abs().max()
    assert torch.equal(after["2.fp8_history"], before["2.fp8_history"])
    assert torch.equal(after["2.fp8_scale"], before["2.fp8_scale"])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_zero_and_non_finite_amax_stay_out_of_the_history(bad: float) -> None:
    net = converted()
    optimizer = sgd(net)
    step(net, optimizer, batch(0))
    before = state(net)
    x = torch.zeros(16, 32)
    x[3, 4] = bad
    net[0](x)
    commit(net)
    after = state(net)
    assert torch.equal(after["0.fp8_history"][0], before["0.fp8_history"][0])
    assert torch.equal(after["0.fp8_scale"][0], before["0.fp8_scale"][0])
    counted = after["0.fp8_counters"][0, 3] - before["0.fp8_counters"][0, 3]
    assert counted == (0 if bad == 0 else 1)


def test_first_use_takes_the_current_amax() -> None:
    net, current = converted(), convert(model(), RECIPE, verbose=False)
    x = batch(0, 1e-3)
    y = net(x)
    assert (y - model()(x)).norm() / model()(x).norm() < 0.1
    assert torch.equal(y, current.eval()(x))  # and without training mode the same


def test_eval_and_inference_write_nothing() -> None:
    net = converted()
    step(net, sgd(net), batch(0))
    before = state(net)
    with torch.inference_mode():
        net(batch(1, 9.0))
    net.eval()
    net(batch(2, 9.0))
    with torch.inference_mode():
        net(batch(3, 9.0))
    same(state(net), before)


def test_warm_up_computes_plainly_and_fills_histories() -> None:
    net, plain = converted(RECIPE.replace(warmup_steps=2)), model()
    optimizers = sgd(net), sgd(plain)
    for n in range(2):
        assert step(net, optimizers[0], batch(n)) == step(plain, optimizers[1], batch(n))
    assert net[0].fp8_history[0, :2].tolist() == [float(batch(1).abs().max()), float(batch(0).abs().max())]
    assert step(net, optimizers[0], batch(2)) != step(plain, optimizers[1], batch(2))


def test_gradient_history_fills() -> None:
    net = converted(DELAYED_GRAD)
    step(net, sgd(net), batch(0))
    assert (net[0].fp8_history[:, 0] > 0).all()
    assert net[0].fp8_scale[2] == net[0].fp8_history[2, 0] / 224


def test_the_window_counts_optimizer_steps() -> None:
    net = converted()
    optimizer = sgd(net)
    step(net, optimizer, *[batch(n) for n in range(9)])
    assert (net[0].fp8_history[0] > 0).sum() == 1


def test_steps_count_commits_in_which_a_layer_was_seen() -> None:
    net = converted()
    optimizer = sgd(net)
    for n in range(3):
        step(net, optimizer, batch(n), batch(n + 1))
        commit(net)
        net[0](batch(n))
        commit(net)
    assert [int(net[0].fp8_step), int(net[2].fp8_step)] == [6, 3]


def test_a_weight_is_quantized_once_a_step() -> None:
    """Micro-batches after the first find its codes; the counters say how often they were made."""
    net = converted()
    optimizer = sgd(net)
    step(net, optimizer, batch(0))
    weight, inputs = net[0].fp8_counters[1, 0].clone(), net[0].fp8_counters[0, 0].clone()
    for n in range(4):
        net(batch(n)).square().mean().backward()
    made = int(net[0].fp8_counters[1, 0] - weight) // net[0].weight.numel()
    assert made == 1
    assert net[0].fp8_counters[0, 0] - inputs == 4 * batch(0).numel()
    optimizer.step()
    assert torch.equal(net(batch(9)), net.eval()(batch(9)))  # new codes after the update: eval keeps none


def test_a_weight_written_within_a_step_is_quantized_anew() -> None:
    net = converted()
    step(net, sgd(net), batch(0))
    for _ in range(2):
        net(batch(1)).square().mean().backward()
    with torch.no_grad():
        net[0].weight.mul_(0.5)
    trained = net(batch(1))
    assert torch.equal(trained, net.eval()(batch(1)))


def test_a_held_scale_stays_where_it_is() -> None:
    """Static roles of a recipe are noted and not moved; delayed ones of the same layer move."""
    net = converted()
    step(net, sgd(net), batch(0))
    held = RECIPE.replace(input=RECIPE.frozen().input)
    other = converted(held)
    other.load_state_dict(net.state_dict())
    scale = other[0].fp8_scale.clone()
    step(other, sgd(other), batch(1, 50.0))
    with torch.no_grad():
        other[0].weight.mul_(3.0)
    step(other, sgd(other), batch(1, 50.0))
    assert other[0].fp8_scale[0] == scale[0]
    assert other[0].fp8_scale[1] > 2 * scale[1]


def test_an_optimizer_of_another_model_commits_nothing() -> None:
    net, other = converted(), converted(seed=1)
    net(batch(0)).sum().backward()
    step(other, sgd(other), batch(1))
    assert net[0].fp8_pending[0] > 0
    assert (net[0].fp8_history == 0).all()


def test_a_skipped_optimizer_step_keeps_what_was_seen() -> None:
    net = converted()
    optimizer = sgd(net)
    net(batch(0, 7.0)).sum().backward()
    optimizer.zero_grad()  # no optimizer.step(): a scaler found an Inf
    step(net, optimizer, batch(1))
    assert net[0].fp8_history[0, 0] == batch(0, 7.0).abs().max()


def test_user_function_as_algorithm() -> None:
    net = converted(RECIPE.replace(algorithm=lambda history: history.amax(1) * 2))
    step(net, sgd(net), batch(0))
    assert net[0].fp8_scale[0] == batch(0).abs().max() * 2 / 15


def test_copies_and_pickles_train_on_their_own() -> None:
    net = converted()
    step(net, sgd(net), batch(0))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        before = state(net)
        step(twin, sgd(twin), batch(1, 4.0))
        assert twin[0].fp8_history[0, 0] == batch(1, 4.0).abs().max()
        same(state(net), before)


def test_dtype_moves_leave_the_state_in_fp32() -> None:
    net = converted()
    step(net, sgd(net), batch(0))
    before = state(net)
    net.bfloat16()
    assert net[0].weight.dtype == torch.bfloat16
    same(state(net), before)
    assert net(batch(1).bfloat16()).dtype == torch.bfloat16


def test_checkpoints_go_both_ways_and_resume_to_the_bit() -> None:
    net, plain = converted(), model(seed=5)
    optimizer = sgd(net)
    step(net, optimizer, batch(0))
    net.load_state_dict(plain.state_dict())  # strict, without scaling state
    assert torch.equal(net[0].weight, plain[0].weight)
    plain.load_state_dict(fp8kernels.without_state(net.state_dict()))
    step(net, optimizer, batch(1))
    resumed = converted(seed=9)
    resumed.load_state_dict(net.state_dict())
    assert torch.equal(resumed(batch(2)), net(batch(2)))
    same(state(resumed), state(net))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda s: s.update({"0.weight": torch.zeros(3, 3)}), r"0\.weight: shape \(3, 3\)"),
        (lambda s: s.update({"0.fp8_history": torch.zeros(2, 4)}), r"0\.fp8_history: shape \(2, 4\)"),
        (lambda s: s.update({"2.fp8_scale": torch.tensor([-1.0, 0, 0])}), "negative or non-finite"),
        (lambda s: s.update({"2.fp8_history": torch.full((3, 4), math.nan)}), "negative or non-finite"),
    ],
)
def test_a_foreign_checkpoint_is_refused_before_any_weight_is_touched(damage, says: str) -> None:  # type: ignore[no-untyped-def]
    net = converted()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    foreign = converted(seed=3).state_dict()
    damage(foreign)
    with pytest.raises(ValueError, match=says):
        net.load_state_dict(foreign)
    same(net.state_dict(), before)


def test_commit_needs_layers() -> None:
    with pytest.raises(ValueError, match="no 8-bit layers"):
        commit(nn.Linear(2, 2))
    assert len(layers(converted())) == 2


@pytest.mark.parametrize("recipe", ["hif8-qat", "e4m3-row"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole_equals_eager(recipe: str, backend: str) -> None:
    eager, net = converted(get_recipe(recipe)), converted(get_recipe(recipe))
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    optimizers = sgd(eager), sgd(net)
    for n in range(4):
        a, b = step(eager, optimizers[0], batch(n)), step(compiled, optimizers[1], batch(n))
        assert math.isclose(a, b, rel_tol=1e-5)  # inductor fuses GELU: another order of fp32 roundings
    torch.testing.assert_close(net[0].fp8_scale, eager[0].fp8_scale, rtol=1e-5, atol=0)
    assert torch.equal(net[0].fp8_counters, eager[0].fp8_counters)


def test_the_state_is_fp32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        net = converted()
        step(net, sgd(net), batch(0).bfloat16())
        current = convert(model(), "e4m3-row", verbose=False)
        step(current, sgd(current), batch(0).bfloat16())
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in state(net).items():
        assert not value.is_floating_point() or value.dtype == torch.float32, key
    assert net[0].fp8_scale[0] == batch(0).bfloat16().float().abs().max() / 15
