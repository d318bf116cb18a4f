"""SaturationWatch: looks at the tensors themselves, every so many steps, for what the counters do not show.

The counters that always run (alarm.py) know of elements beyond the largest value of a format. HiF8 has 11 binades of
head-room above its target, and loses mantissa bits in them: a tensor that is 4 times its history has 1.7 times the
error, and nothing saturates. What is seen here is the tensor in high precision, against the scale it is rounded with.

    commit of the step before   ->  observers are there (nn/observe.py)
    forward, backward           ->  sums over input, weight and output gradient of each layer, on their device
    commit                      ->  the sums are read, the policy acts, the observers go
"""

from __future__ import annotations

import math
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import state
from ..nn.fallback import allow_fallback, ask_for_fallback, asked
from ..nn.observe import observers
from ..nn.state import ScaledLayer
from ..nn.step import after_commit, layers
from .alarm import SaturationError, SaturationWarning
from .meter import steps_of
from .precision import limits
from .tensors import TensorReading, measure, merge, reading

POLICIES = ("warn", "stop", "fallback", "ignore")
SAMPLE = 1 << 18  # elements of a tensor that are looked at; a fraction of 1% is then known to a fiftieth of it
NAMED = 8  # tensors that one message names, the worst first
HUGE = 64.0  # times: what overshoots by more is an accident, for which no head-room is advised


BLIND = (
    "step {step}: SaturationWatch saw no tensor. What torch.compile or a CUDA graph has captured cannot be looked at: "
    "run the model uncompiled, or rely on the counters (recipe.Alarm, log_to), which go on"
)


class SaturationStop(SaturationError):
    """A tensor has outgrown its scale, and the watch's policy is "stop"; the optimizer step was completed."""


@dataclass(frozen=True)
class Measurement:
    """What was seen in one optimizer step.

    step      of the model (its fp8_step), after it
    readings  one for each tensor that was seen
    findings  what is newly wrong, one line for each tensor that is over a limit for long enough, the worst first
    stop      why training is to stop, or None
    """

    step: int
    readings: list[TensorReading]
    findings: list[str]
    stop: str | None = None

    def rows(self) -> list[dict[str, Any]]:
        """As lines of a run's layers.jsonl."""
        return [r.row(self.step) for r in self.readings]


