"""Recipes of TransformerEngine and torchao, read by their fields; stand-ins have the fields of 2.20 and 0.18."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8kernels import convert, get_recipe
from fp8kernels.nn.step import layers
from fp8kernels.peers import PeerWarning


class Format(enum.Enum):
    E4M3 = 1
    E5M2 = 2
    HYBRID = 3


@dataclass
class DelayedScaling:
    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: Any = "max"
    scaling_factor_compute_algo: Callable[..., Tensor] | None = None
    reduce_amax: bool = True
    fp8_dpa: bool = False
    fp8_mha: bool = False
    backward_override: str | None = None


@dataclass
class Float8CurrentScaling:
    fp8_format: Format = Format.HYBRID
    use_power_2_scales: bool = False
    fp8_dpa: bool = False
    backward_override: str | None = None


@dataclass
class QParams:
    power_2_scale: bool = True


@dataclass
class Float8BlockScaling:
    fp8_format: Format = Format.E4M3
    fp8_quant_fwd_inp: QParams = field(default_factory=QParams)
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    backward_override: str | None = None


@dataclass
class MXFP8BlockScaling:
    fp8_format: Format = Format.E4M3


class ScalingType(enum.Enum):
    DYNAMIC = "dynamic"
    DISABLED = "disabled"


class ScalingGranularity(enum.Enum):
    TENSORWISE = "tensorwise"
    AXISWISE = "axiswise"


@dataclass(frozen=True)
class CastConfig:
    scaling_type: ScalingType = ScalingType.DYNAMIC
    scaling_granularity: ScalingGranularity = ScalingGranularity.TENSORWISE
    target_dtype: torch.dtype | None = torch.float8_e4m3fn


GRADIENT = CastConfig(target_dtype=torch.float8_e5m2)
ROWS = CastConfig(scaling_granularity=ScalingGranularity.AXISWISE)
OFF = CastConfig(ScalingType.DISABLED)


@dataclass(frozen=True)
class Float8LinearConfig:
    cast_config_input: CastConfig = CastConfig()
    cast_config_input_for_grad_weight: CastConfig | None = None
    cast_config_weight: CastConfig = CastConfig()
    cast_config_weight_for_grad_input: CastConfig | None = None
    cast_config_grad_output: CastConfig = GRADIENT
    cast_config_grad_output_for_grad_weight: CastConfig | None = None
    enable_fsdp_float8_all_gather: bool = False
    round_scales_to_power_of_2: bool = False


def roles(peer: object) -> list[tuple[str, str, str] | None]:
    return [None if r is None else (r.fmt, r.scaling, r.block) for r in get_recipe(peer).roles()]


def test_delayed_scaling() -> None:
    recipe = get_recipe(DelayedScaling(margin=2, amax_history_len=16, amax_compute_algo="most_recent"))
    assert (recipe.window, recipe.margin, recipe.algorithm) == (16, 2, "most_recent")
    delayed = "delayed", "tensor"
    assert roles(DelayedScaling()) == [("e4m3", *delayed), ("e4m3", *delayed), ("e5m2", *delayed)]
    assert roles(DelayedScaling(fp8_format=Format.E4M3))[2] == ("e4m3", *delayed)


def test_an_interval_is_read_where_there_is_one() -> None:
    assert get_recipe(DelayedScaling()).interval == 1
    for given, meant in ((-1, 1), (1, 1), (10, 10)):
        peer = DelayedScaling()
        peer.interval = given  # type: ignore[attr-defined]
        assert get_recipe(peer).interval == meant


def test_a_function_of_the_history_sees_it_as_transformer_engine_has_it() -> None:
    def newest_twice(history: Tensor) -> Tensor:  # [window, tensors]
        assert history.shape[0] == 4
        return history[0] * 2

    net = convert(nn.Linear(8, 8), DelayedScaling(amax_history_len=4, amax_compute_algo=newest_twice), verbose=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(4, 8)
    net(x).sum().backward()
    optimizer.step()
    layer = layers(net)[0]
    assert layer.fp8_scale[0] == x.abs().max() * 2 / layer.fp8_recipe.target(0)


def test_a_function_sees_the_slots_in_transformer_engines_order() -> None:
    """Its slot 0 is written, then rolled to the end: behind the newest amax come the older ones, the oldest first."""
    seen: list[list[float]] = []

    def noting(history: Tensor) -> Tensor:
        seen.append(history[:, 0].tolist())
        return history[0]

    algorithm = get_recipe(DelayedScaling(amax_history_len=4, amax_compute_algo=noting)).algorithm
    assert callable(algorithm)
    theirs, ours = torch.zeros(4, 1), torch.zeros(1, 4)
    for amax in range(1, 8):
        theirs[0] = amax
        ours = torch.cat([torch.tensor([[float(amax)]]), ours[:, :-1]], dim=1)
        algorithm(ours)
        assert seen[-1] == theirs[:, 0].tolist()
        theirs = theirs.roll(-1, 0)
        theirs[0] = 0


def test_current_and_block_scaling() -> None:
    current = "current", "tensor"
    assert roles(Float8CurrentScaling()) == [("e4m3", *current), ("e4m3", *current), ("e5m2", *current)]
    assert get_recipe(Float8CurrentScaling(use_power_2_scales=True)).power_of_two
    assert roles(Float8CurrentScaling(backward_override="dequantized"))[2] is None
    assert roles(Float8BlockScaling()) == [
        ("e4m3", "current", "1x128"), ("e4m3", "current", "128x128"), ("e4m3", "current", "1x128")
    ]  # fmt: skip
    assert get_recipe(Float8BlockScaling()).power_of_two
    assert not get_recipe(Float8BlockScaling(fp8_quant_fwd_inp=QParams(power_2_scale=False))).power_of_two


def test_float8_linear_config() -> None:
    current = "current", "tensor"
    assert roles(Float8LinearConfig()) == [("e4m3", *current), ("e4m3", *current), ("e5m2", *current)]
    rows = Float8LinearConfig(ROWS, None, ROWS, None, ROWS, round_scales_to_power_of_2=True)
    assert roles(rows) == [("e4m3", "current", "row")] * 3
    assert get_recipe(rows).power_of_two
    assert roles(Float8LinearConfig(cast_config_grad_output=OFF))[2] is None


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        (DelayedScaling(fp8_dpa=True), "fp8_dpa"),
        (DelayedScaling(reduce_amax=False), "reduce_amax"),
        (Float8CurrentScaling(fp8_dpa=True), "fp8_dpa"),
        (Float8CurrentScaling(backward_override="high_precision"), "high_precision"),
        (Float8LinearConfig(cast_config_input_for_grad_weight=OFF), "cast_config_input_for_grad_weight"),
        (Float8LinearConfig(enable_fsdp_float8_all_gather=True), "all_gather_codes"),
    ],
)
def test_what_is_not_carried_over_is_named(peer: object, says: str) -> None:
    with pytest.warns(PeerWarning, match=says):
        get_recipe(peer)


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        (DelayedScaling(scaling_factor_compute_algo=torch.reciprocal), "scaling_factor_compute_algo"),
        (DelayedScaling(fp8_format=Format.E5M2), "E5M2"),
        (DelayedScaling(amax_compute_algo="median"), "median"),
        (Float8BlockScaling(x_block_scaling_dim=2), "blocks"),
        (MXFP8BlockScaling(), "MXFP8BlockScaling"),
        (Float8LinearConfig(cast_config_input=OFF), "high precision"),
        (object(), "this is <object"),
        (None, "this is None"),
    ],
)
def test_what_has_no_counterpart_is_refused(peer: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        get_recipe(peer)
