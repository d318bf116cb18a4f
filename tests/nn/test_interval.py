"""Recipe.interval: histories take part in every step, scales are made every few, and a resumed run keeps step."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fp8kernels
from fp8kernels import Alarm, Recipe, commit, convert, get_recipe
from fp8kernels.convert import plan_fusion
from fp8kernels.nn.state import RecipeWarning

EVERY = 3
RECIPE = get_recipe("hif8-qat").replace(window=4, interval=EVERY, algorithm="most_recent", alarm=Alarm("ignore"))


def batch(n: int) -> Tensor:
    """Batches whose amax goes up and down from step to step."""
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(n)) * 2.0 ** (n * 5 % 7)


class Run:
    def __init__(self, recipe: Recipe = RECIPE) -> None:
        torch.manual_seed(0)
        self.model = convert(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)), recipe, verbose=False)
        self.steps = 0

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
            self.model(batch(self.steps)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            self.steps += 1


def amax(n: int) -> Tensor:
    return batch(n).abs().max()


def equal(a: nn.Module, b: nn.Module) -> None:
    one, two = a.state_dict(), b.state_dict()
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


@pytest.mark.parametrize("algorithm", ["most_recent", "max"])
def test_scales_are_made_at_steps_1_4_7_and_histories_at_all(algorithm: str) -> None:
    run = Run(RECIPE.replace(algorithm=algorithm))
    for n in range(9):
        run.step()
        first = run.model[0]
        seen = [float(amax(k)) for k in range(n, max(n - 4, -1), -1)]
        assert first.fp8_history[0, : len(seen)].tolist() == seen
        made = n - n % EVERY  # from 0: 0, 0, 0, 3, 3, 3, 6, …
        history = [amax(k) for k in range(made, max(made - 4, -1), -1)]
        assert first.fp8_scale[0] == (history[0] if algorithm == "most_recent" else max(history)) / 15


def test_an_interval_of_one_is_what_there_was() -> None:
    run = Run(RECIPE.replace(interval=1))
    for n in range(4):
        run.step()
        assert run.model[0].fp8_scale[0] == amax(n) / 15
    assert "0.fp8_target" not in run.model.state_dict()


def test_a_tensor_without_a_scale_gets_one_at_any_step() -> None:
    run = Run(RECIPE.with_format(grad="hif8"))
    run.model(batch(0))
    commit(run.model)  # step 1 has seen no gradient
    assert run.model[0].fp8_scale[2] == 0
    run.steps = 1
    run.step()
    layer = run.model[0]
    assert layer.fp8_scale[2] == layer.fp8_history[2, 0] / 224
    assert layer.fp8_scale[0] == amax(0) / 15, "the input's has another step to wait"
    scale = layer.fp8_scale.clone()
    run.step()
    assert torch.equal(layer.fp8_scale, scale)
    run.step()
    assert (layer.fp8_scale != scale).all()


def test_steps_are_those_in_which_a_layer_was_seen() -> None:
    run = Run()
    run.step(2)
    for _ in range(3):
        commit(run.model)  # nothing was seen
    assert run.model[0].fp8_scale[0] == amax(0) / 15
    run.step()
    assert run.model[0].fp8_scale[0] == amax(0) / 15
    run.step()
    assert run.model[0].fp8_scale[0] == amax(3) / 15


def test_layers_have_intervals_of_their_own() -> None:
    run = Run(get_recipe("hif8-qat").replace(algorithm="most_recent").with_override("0", RECIPE))
    run.step(2)
    first, last = run.model[0], run.model[2]
    assert first.fp8_scale[1] != first.fp8_history[1, 0] / 15
    assert last.fp8_scale[1] == last.fp8_history[1, 0] / 15


def load(run: Run) -> nn.Module:
    out = Run().model
    out.load_state_dict(run.model.state_dict())
    return out


def load_in_place(run: Run) -> nn.Module:
    """As torch.distributed.checkpoint does: into the tensors of the state_dict, which is then loaded."""
    out = Run().model
    state = out.state_dict()
    for key, value in run.model.state_dict().items():
        state[key].copy_(value)
    out.load_state_dict(state)
    return out


def load_assigned(run: Run) -> nn.Module:
    with torch.device("meta"):
        out = convert(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)), RECIPE, verbose=False)
    out.load_state_dict(copy.deepcopy(run.model.state_dict()), assign=True)
    return out


RESUMED: dict[str, Callable[[Run], nn.Module]] = {
    "load": load,
    "in place": load_in_place,
    "assign": load_assigned,
    "deepcopy": lambda run: copy.deepcopy(run.model),
    "pickle": lambda run: pickle.loads(pickle.dumps(run.model)),
}


@pytest.mark.parametrize("how", RESUMED)
@pytest.mark.parametrize("stop", [1, 2, 3, 6])
def test_a_resumed_run_is_the_same_run(stop: int, how: str) -> None:
    """Six steps fill the window of four, so that what the scales were made of is in no history any more."""
    whole, first = Run(), Run()
    whole.step(stop)
    first.step(stop)
    second = Run()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecipeWarning)
        second.model, second.steps = RESUMED[how](first), stop
    equal(whole.model, second.model)
    for _ in range(4):
        whole.step()
        second.step()
        equal(whole.model, second.model)


@pytest.mark.parametrize("how", ["load", "in place"])
def test_another_target_makes_the_scales_again(how: str) -> None:
    old = Run(RECIPE.with_format(input="e4m3", weight="e4m3"))
    old.step(2)
    with pytest.warns(RecipeWarning, match="interval"):
        new = RESUMED[how](old)
    assert new[0].fp8_scale[0] == amax(1) / 15
    assert new[0].fp8_target.tolist()[:2] == [15, 15]


def test_to_an_interval_and_back() -> None:
    often, seldom = Run(RECIPE.replace(interval=1)), Run()
    often.step(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecipeWarning)
        seldom.model.load_state_dict(often.model.state_dict())
    seldom.steps = 2
    seldom.step()
    assert seldom.model[0].fp8_scale[0] == amax(1) / 15, "the third step makes none"
    with pytest.warns(RecipeWarning):
        often.model.load_state_dict(seldom.model.state_dict())
    assert often.model[0].fp8_scale[0] == amax(2) / 15


def test_held_scales_are_no_part_of_the_plain_model() -> None:
    run = Run()
    run.step()
    assert not any("fp8" in key for key in fp8kernels.without_state(run.model.state_dict()))
    assert not any("fp8" in key for key in fp8kernels.revert(run.model).state_dict())


def test_readers_of_one_tensor_share_codes_only_with_one_interval() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q, self.k = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.q(h) * self.k(h)

    def reasons(recipe: Recipe) -> list[str | None]:
        return [fusion.reason for fusion in plan_fusion(convert(Block(), recipe, fuse=False, verbose=False))]

    assert reasons(RECIPE) == [None]
    assert reasons(RECIPE.with_override("k", RECIPE.replace(interval=2))) == [
        "q and k have different recipes for their input"
    ]


def test_an_interval_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="interval=0"):
        RECIPE.replace(interval=0)
