"""Scaling algorithms against ten lines of NumPy, and against TransformerEngine's documented arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fp8kernels import commit, convert, get_recipe

UNITS = 16  # fp32 roundings of 2**-24 that sums over a window of eight may take, relative
AMAX = st.one_of(
    st.floats(2.0**-10, 2.0**10, width=32), st.sampled_from([0.0, math.inf, math.nan])
)  # 0: not seen; not finite: never enters
SEQUENCES = st.lists(AMAX, min_size=1, max_size=12)


def defined(seen: list[float], window: int, algorithm: str, decay: float) -> np.ndarray:
    """The history, newest first, and the amax that follows from it, in float64."""
    filled = [a for a in reversed(seen) if np.isfinite(a) and a > 0][:window]
    history = np.array(filled + [0.0] * (window - len(filled)))
    weights = {"moving_average": np.ones(len(filled)), "exponential_moving_average": decay ** np.arange(len(filled))}
    if not filled:
        amax = 0.0
    elif algorithm in weights:
        amax = np.average(filled, weights=weights[algorithm])
    else:
        amax = max(filled) if algorithm == "max" else filled[0]
    return np.array([amax, *history])


def trained(seen: list[float], **recipe: object) -> nn.Module:
    """A layer that noted these amax, one a step; 0 where it was not called."""
    layer = convert(nn.Linear(4, 4), get_recipe("e4m3-delayed").replace(**recipe), verbose=False)
    for amax in seen:
        layer.fp8_pending[0] = amax
        commit(layer)
    return layer


@pytest.mark.parametrize("algorithm", ["max", "most_recent", "moving_average", "exponential_moving_average"])
@settings(max_examples=40, deadline=None)
@given(seen=SEQUENCES, window=st.integers(1, 8), decay=st.floats(0.05, 0.95))
def test_against_numpy(algorithm: str, seen: list[float], window: int, decay: float) -> None:
    layer = trained(seen, algorithm=algorithm, window=window, decay=decay)
    amax, *history = defined(seen, window, algorithm, decay)
    assert layer.fp8_history[0].tolist() == history
    wanted = amax / layer.fp8_recipe.target(0)  # 0 while nothing was seen
    assert abs(float(layer.fp8_scale[0]) - wanted) <= UNITS * 2.0**-24 * wanted
    assert int(layer.fp8_step) == sum(np.isfinite(a) and a > 0 for a in seen)


def transformer_engine(seen: list[float], length: int, algorithm: str, margin: int, largest: float) -> float:
    """TransformerEngine's scale, which encodes.

    source  its user guide and DelayedScaling's docstring: scale = (FP8_MAX / amax) / 2**margin, over a history of
            `amax_history_len`; where amax is 0 or not finite the scale stays, and it begins at 1
    """
    history, scale = [0.0] * length, 1.0
    for amax in seen:
        history = [amax, *history[:-1]]
        chosen = max(history) if algorithm == "max" else history[0]
        if chosen > 0 and math.isfinite(chosen):
            scale = (largest / chosen) / 2.0**margin
    return scale


@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@settings(max_examples=40, deadline=None)
@given(
    seen=st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=1, max_size=12),
    length=st.integers(1, 8),
    margin=st.integers(0, 3),
)
def test_scales_are_the_reciprocals_of_transformer_engines(
    algorithm: str, seen: list[float], length: int, margin: int
) -> None:
    layer = trained(seen, algorithm=algorithm, window=length, margin=margin)
    encodes = transformer_engine(seen, length, algorithm, margin, layer.fp8_recipe.replace(margin=0).target(0))
    assert abs(float(layer.fp8_scale[0]) * encodes - 1) <= UNITS * 2.0**-24


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_bad_amax_leaves_the_scale_as_transformer_engine_does(bad: float) -> None:
    """In its histories a bad amax takes a slot, which "most_recent" skips; here it takes none."""
    seen = [3.0, bad]
    layer = trained(seen, algorithm="most_recent", window=4)
    encodes = transformer_engine(seen, 4, "most_recent", 0, layer.fp8_recipe.target(0))
    assert abs(float(layer.fp8_scale[0]) * encodes - 1) <= UNITS * 2.0**-24
    assert layer.fp8_history[0].tolist() == [3.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_is_between_0_and_1(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        get_recipe("hif8-qat").replace(decay=decay)
