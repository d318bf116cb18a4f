"""Forgetting: a model that trains on one thing answers fewer questions about another, and its loss does not show it.

Each look compares the answers of now with those at the start, item by item, in two ways that both must agree:

    exact test   McNemar's p of the two lists of answers           <= a_k
    interval     lower end of the drop's interval at level 1 - a_k >  drop

a_k is what a run's k-th look may spend of 1 - level. With a number of looks that is planned, each gets its equal part
(Bonferroni); without, the k-th gets (1 - level) / (k (k + 1)), which sums to 1 - level however many there are.

False alarms: where answers only change by chance, as often to right as to wrong, McNemar's test is exact, so that the
chance of an alarm in a whole run is at most (1 - level) / 2 (half, as only drops alarm), however the looks depend on
each other. Where there is a true drop of up to `drop`, the interval, which goes by the same a_k, holds the alarm back.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from ..statistics import Paired, mcnemar, paired
from .score import Scores

LOG = logging.getLogger("fp8kernels")
POLICIES = ("warn", "stop", "fallback", "ignore")
REPEATS = 10_000  # bootstrap draws at the least
IN_THE_TAIL = 50  # draws that should lie beyond the two ends of an alarm's interval
MOST_REPEATS = 200_000  # a tenth of a second; beyond it the interval's end is nearly the smallest of the draws


class ForgettingWarning(UserWarning):
    """The model has forgotten what it knew when training began."""


class ForgettingError(RuntimeError):
    """The same, with policy "stop"."""


class Look(NamedTuple):
    """One comparison with the start.

    step        optimizer steps done
    comparison  statistics.Paired at the detector's level: the start is `first`, now is `second`
    alarm_low   lower end of the drop's interval at the level of an alarm, 1 - a_k
    spends      a_k
    forgets     whether that is an alarm
    text        a sentence with the numbers
    """

    step: int
    comparison: Paired
    alarm_low: float
    spends: float
    forgets: bool
    text: str


class Forgetting:
    """Compares scores with those at the start and acts when the model forgets.

    policy    "warn": ForgettingWarning at the first alarm of a run, "stop": ForgettingError at every one, "fallback":
              warn, and call `fallback` at the first, "ignore": say nothing; `look` tells either way
    drop      of accuracy, a fraction; what must be exceeded for sure
    level     confidence, for a whole run
    looks     how many are planned; more than those are each judged like the last. None if unknown
    fallback  takes the 8-bit layers to high precision: `lambda: fp8kernels.nn.hold.hold_high(model)`
    raises    ValueError for a policy that there is not, "fallback" without a function, or numbers out of range
    """

    def __init__(
        self,
        policy: str = "warn",
        *,
        drop: float = 0.02,
        level: float = 0.95,
        looks: int | None = None,
        fallback: Callable[[], object] | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"forgetting policy {policy!r} is none of {POLICIES}")
        if policy == "fallback" and fallback is None:
            raise ValueError("policy 'fallback' needs fallback=, a function that takes the layers to high precision")
        if not 0 <= drop < 1 or not 0 < level < 1 or (looks is not None and looks < 1):
            raise ValueError(f"drop={drop} must be in [0, 1), level={level} in (0, 1) and looks={looks} at least 1")
        self.policy, self.drop, self.level, self.looks, self.fallback = policy, drop, level, looks, fallback
        self.start: list[bool] | None = None
        self.looked = 0
        self.since: int | None = None  # the step of the first alarm

    def begin(self, scores: Scores) -> None:
        """Take the scores of the model as it is before training.

        raises   ValueError if there is a start already: comparing with anything later would hide what was lost since
        """
        if self.start is not None:
            raise ValueError("the starting scores are set; they are never replaced during a run")
        self.start = list(scores.correct)
        if scores.accuracy <= self.drop:
            warnings.warn(
                f"the model answers {sum(self.start)} of {len(self.start)} probe items when training begins; it cannot "
                f"forget more than {self.drop:.2%} of them, so forgetting will not be seen. Ask what it knows",
                ForgettingWarning,
                stacklevel=2,
            )

    def look(self, step: int, scores: Scores) -> Look:
        """Compare, and act by the policy.

        raises   ForgettingError with policy "stop"; ValueError before `begin`, or if the items are others
        """
        look = self.compare(step, scores)
        self.act(look)
        return look

    def act(self, look: Look) -> None:
        """Take a comparison as a look of the run, and do what the policy says.

        raises   ForgettingError with policy "stop"
        """
        self.looked += 1
        if not look.forgets:
            return
        if self.policy == "stop":
            raise ForgettingError(look.text)
        if self.since is None:
            self.since = look.step
            self._tell(look.text)

    def compare(self, step: int, scores: Scores) -> Look:
        """What the next look says; nothing is spent and nothing done.

        raises   ValueError before `begin`, or if the items are others
        """
        if self.start is None:
            raise ValueError("there are no starting scores to compare with; give them to `begin` before training")
        spends = self.spends(self.looked + 1)
        comparison = paired(self.start, scores.correct, level=self.level)
        repeats = min(MOST_REPEATS, max(REPEATS, math.ceil(IN_THE_TAIL / spends)))
        low = paired(self.start, scores.correct, level=1 - spends, repeats=repeats).low
        p = mcnemar(self.start, scores.correct).p_value
        forgets = low > self.drop and p <= spends
        return Look(step, comparison, low, spends, forgets, self._text(step, comparison, low, spends, forgets=forgets))

    def spends(self, number: int) -> float:
        """The part of 1 - level that the look of that number, from 1, may spend."""
        return (1 - self.level) / (number * (number + 1) if self.looks is None else self.looks)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, as JSON holds it."""
        return {"start": self.start, "looked": self.looked, "since": self.since}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`; where the run had fallen back, it does again.

        raises   ValueError if the state is not one
        """
        if set(state) != {"start", "looked", "since"}:
            raise ValueError(
                f"a state of the forgetting detector has start, looked and since, this one {sorted(state)}"
            )
        self.start = None if state["start"] is None else [bool(value) for value in state["start"]]
        self.looked, self.since = state["looked"], state["since"]
        if self.since is not None and self.policy == "fallback" and self.fallback is not None:
            self.fallback()

    def _tell(self, text: str) -> None:
        if self.policy == "fallback" and self.fallback is not None:
            self.fallback()
            text += ". All 8-bit layers compute in high precision from now on"
        LOG.info(text)
        if self.policy != "ignore":
            warnings.warn(text, ForgettingWarning, stacklevel=4)

    def _text(self, step: int, found: Paired, low: float, spends: float, *, forgets: bool) -> str:
        what = "the model forgets" if forgets else "no forgetting shown"
        return (
            f"step {step}: {what}: {found.second:.2%} of {found.items} probe items right, {found.first:.2%} when "
            f"training began; drop {found.drop:.2%} ({found.low:.2%} to {found.high:.2%} with {found.level:.4g} "
            f"confidence, at least {low:.2%} with {1 - spends:.6g}; alarm above {self.drop:.2%}), "
            f"{found.only_first} lost and {found.only_second} gained, p = {found.p_value:.3g}"
        )
