"""The alarm's policy "fallback": a layer that keeps saturating computes in high precision, and comes back."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fp8kernels
from fp8kernels import Alarm, FallbackWarning, SaturationWarning, convert, get_recipe
from fp8kernels.nn import fallback
from fp8kernels.nn.fallback import UNSEEN, decisions
from fp8kernels.nn.hold import hold_high
from fp8kernels.nn.step import layers

FACTOR = 4.0  # per step: a history lags behind by more than a format's head-room
ALARM = Alarm("fallback", steps=2, recover=4)


def recipe(alarm: Alarm = ALARM, **changes: object) -> fp8kernels.Recipe:
    return get_recipe("e4m3-delayed").replace(alarm=alarm, window=4, **changes)


def batch(n: int, size: float = 1.0) -> Tensor:
    """Every batch of a size has the same amax."""
    return size * torch.randn(8, 32, generator=torch.Generator().manual_seed(n)).clamp(-1, 1)


def one() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32))


def two() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))


class Run:
    """A converted model, and steps with inputs of a given size; weights stand still, so that 8-bit or not shows."""

    def __init__(self, changed: fp8kernels.Recipe, make: Callable[[], nn.Module] = two) -> None:
        torch.manual_seed(3)
        self.model = convert(make(), changed, verbose=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self.count = 0

    def step(self, size: float = 1.0, factor: float = 1.0) -> Tensor:
        out: Tensor = self.model(batch(self.count, size))
        (factor * out).sum().backward()
        self.optimizer.step()
        self.count += 1
        return out.detach()

    @property
    def high(self) -> list[bool]:
        return [layer.fp8_high for layer in layers(self.model)]

    def fall(self) -> float:
        """Let it saturate until the first layer is in high precision; the size of the last inputs."""
        size = 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            while not self.high[0]:
                self.step(size)
                size *= FACTOR
                assert size < FACTOR**8, "never fell back"
        return size / FACTOR


def test_it_falls_back_after_its_steps_and_returns_after_quiet_ones() -> None:
    run = Run(recipe())
    with pytest.warns(FallbackWarning) as told:
        said = [run.step(FACTOR**n) is not None and run.high[0] for n in range(4)]
    # the first step has no history, and takes its own amax; the next two saturate
    assert said == [False, False, True, True]
    assert len([w for w in told if w.category is FallbackWarning]) == 2  # each layer once
    size = FACTOR**3
    back = [run.step(size) is not None and run.high[0] for _ in range(ALARM.recover + 1)]
    # its last fall saturated still, so the quiet steps begin with the first of these
    assert back == [True] * (ALARM.recover - 1) + [False, False]


def test_in_high_precision_it_computes_what_torch_does() -> None:
    run = Run(recipe())
    size = run.fall()
    plain = two()
    plain.load_state_dict(fp8kernels.without_state(run.model.state_dict()))
    x = batch(run.count, size)
    assert run.high == [True, True]
    assert torch.equal(run.model(x), plain(x))
    run.model.eval()
    assert torch.equal(run.model(x), plain(x))
    run.model[0].fp8_high = False
    assert not torch.equal(run.model(x), plain(x))


def test_the_histories_follow_all_the_while_also_of_gradients() -> None:
    run = Run(recipe().with_format(grad="e5m2"), one)
    twin = Run(recipe(Alarm("ignore")).with_format(grad="e5m2"), one)
    for n in range(6):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            run.step(FACTOR**n)
        twin.step(FACTOR**n)
    assert run.high == [True]
    for key in ("fp8_history", "fp8_scale", "fp8_counters"):
        assert torch.equal(getattr(run.model[0], key), getattr(twin.model[0], key)), key
    assert (run.model[0].fp8_history[2] > 0).all()


def test_a_gradient_that_saturates_is_reason_enough() -> None:
    run = Run(recipe().with_format(grad="e4m3"), one)
    with pytest.warns(FallbackWarning, match=r"of grad in the last one"):
        [run.step(factor=FACTOR**n) for n in range(4)]
    assert run.high == [True]


def test_changes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(recipe(), one)
    with caplog.at_level(logging.INFO, logger="fp8kernels"):
        size = run.fall()
        for _ in range(ALARM.recover):
            run.step(size)
    assert run.high == [False]
    fell, returned = (record.getMessage() for record in caplog.records if record.name == "fp8kernels")
    assert fell.startswith("0: falls back to high precision: for 2 steps in a row more than 0.100% of a tensor")
    amax = batch(2, FACTOR**2).abs().max()
    scale = max(batch(n, FACTOR**n).abs().max() for n in range(2)) / fp8kernels.E4M3.target
    assert f"of input in the last one: amax {amax:.4g} against scale {scale:.4g} * {fp8kernels.E4M3.max:g}" in fell
    assert returned.startswith("0: computes in 8 bits again: for 4 steps in a row at most 0.050% would saturate")


def test_other_policies_never_fall_back() -> None:
    run = Run(recipe(Alarm("warn", steps=2)))
    with pytest.warns(SaturationWarning):
        [run.step(FACTOR**n) for n in range(5)]
    assert run.high == [False, False]
    assert all(not layer.fp8_fallback.any() for layer in layers(run.model))


def test_policy_fallback_speaks_of_falling_back_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SaturationWarning)
        Run(recipe()).fall()


def by_hand(state: list[int], fractions: list[float], limit: float, steps: int, recover: int) -> list[int]:
    """The rule for one layer, as the head of nn/fallback.py has it."""
    high, in_a_row = state
    seen = [f for f in fractions if f != UNSEEN]
    if not seen:
        return state
    if high:
        in_a_row = in_a_row + 1 if max(seen) <= limit / 2 else 0
        return [0, 0] if in_a_row == recover else [1, in_a_row]
    in_a_row = in_a_row + 1 if max(seen) > limit else 0
    return [1, 0] if in_a_row == steps else [0, in_a_row]


def test_decisions_are_the_rule_layer_by_layer() -> None:
    random = torch.Generator().manual_seed(1)
    limit = [0.0, 0.25, 0.25, 0.5] * 8
    steps = [[1, 1], [2, 3], [3, 2], [1, 4]] * 8
    levels = torch.tensor([UNSEEN, 0.0, 0.125, 0.25, 0.375, 0.5, 1.0])
    state = torch.zeros(len(limit), 2, dtype=torch.int64)
    expected, falls = state.tolist(), 0
    for _ in range(200):
        row = torch.randint(0, len(levels), (len(limit), 3), generator=random)
        fractions = levels[row * (torch.rand(len(limit), 1, generator=random) < 0.6)]  # often unseen as a whole
        state = decisions(state, fractions, torch.tensor(limit)[:, None], torch.tensor(steps))
        expected = [
            by_hand(s, f, at, *n) for s, f, at, n in zip(expected, fractions.tolist(), limit, steps, strict=True)
        ]
        assert state.tolist() == expected
        falls += int(state[:, 0].sum())
    assert 0 < falls < 200 * len(limit)


def test_hysteresis_between_half_of_the_fraction_and_all_of_it_nothing_changes() -> None:
    limit, steps = torch.tensor([[0.1]]), torch.tensor([[1, 1]])
    between = torch.tensor([[0.075, UNSEEN, UNSEEN]])
    for state in ([0, 0], [1, 0]):
        assert decisions(torch.tensor([state]), between, limit, steps).tolist() == [state]


def test_steps_without_the_layer_and_second_commits_change_nothing() -> None:
    run = Run(recipe(), one)
    run.step()
    run.step(FACTOR)
    layer = run.model[0]
    assert layer.fp8_fallback.tolist() == [0, 1]
    fp8kernels.commit(run.model)
    run.optimizer.step()
    assert layer.fp8_fallback.tolist() == [0, 1]
    with pytest.warns(FallbackWarning):
        run.step(FACTOR**2)
    assert layer.fp8_fallback.tolist() == [1, 0]


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_resumed_run_is_the_run(stop: int, tmp_path: Path) -> None:
    """Also in the middle of a row, before and after the fall."""

    def go(run: Run, until: int) -> list[Tensor]:
        out = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            while run.count < until:
                out.append(run.step(FACTOR ** min(run.count, 4)))
        return out

    whole = Run(recipe())
    expected = go(whole, 12)[stop:]
    first = Run(recipe())
    go(first, stop)
    torch.save(first.model.state_dict(), tmp_path / "model.pt")
    second = Run(recipe())
    second.model.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    second.count = stop
    assert second.high == first.high
    for a, b in zip(go(second, 12), expected, strict=True):
        assert torch.equal(a, b)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[key], value), key


def test_a_recipe_without_the_policy_ignores_what_a_checkpoint_says() -> None:
    fallen = Run(recipe())
    fallen.fall()
    warned = Run(recipe(Alarm("warn")))
    warned.model.load_state_dict(fallen.model.state_dict())
    assert warned.high == [False, False]


def test_a_copy_falls_back_on_its_own() -> None:
    run = Run(recipe(), one)
    run.step()
    other = Run.__new__(Run)
    other.model, other.count = copy.deepcopy(run.model), 1
    other.optimizer = torch.optim.SGD(other.model.parameters(), lr=0.0)
    other.fall()
    run.step()
    assert (other.high, run.high) == ([True], [False])
    third = copy.deepcopy(other.model)
    assert third[0].fp8_high
    assert torch.equal(third(batch(0)), F.linear(batch(0), third[0].weight, third[0].bias))


def fallen(layer: nn.Module) -> nn.Module:
    model = convert(layer, recipe(), verbose=False)
    for each in layers(model):
        each.fp8_fallback[0] = 1
        each.fp8_sync_step()
    return model


def test_convolutions_fall_back() -> None:
    plain, x = nn.Conv2d(3, 8, 4, 4), torch.randn(2, 3, 8, 8)
    model = fallen(copy.deepcopy(plain))
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)  # [B, 2, 2, 3 * 4 * 4]
    expected = F.linear(patches, plain.weight.flatten(1), plain.bias).permute(0, 3, 1, 2)
    assert torch.equal(model(x), expected)
    assert model.fp8_pending[0] == x.abs().max()


def test_attention_falls_back() -> None:
    model, x = fallen(nn.MultiheadAttention(32, 4)), torch.randn(6, 2, 32)
    qkv = model._linear(x, model.in_proj_weight, model.in_proj_bias)
    assert torch.equal(qkv, F.linear(x, model.in_proj_weight, model.in_proj_bias))
    model(x, x, x)
    assert all(layer.fp8_pending[0] > 0 and layer.fp8_high for layer in layers(model))
    assert len(layers(model)) == 2


def test_fused_readers_go_plain_together_and_come_back() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q, self.k = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.q(h) * self.k(h)

    run = Run(recipe(), Block)
    assert type(run.model.norm).__name__ == "FusedLayerNorm"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for n in range(4):
            with torch.no_grad():
                run.model.norm.weight.fill_(FACTOR**n)
            run.step()
    assert run.high == [True, True]
    assert torch.equal(run.model.q.fp8_counters[0], run.model.k.fp8_counters[0])
    for _ in range(ALARM.recover):
        run.step()
    assert run.high == [False, False]


def test_compiled_it_falls_back_too() -> None:
    torch._dynamo.reset()
    eager, compiled = Run(recipe().with_format(grad="e5m2")), Run(recipe().with_format(grad="e5m2"))
    compiled.model.compile(fullgraph=True, backend="aot_eager")
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for n in range(10):
            size = FACTOR ** min(n, 4)
            assert torch.equal(eager.step(size), compiled.step(size))
            assert eager.high == compiled.high
            seen.add(eager.high[0])
    assert seen == {True, False}
    assert not eager.high[0]
    assert torch.equal(eager.model[0].fp8_counters, compiled.model[0].fp8_counters)


class FakeEvent:
    """Of a copy that has arrived when it is waited for."""

    waited = 0

    def synchronize(self) -> None:
        FakeEvent.waited += 1


def test_from_a_gpu_decisions_are_read_and_acted_on_one_commit_later(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Run(recipe(), one)
    monkeypatch.setattr(FakeEvent, "waited", 0)
    monkeypatch.setattr(fallback, "to_host", lambda x: (x.clone(), FakeEvent()))
    here = Run(recipe(), one)
    state, high = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for n in range(6):
            here.step(FACTOR ** min(n, 3))
            state.append(bool(here.model[0].fp8_fallback[0]))
            high.append(here.high[0])
    assert state == [False, False, True, True, True, True]
    assert high == [False, False, False, True, True, True]
    assert FakeEvent.waited == 5, "once at each commit after the first"
    there.model.load_state_dict(here.model.state_dict())
    assert there.high == [True]


def test_a_decision_on_its_way_is_not_lost_with_what_held_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Converting another model makes every list of layers be collected anew; the state has what was decided."""
    monkeypatch.setattr(fallback, "to_host", lambda x: (x.clone(), FakeEvent()))
    run = Run(recipe(), one)
    for n in range(3):
        run.step(FACTOR**n)
    assert (run.model[0].fp8_fallback.tolist(), run.high) == ([1, 0], [False])
    Run(recipe(), one)
    with pytest.warns(FallbackWarning, match="as its state says"):
        run.step(FACTOR**3)
    assert run.high == [True]