class SaturationWatch:
    """Measures a model's layers in every so many optimizer steps, and acts where a tensor has outgrown its scale.

        watch = fp8kernels.SaturationWatch(model)     # before the loop
        watch.remove()                                # after it

    every        optimizer steps from one measurement to the next, counted as the model counts them
    policy       "warn": a SaturationWarning, once until the tensor has recovered. "stop": a SaturationStop from the
                 optimizer's step, which is complete by then. "fallback": the layer computes in high precision; it
                 returns by the rules of recipe.Alarm, which gets the policy "fallback" too. "ignore": only readings
    stale        the amax / (scale * target) above which a tensor counts; None takes that at which its format loses 3 dB
                 of a normal tensor (precision.limits: HiF8 2.7, E4M3 1.8)
    past_target  or the fraction of elements beyond scale * target; None by the same derivation (HiF8 7%, E4M3 0.5%)
    steps        measurements in a row that a tensor has to be over one of them
    sample       elements of a tensor that are looked at (tensors.measure); amax is always that of all
    raising      False with "stop": `take` says it, and nothing is raised; for trainers that stop by themselves
    raises       ValueError if the model has no 8-bit layers, or for arguments out of range

    Training is not changed by a bit. All micro-batches of a measured step are looked at, in training mode only, each
    rank its own. What torch.compile or a CUDA graph has captured cannot be looked at, which is warned of where nothing
    else is. A step that is measured takes longer: a few passes over every tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 100,
        policy: str = "warn",
        stale: float | None = None,
        past_target: float | None = None,
        steps: int = 1,
        sample: int = SAMPLE,
        raising: bool = True,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"SaturationWatch: policy={policy!r} is none of {', '.join(map(repr, POLICIES))}")
        if every < 1 or steps < 1 or sample < 1:
            raise ValueError(f"SaturationWatch: every={every}, steps={steps} and sample={sample} must be at least 1")
        if (stale is not None and not stale > 0) or (past_target is not None and not 0 <= past_target <= 1):
            raise ValueError(
                f"SaturationWatch: stale={stale} must be above 0, and past_target={past_target} a fraction in [0, 1]"
            )
        found = layers(model)
        if not found:
            raise ValueError("SaturationWatch: the model has no 8-bit layers; call fp8kernels.convert(model) first")
        if policy == "fallback":
            allow_fallback(found)
        self.every, self.policy, self.stale, self.past_target = every, policy, stale, past_target
        self.steps, self.sample, self.raising = steps, sample, raising
        self._model = weakref.ref(model)
        self._mine = weakref.WeakSet(found)
        self._kept: list[Measurement] = []
        self._in_a_row: dict[str, int] = {}  # by "layer role": measurements over a limit
        self._told: set[str] = set()
        self._sums: dict[tuple[int, int], list[Tensor]] = {}  # by place in `layers(model)` and role
        self._places: dict[int, int] = {}  # by the identity of a layer's kept codes, which its stand-ins share
        self._rounds: list[bool] = []
        self._blind = False  # whether it was said that nothing can be looked at
        self._step, self._generation = 0, -1
        after_commit.append(self._after_commit)
        weakref.finalize(model, self.remove).atexit = False
        self.begin_step()

    @property
    def measuring(self) -> bool:
        """Whether the step that goes on is measured."""
        return self._observe in observers

    def begin_step(self) -> None:
        """A step begins: called after each commit, and by you after a checkpoint was loaded into the model."""
        model = self._model()
        if model is None:
            return
        if self._generation != state.generation:
            self._step, self._generation = steps_of(model), state.generation
        self._drop()
        if (self._step + 1) % self.every == 0:
            found = layers(model)
            self._places = {id(layer.fp8_kept): place for place, layer in enumerate(found)}
            self._rounds = [layer.fp8_on for layer in found]  # a commit may change it
            observers.append(self._observe)

    def take(self) -> list[Measurement]:
        """The measurements since this was last asked."""
        kept, self._kept = self._kept, []
        return kept

    def remove(self) -> None:
        """Measure nothing any more."""
        self._drop()
        if self._after_commit in after_commit:
            after_commit.remove(self._after_commit)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from, as JSON holds it; the layers' precision is in the model's own state."""
        model = self._model()
        waiting = {} if model is None else asked(layers(model))  # to fall back at the next commit
        return {"in_a_row": dict(self._in_a_row), "told": sorted(self._told), "asked": waiting}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there; after the model's checkpoint was loaded."""
        self._in_a_row, self._told = dict(saved["in_a_row"]), set(saved["told"])
        waiting, model = saved.get("asked", {}), self._model()
        for layer in layers(model) if waiting and model is not None else ():
            if layer.fp8_name in waiting:
                ask_for_fallback(layer, waiting[layer.fp8_name])
        self.begin_step()

    def _drop(self) -> None:
        if self.measuring:
            observers.remove(self._observe)
        self._sums = {}

    def _observe(self, layer: ScaledLayer, index: int, x: Tensor) -> None:
        place = self._places.get(id(layer.fp8_kept))
        sums = None if place is None else measure(layer, index, x, self.sample)
        if place is not None and sums is not None:
            self._sums.setdefault((place, index), []).append(sums)

    def _after_commit(self, found: list[ScaledLayer]) -> None:
        model = self._model()
        if model is None or not self._has(model, found[0]):
            return
        self._step += 1
        stop = None
        if self.measuring:
            stop = self._finish(model)
        self.begin_step()
        if stop is not None and self.raising:
            raise SaturationStop(stop)

    def _has(self, model: nn.Module, layer: ScaledLayer) -> bool:
        """Whether a layer is the model's; its layers may be others than at first."""
        if layer not in self._mine:
            self._mine = weakref.WeakSet(layers(model))
        return layer in self._mine

    def _finish(self, model: nn.Module) -> str | None:
        """Read what was summed, keep it, act; returns why to stop."""
        found, expected, self._step = layers(model), self._step, steps_of(model)
        sums, self._sums = self._sums, {}
        if not sums and self._step == expected and not self._blind:  # the layers saw something, and this did not
            self._blind = True
            warnings.warn(BLIND.format(step=expected), SaturationWarning, stacklevel=2)
        read: list[tuple[ScaledLayer, TensorReading]] = []
        if sums:
            keys = sorted(sums)
            device = sums[keys[0]][0].device
            numbers = torch.stack([merge(sums[key]).to(device) for key in keys]).tolist()
            read = [
                (found[place], reading(found[place], index, row, high=not self._rounds[place]))
                for (place, index), row in zip(keys, numbers, strict=True)
            ]
        ripe = [(layer, r) for layer, r in read if self._over(layer, r)]
        ripe.sort(key=lambda pair: -pair[1].stale)
        new = [r for _, r in ripe if _key(r) not in self._told]
        self._told.update(map(_key, new))
        stop = None
        if self.policy == "stop" and self._anywhere(model, here=bool(ripe)):
            here = [r for _, r in ripe]
            stop = _several(self._step, here) if here else f"step {self._step}: another rank has tensors to stop for"
        self._kept.append(Measurement(self._step, [r for _, r in read], [finding(r) for r in new], stop))
        if self.policy == "fallback":
            for layer, r in ripe:
                ask_for_fallback(layer, finding(r))
        if self.policy == "warn" and new:
            warnings.warn(_several(self._step, new), SaturationWarning, stacklevel=2)
        return stop

    def _over(self, layer: ScaledLayer, r: TensorReading) -> bool:
        """Whether a tensor was over a limit in enough measurements; one that was not rounded only keeps a layer that
        has fallen back where it is."""
        key, limit = _key(r), limits(r.fmt, r.target)
        if r.high and not (self.policy == "fallback" and layer.fp8_high):
            return False
        over = r.stale > (limit.stale if self.stale is None else self.stale)
        over |= r.past_target > (limit.past_target if self.past_target is None else self.past_target)
        if not over:
            self._in_a_row.pop(key, None)
            self._told.discard(key)
            return False
        self._in_a_row[key] = self._in_a_row.get(key, 0) + 1
        return self._in_a_row[key] >= self.steps

    def _anywhere(self, model: nn.Module, *, here: bool) -> bool:
        """Whether some rank has something to stop for: all stop, or none."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return here
        flag = torch.tensor(float(here), device=layers(model)[0].fp8_scale.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag)


def _key(r: TensorReading) -> str:
    return f"{r.layer} {r.role}"


def finding(r: TensorReading) -> str:
    """What is wrong with a tensor, in one line."""
    noise = "" if r.sqnr_db is None else f", SQNR {r.sqnr_db:.1f} dB"
    return (
        f"{r.layer}: {r.role} has outgrown its scale: amax {r.amax:.4g} is {r.stale:.3g} times scale {r.scale:.4g} "
        f"* target {r.target:g} ({r.fmt}); {r.past_target:.2%} of its elements lie past the target and lose "
        f"{r.bits_lost:.2f} mantissa bits on average, {r.past_maximum:.2%} saturate{noise}"
    )


def _several(step: int, found: list[TensorReading]) -> str:
    """What is wrong in a step, the worst first, and what to do about it."""
    lines = [finding(r) for r in found[:NAMED]]
    lines += [f"and {len(found) - NAMED} more"] if len(found) > NAMED else []
    margin = math.ceil(math.log2(max(r.stale for r in found))) if all(1 < r.stale < HUGE for r in found) else 0
    room = f"give the recipe head-room (margin={margin}), " if margin > 0 else ""
    return (
        f"step {step}: {len(found)} tensors have outgrown their scales.\n" + "\n".join(lines) + "\nIf they go on so: "
        f"{room}take algorithm='max', warm up longer or lower the learning rate, leave the layers out (an override of "
        f"the recipe), or let them fall back (policy='fallback')"
    )
