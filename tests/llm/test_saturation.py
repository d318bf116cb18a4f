"""The watch on amax saturation: its numbers against sums written out here, what is found, and no bit changed."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from setups.runs import FULL, QAT, converted, same_models, sgd, step
from setups.test_recompute import recompute_blocks
from torch import Tensor, nn

import fp8kernels
from fp8kernels import Alarm, FallbackWarning, Role, SaturationWarning, convert, get_recipe
from fp8kernels.formats import FORMATS, get_format
from fp8kernels.nn import fallback
from fp8kernels.nn.observe import observers
from fp8kernels.nn.step import after_commit, layers
from fp8kernels.telemetry.precision import limits, mantissa_bits
from fp8kernels.telemetry.saturation import SaturationStop, SaturationWatch, TensorReading
from fp8kernels.telemetry.tensors import histogram, sorted_histogram, stride

QUIET = Alarm("ignore")  # so that what speaks is the watch
HIF8 = get_recipe("hif8-qat").replace(alarm=QUIET).with_format(grad="hif8")
E4M3 = get_recipe("e4m3-delayed").replace(alarm=QUIET).with_format(grad="e5m2")


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = list(after_commit)
    yield
    for listener in list(after_commit):
        if listener not in before:
            after_commit.remove(listener)
    observers.clear()


def net(recipe: fp8kernels.Recipe = HIF8) -> nn.Module:
    torch.manual_seed(3)
    return convert(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)), recipe, verbose=False)


def batch(n: int) -> Tensor:
    return torch.randn(64, 64, generator=torch.Generator().manual_seed(n))


def optimizer_of(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, n: int) -> None:
    model(batch(n)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def by_name(readings: list[TensorReading]) -> dict[tuple[str, str], TensorReading]:
    return {(r.layer, r.role): r for r in readings}


def scaled(layer: nn.Module, factor: float) -> None:
    with torch.no_grad():
        layer.weight.mul_(factor)


def test_mantissa_bits_are_those_of_the_formats_papers() -> None:
    def zones(name: str) -> dict[int, tuple[float, float]]:
        fmt, out = get_format(name), {}
        for value, bits in zip(fmt.values, mantissa_bits(fmt), strict=True):
            if value > 0 and math.isfinite(value):
                low, high = out.get(bits, (value, value))
                out[bits] = min(low, value), max(high, value)
        return out

    e4m3, hif8 = zones("e4m3"), zones("hif8")
    assert hif8[3] == (0.125, 15.0)
    assert hif8[2] == (2.0**-7, 224.0)
    assert hif8[1] == (2.0**-15, get_format("hif8").max)
    assert hif8[0] == (2.0**-22, 2.0**-16)
    assert e4m3[3] == (2.0**-6, get_format("e4m3").max)
    assert set(zones("e5m2")) == {0, 1, 2}


@pytest.mark.parametrize("name", FORMATS)
def test_the_limits_are_where_a_normal_tensor_loses_three_decibels(name: str) -> None:
    fmt = get_format(name)
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def noise(stale: float) -> float:
        y = x / (x.abs().max() / (stale * fmt.target))
        return float((fmt.decode(fmt.encode(y)).double() - y).square().sum() / y.square().sum())

    limit = limits(name, fmt.target)
    assert noise(0.9 * limit.stale) < 2 * noise(1.0) < noise(1.1 * limit.stale)
    past = float((x.abs() > x.abs().max() / limit.stale).double().mean())
    assert past == pytest.approx(limit.past_target, rel=0.2)  # the amax of a million numbers varies by some percent


def test_numbers_of_a_spike_are_those_written_out_here() -> None:
    model = net()
    optimizer = optimizer_of(model)
    for n in range(3):
        one_step(model, optimizer, n)
    watch = SaturationWatch(model, every=4, policy="ignore")
    scaled(model[2], 64.0)
    seen: dict[str, Tensor] = {}
    plain = copy.deepcopy(model)  # what the layer sees, by hooks on a copy, which the watch does not know
    plain[2].register_forward_pre_hook(lambda _, args: seen.update(input=args[0].detach()))
    plain[2].register_full_backward_hook(lambda _, __, grads: seen.update(grad=grads[0].detach()))
    seen["weight"] = plain[2].weight.detach()
    scales = dict(zip(("input", "weight", "grad"), plain[2].fp8_scale.tolist(), strict=True))
    plain(batch(3)).square().mean().backward()
    one_step(model, optimizer, 3)

    (measured,) = watch.take()
    assert measured.step == 4
    assert [(r.layer, r.role) for r in measured.readings] == [(n, r) for n in "02" for r in ("input", "weight", "grad")]
    fmt = get_format("hif8")
    for role, x in seen.items():
        r = by_name(measured.readings)["2", role]
        target = fmt.grad_target if role == "grad" else fmt.target
        y = x.double().abs() / scales[role]
        rounded = fmt.decode(fmt.encode(x / scales[role])).double() * scales[role]
        assert (r.amax, r.scale, r.target, r.fmt) == (float(x.abs().max()), scales[role], target, "hif8")
        assert r.stale == pytest.approx(float(y.max()) / target, rel=1e-6)
        assert r.past_target == pytest.approx(float((y > target * (1 + 1e-6)).double().mean()), abs=1e-12)
        assert r.past_maximum == float((y >= fmt.overflow_at).double().mean())
        noise = 10 * math.log10(float(x.double().square().sum() / (rounded - x.double()).square().sum()))
        assert r.sqnr_db == pytest.approx(noise, abs=1e-4)
        # by the bounds of the zones: 3 bits to 15.5, 2 to 240, 1 to the end
        lost = (y >= 15.5).double() + (y >= 240).double()
        past = y > target * (1 + 1e-6)
        expected = float(lost[past].mean()) if past.any() else 0.0
        assert r.bits_lost == pytest.approx(expected, abs=1e-9)
    weight = by_name(measured.readings)["2", "weight"]
    assert weight.stale == pytest.approx(64, rel=0.05)
    assert weight.past_target > 0.9
    assert weight.past_maximum == 0.0  # no counter of saturation sees it
    assert 1 < weight.bits_lost < 2


@pytest.mark.parametrize("changes", [{"window": 1, "algorithm": "most_recent"}, {"window": 64}, {"interval": 8}])
def test_a_spike_is_found_with_its_layer_and_roles(changes: dict[str, Any]) -> None:
    model = net(HIF8.replace(**changes))
    optimizer = optimizer_of(model)
    watch = SaturationWatch(model, every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SaturationWarning)
        for n in range(9):
            one_step(model, optimizer, n)
    watch.take()
    scaled(model[2], 64.0)
    with pytest.warns(SaturationWarning, match=r"2: weight has outgrown its scale: amax .* is 6\d\.?\d* times") as told:
        one_step(model, optimizer, 9)
    text = str(told[0].message)
    assert text.startswith("step 10: 3 tensors have outgrown their scales.\n")
    assert "policy='fallback'" in text
    (measured,) = watch.take()
    # the gradient grows with the output, which is 64 times as large; and the first layer's comes through the weight
    assert {line.split(" has ")[0] for line in measured.findings} == {"2: weight", "2: grad", "0: grad"}
    assert measured.stop is None


@pytest.mark.parametrize("recipe", [HIF8, E4M3], ids=["hif8", "e4m3"])
def test_a_healthy_run_is_silent(recipe: fp8kernels.Recipe) -> None:
    model = net(recipe)
    optimizer, watch = optimizer_of(model), SaturationWatch(model, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SaturationWarning)
        for n in range(24):
            one_step(model, optimizer, n)
    measured = watch.take()
    assert [m.step for m in measured] == list(range(1, 25))
    assert not any(m.findings for m in measured)
    assert all(r.sqnr_db is not None and r.sqnr_db > 24 for m in measured for r in m.readings)


def test_e4m3_clips_where_hif8_only_loses_bits() -> None:
    found = {}
    for recipe in (HIF8, E4M3):
        model = net(recipe)
        optimizer, watch = optimizer_of(model), SaturationWatch(model, every=3, policy="ignore")
        for n in range(2):
            one_step(model, optimizer, n)
        scaled(model[2], 4.0)
        one_step(model, optimizer, 2)
        found[recipe.name] = by_name(watch.take()[0].readings)["2", "weight"]
    hif8, e4m3 = found["hif8-qat"], found["e4m3-delayed"]
    assert hif8.stale == pytest.approx(e4m3.stale, rel=1e-3)
    assert hif8.past_maximum == 0.0
    assert 0.9 < hif8.bits_lost <= 1.0
    assert e4m3.past_maximum > 0.5
    assert e4m3.bits_lost > 2.5
    assert hif8.sqnr_db is not None and e4m3.sqnr_db is not None and hif8.sqnr_db > e4m3.sqnr_db + 10


def test_what_a_clamp_cuts_is_lost() -> None:
    role = Role("hif8", clamp=True)
    model = net(HIF8.replace(input=role, weight=role))
    optimizer, watch = optimizer_of(model), SaturationWatch(model, every=3, policy="ignore")
    for n in range(2):
        one_step(model, optimizer, n)
    scaled(model[2], 4.0)
    one_step(model, optimizer, 2)
    r = by_name(watch.take()[0].readings)["2", "weight"]
    assert r.past_maximum == r.past_target > 0.5
    assert r.bits_lost == 3.0


def runs(family: str, forward: Callable[[nn.Module], Any], **how: Any) -> tuple[list[Any], nn.Module, int]:
    """Losses and the model of four steps of two micro-batches, measured in every second; and what was measured."""
    watching = how.pop("watching")
    model = how.pop("make")()
    watch = SaturationWatch(model, every=2, sample=500) if watching else None
    optimizer = sgd(model)
    run = forward(model)
    losses = [step(run, optimizer, family, 2 * n, 2 * n + 1, weight=0.5) for n in range(4)]
    return losses, model, 0 if watch is None else sum(len(m.readings) for m in watch.take())


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    from setups.models import build

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return convert(peft.get_peft_model(build("llama"), config), FULL, verbose=False)


SETUPS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "fused": (lambda: converted("llama"), lambda model: model),
    "unfused": (lambda: converted("llama", fuse=False), lambda model: model),
    "recomputed": (lambda: recompute_blocks(converted("llama"), use_reentrant=False), lambda model: model),
    "reentrant": (lambda: recompute_blocks(converted("llama"), use_reentrant=True), lambda model: model),
    "autocast": (lambda: converted("llama"), lambda model: torch.autocast("cpu", torch.bfloat16)(model)),
    "plain gradients": (lambda: converted("llama", QAT), lambda model: model),
    "warm-up": (lambda: converted("llama", FULL.replace(warmup_steps=2)), lambda model: model),
    "row scales": (lambda: converted("llama", get_recipe("e4m3-row")), lambda model: model),
    "adapters": (adapted, lambda model: model),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_training_is_not_changed_by_a_bit(setup: str) -> None:
    pytest.importorskip("transformers")
    make, forward = SETUPS[setup]
    losses, model, _ = runs("llama", forward, make=make, watching=False)
    watched_losses, watched, count = runs("llama", forward, make=make, watching=True)
    assert losses == watched_losses
    same_models(model, watched)
    roles = 2 if setup in ("plain gradients", "row scales") else 3
    # before the first adapter nothing needs a gradient: q, k and v of the first block have none
    without = 3 if setup == "adapters" else 0
    assert count == 2 * (roles * len(layers(model)) - without)


def test_readers_of_a_fused_norm_are_each_measured_as_if_unfused() -> None:
    pytest.importorskip("transformers")
    rows = []
    for fuse in (False, True):
        model = converted("llama", fuse=fuse)
        watch = SaturationWatch(model, every=1)
        optimizer = sgd(model)
        for n in range(3):
            step(model, optimizer, "llama", n)
        rows.append([m.rows() for m in watch.take()])
    assert rows[0] == rows[1]


def test_stop_comes_after_a_complete_step_and_can_be_left_to_the_trainer() -> None:
    for raising in (True, False):
        model, twin = net(), net()
        optimizer, other = optimizer_of(model), optimizer_of(twin)
        watch = SaturationWatch(model, every=2, policy="stop", raising=raising)
        one_step(model, optimizer, 0)
        one_step(twin, other, 0)
        scaled(model[2], 64.0)
        scaled(twin[2], 64.0)
        if raising:
            with pytest.raises(SaturationStop, match=r"step 2: 3 tensors .*\n(.*\n)*2: weight has outgrown"):
                one_step(model, optimizer, 1)
        else:
            one_step(model, optimizer, 1)
        one_step(twin, other, 1)
        same_models(model, twin)
        (measured,) = watch.take()
        assert measured.stop is not None and "2: weight" in measured.stop


def test_fallback_is_saved_resumed_and_left_again() -> None:
    recipe = HIF8.replace(alarm=Alarm("ignore", recover=4), algorithm="most_recent")
    model = net(recipe)
    optimizer = optimizer_of(model)
    watch = SaturationWatch(model, every=2, policy="fallback")
    one_step(model, optimizer, 0)
    scaled(model[2], 64.0)
    one_step(model, optimizer, 1)
    assert [layer.fp8_high for layer in layers(model)] == [False, False]
    with pytest.warns(FallbackWarning) as told:
        one_step(model, optimizer, 2)  # all ranks act at a commit, and this is the next one
    assert any("2: falls back to high precision, as it was asked to: 2: " in str(w.message) for w in told)
    assert [layer.fp8_high for layer in layers(model)] == [True, True]

    saved, memory = copy.deepcopy(model.state_dict()), watch.state_dict()
    again = net(recipe)
    resumed = SaturationWatch(again, every=2, policy="fallback")
    again.load_state_dict(saved)
    resumed.load_state_dict(memory)
    late = net(recipe)  # and where the watch comes when the state is there already
    late.load_state_dict(saved)
    SaturationWatch(late, every=2, policy="fallback")
    for loaded in (again, late):
        assert [layer.fp8_high for layer in layers(loaded)] == [True, True]
    assert resumed.measuring  # step 4 is a multiple of 2
    other = optimizer_of(again)
    steps = 0
    while any(layer.fp8_high for layer in layers(model)):
        steps += 1
        one_step(model, optimizer, 3 + steps)
        one_step(again, other, 3 + steps)
        assert steps < 10
    assert steps == 4, "quiet for as many steps as the alarm's recover says"
    same_models(model, again)


def asked_to_fall_back() -> tuple[nn.Module, torch.optim.SGD, SaturationWatch]:
    """A model after step 2, which was measured: its layers are to fall back at the commit of step 3."""
    model = net(HIF8.replace(alarm=Alarm("ignore", recover=50), algorithm="most_recent"))
    optimizer, watch = optimizer_of(model), SaturationWatch(model, every=2, policy="fallback")
    one_step(model, optimizer, 0)
    scaled(model[2], 64.0)
    one_step(model, optimizer, 1)
    return model, optimizer, watch


def test_what_was_asked_for_before_a_checkpoint_happens_after_it() -> None:
    model, optimizer, watch = asked_to_fall_back()
    saved, memory = copy.deepcopy(model.state_dict()), json.loads(json.dumps(watch.state_dict()))
    again = net(HIF8.replace(alarm=Alarm("ignore", recover=50), algorithm="most_recent"))
    resumed = SaturationWatch(again, every=2, policy="fallback")
    again.load_state_dict(saved)
    resumed.load_state_dict(memory)
    for one, its in ((model, optimizer), (again, optimizer_of(again))):
        with pytest.warns(FallbackWarning, match="as it was asked to: 2: "):
            one_step(one, its, 2)
        assert [layer.fp8_high for layer in layers(one)] == [True, True]
    same_models(model, again)
    assert watch.state_dict()["asked"] == {}


def test_from_a_gpu_what_was_asked_for_happens_one_commit_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """There each commit first acts on the decision of the one before, which does not answer what was asked since."""
    arrived = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(fallback, "to_host", lambda x: (x.clone(), arrived))
    model, optimizer, _ = asked_to_fall_back()
    high = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for n in (2, 3):
            one_step(model, optimizer, n)
            high.append([layer.fp8_high for layer in layers(model)])
    assert high == [[False, False], [True, True]]


def test_a_resumed_watch_measures_the_same_steps() -> None:
    model = net()
    optimizer, watch = optimizer_of(model), SaturationWatch(model, every=5)
    for n in range(12):
        one_step(model, optimizer, n)
        if n == 6:
            saved, memory = copy.deepcopy(model.state_dict()), watch.state_dict()
    again = net()
    resumed = SaturationWatch(again, every=5)
    again.load_state_dict(saved)
    resumed.load_state_dict(memory)
    other = optimizer_of(again)
    for n in range(7, 12):
        one_step(again, other, n)
    first, second = watch.take()
    assert (first.step, second.step) == (5, 10)
    (after,) = resumed.take()
    assert after.rows() == second.rows()


def test_in_a_row_and_once_until_it_has_recovered() -> None:
    model = net(HIF8.replace(window=1, algorithm="most_recent"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch = SaturationWatch(model, every=1, policy="warn", steps=2, stale=3.0, past_target=1.0)
    factors = [1, 4, 1, 4, 4, 4, 1, 4, 4]
    findings = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)
        for n, factor in enumerate(factors):
            scaled(model[2], factor)
            one_step(model, optimizer, n)
            findings.append([f for f in watch.take()[0].findings if f.startswith("2: weight")])
    assert [len(found) for found in findings] == [0, 0, 0, 0, 1, 0, 0, 0, 1]


def test_samples_take_all_columns_in_turn() -> None:
    assert stride(1000, 10, 1000) == 1
    for elements, columns, sample in ((1 << 20, 1024, 1000), (3 * 5 * 7 * 64, 105, 100), (12345, 1, 100)):
        k = stride(elements, columns, sample)
        assert elements / k <= sample
        if elements // columns > columns:
            assert len({n * k % columns for n in range(columns)}) == columns


def test_codes_are_counted_the_same_by_sorting_as_on_a_gpu() -> None:
    codes = torch.randint(0, 256, (40, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) | 8
    codes[0] = 255
    for only in (None, codes > 99, codes < 0):
        assert torch.equal(sorted_histogram(codes, only), histogram(codes, only))


def test_what_is_not_looked_at() -> None:
    model = net()
    watch = SaturationWatch(model, every=1)
    optimizer = optimizer_of(model)
    other = net()
    one_step(other, optimizer_of(other), 0)  # another model's step
    model.eval()
    model(batch(0))
    model.train()
    assert not watch.take()
    one_step(model, optimizer, 1)
    assert len(watch.take()) == 1
    watch.remove()
    one_step(model, optimizer, 2)
    assert not watch.take()
    assert not observers


def test_a_watch_that_can_see_nothing_says_so() -> None:
    model = net(HIF8.replace(grad=None))
    optimizer, watch = optimizer_of(model), SaturationWatch(model, every=1)
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for n in range(3):
            compiled(batch(n)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    said = [str(w.message) for w in told if issubclass(w.category, SaturationWarning)]
    assert len(said) == 1 and "step 1: SaturationWatch saw no tensor" in said[0]
    assert [m.step for m in watch.take()] == [1, 2, 3]


def test_bad_arguments_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="no 8-bit layers"):
        SaturationWatch(nn.Linear(4, 4))
    for wrong in ({"policy": "panic"}, {"every": 0}, {"steps": 0}, {"stale": 0.0}, {"past_target": 2.0}, {"sample": 0}):
        with pytest.raises(ValueError, match="SaturationWatch: "):
            SaturationWatch(net(), **wrong)


def test_a_tensor_with_inf_or_of_zeros_has_a_reading() -> None:
    model = net(HIF8.replace(grad=None))
    watch = SaturationWatch(model, every=1, policy="ignore")
    x = batch(0)
    x[0, 0] = torch.inf
    model(x)
    model(torch.zeros(4, 64))
    fp8kernels.commit(model)
    (measured,) = watch.take()
    r = by_name(measured.readings)["0", "input"]
    assert r.amax == math.inf and r.sqnr_db is None


def test_the_pages_block_runs_and_its_limits_are_the_codes(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "TELEMETRY.md").read_text(encoding="utf-8")
    section = text.partition("## What the counters do not show")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    exec(compile(block, "TELEMETRY.md", "exec"), {"__name__": "telemetry_page"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        [step, layer, role] for step in ("5", "10") for layer in "01" for role in ("input", "weight")
    ]
    rows = re.findall(r"^\| (\w+), target ([\d.]+) \| ([\d.]+) \| ([\d.]+)% \|$", section, flags=re.M)
    assert len(rows) == 4
    for name, target, stale, past in rows:
        limit = limits(name.lower(), float(target))
        assert (stale, past) == (f"{limit.stale:.2f}", f"{100 * limit.past_target:.1f}")