def test_bad_alarms_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="did you mean 'fallback'"):
        Alarm("fall-back")
    with pytest.raises(ValueError, match="recover=0"):
        Alarm("fallback", recover=0)


@pytest.mark.parametrize("alarm", [ALARM, Alarm()], ids=["fallback", "warn"])
def test_held_layers_stay_in_high_precision_through_steps_copies_and_checkpoints(alarm: Alarm) -> None:
    run, plain = Run(recipe(alarm)), Run(recipe(alarm))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (run, plain):
            each.step()
        assert hold_high(run.model) == 2
        assert hold_high(run.model) == 0
        for _ in range(2 * ALARM.recover):
            run.step()
            plain.step()
    assert run.high == [True, True]
    assert plain.high == [False, False]
    x, (first, second) = batch(0), run.model
    exact = F.linear(F.linear(x, first.weight, first.bias), second.weight, second.bias)
    assert torch.equal(run.model(x), exact)
    assert not torch.equal(plain.model(x), exact)
    assert torch.equal(run.model[0].fp8_scale, plain.model[0].fp8_scale), "what it sees is still noted"
    plain.model.load_state_dict(run.model.state_dict())
    assert plain.high == [True, True]
    twin = copy.deepcopy(run.model)
    assert torch.equal(twin(x), exact)
