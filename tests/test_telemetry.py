"""The counters, the summary and the alarm."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import fp8kernels
from fp8kernels import Alarm, SaturationError, SaturationWarning, convert, get_recipe, report, summary
from fp8kernels.info import info, table
from fp8kernels.ops.table import TABLE
from fp8kernels.telemetry import sqnr_db


def growing(policy: str, steps: int = 8, factor: float = 4.0) -> nn.Module:
    """A layer whose input grows by `factor` in every step, faster than a delayed scale follows."""
    recipe = get_recipe("e4m3-delayed").replace(alarm=Alarm(policy))
    model = convert(nn.Sequential(nn.Linear(64, 64)), recipe, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for n in range(steps):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(n))
        model(x * factor**n).sum().backward()
        optimizer.step()
    return model


def test_the_alarm_names_layer_fraction_and_amax_against_scale() -> None:
    with pytest.warns(SaturationWarning) as told:
        growing("warn")
    messages = [str(w.message) for w in told if issubclass(w.category, SaturationWarning)]
    assert len(messages) == 1, "told once, not in every step"
    assert messages[0].startswith("0: input saturates for 3 steps in a row: ")
    for part in ("% of its elements", "newest amax", "against scale"):
        assert part in messages[0]


def test_the_alarm_raises_or_stays_silent_by_policy() -> None:
    with pytest.raises(SaturationError, match="0: input saturates"):
        growing("raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SaturationWarning)
        growing("ignore")
        growing("warn", factor=1.0)  # nothing saturates
        growing("raise", steps=3)  # the first step has no past to lag behind: two steps in a row are not three


def test_an_older_checkpoint_is_no_alarm() -> None:
    recipe = get_recipe("e4m3-delayed").replace(alarm=Alarm("raise", steps=1))
    model = convert(nn.Sequential(nn.Linear(64, 64)), recipe, verbose=False)
    older = {key: value.clone() for key, value in model.state_dict().items()}
    model(torch.randn(8, 64))
    fp8kernels.commit(model)
    model.load_state_dict(older)  # its counters are below those that the alarm remembers
    fp8kernels.commit(model)


def test_summary_rows() -> None:
    model = convert(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), verbose=False)
    x = torch.randn(128, 64)
    model(x).sum().backward()
    fp8kernels.commit(model)
    rows = {(r.layer, r.role): r for r in summary(model, x, verbose=False)}
    assert set(rows) == {(layer, role) for layer in "02" for role in ("input", "weight")}
    first = rows["0", "input"]
    assert (first.fmt, first.scaling, first.saturated, first.nonfinite) == ("hif8", "delayed", 0.0, 0)
    assert first.amax == x.abs().max()
    assert math.isclose(first.overshoot, 1.0, rel_tol=1e-6)
    assert all(r.sqnr_db is not None and 28 < r.sqnr_db < 36 for r in rows.values())
    assert report(model)[0].sqnr_db is None  # inputs are measured only when given


def test_summary_counts_what_saturates(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)
        model = growing("warn")
    assert summary(model)[0].saturated > 0.01
    assert "saturated" in capsys.readouterr().out


def test_summary_measures_without_writing_state() -> None:
    model = convert(nn.Sequential(nn.Linear(64, 32)), verbose=False).train()
    x = torch.randn(4, 64)
    model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    summary(model, {"input": x}, verbose=False)
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_summary_of_convolution_and_attention() -> None:
    conv = convert(nn.Conv3d(1, 16, 4, 4), "e4m3-row", verbose=False)
    rows = summary(conv, torch.randn(2, 1, 8, 8, 8), verbose=False)
    assert all(row.sqnr_db is not None and row.sqnr_db > 28 for row in rows)
    attention = convert(nn.MultiheadAttention(64, 4), verbose=False)
    x = torch.randn(3, 2, 64)
    assert [row.role for row in summary(attention, (x, x, x), verbose=False)] == ["input", "weight"] * 2


def test_summary_needs_layers() -> None:
    with pytest.raises(ValueError, match="no 8-bit layers"):
        summary(nn.Linear(2, 2))


def test_sqnr_is_twenty_decibels_for_a_tenth() -> None:
    x = torch.randn(1000)
    assert math.isclose(sqnr_db(x, x * 1.1), 20.0, abs_tol=1e-3)
    assert sqnr_db(x, x) == math.inf


def test_info_has_a_reason_for_every_absent_backend() -> None:
    found = info()
    assert found.versions["torch"] == torch.__version__
    assert set(found.backends) == {(verb, kernel.name) for verb, kernels in TABLE.items() for kernel in kernels}
    assert all(reason is None or len(reason) > 5 for reason in found.backends.values())
    assert all(found.backends[verb, "reference"] is None for verb in TABLE)
    assert table(found).row_count > 15
