"""Hugging Face's Trainer: a knowledge probe every N steps, and what happens when the model forgets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..nn.hold import hold_high
from ..nn.roots import layers
from ..probe.forgetting import Forgetting, ForgettingError, Look
from ..probe.items import Item, digest
from ..probe.score import Scores, score
from ..runs import Run

__all__ = ["ForgettingError", "ProbeCallback"]


class ProbeCallback(TrainerCallback):
    """Asks the model before the first step, every `every` steps and after the last one, and compares with the start.

        ProbeCallback.add_to(trainer, items, tokenizer, every=100)

    The rows of training logs get "probe/accuracy", "probe/drop", "probe/drop_low" and "probe/forgets" of the newest
    look. Each look is a row of `probe.jsonl` in the run's folder, or in the trainer's output_dir. The first row, of
    step 0, is the start: a run that resumes reads it from there, so that what was lost before still counts as lost.

    items      what is asked; tokenizer: the model's
    every      optimizer steps
    policy     "warn", "stop" (ForgettingError out of trainer.train()), "fallback" (all 8-bit layers compute in high
               precision for good, also after a resume), "ignore"; drop, level: see probe.Forgetting
    batch      sequences at once; autocast: see probe.score. Under the Trainer the model's own autocast applies
    run        runs.Run whose probe and events rows are written
    raises     ValueError if every < 1; when training begins, if an item does not fit the model, "fallback" is asked of
               a model without 8-bit layers, or a resumed run's starting scores are missing or of other items
    """

    def __init__(
        self,
        items: Sequence[Item],
        tokenizer: Any,
        *,
        every: int = 100,
        policy: str = "warn",
        drop: float = 0.02,
        level: float = 0.95,
        batch: int = 16,
        autocast: torch.dtype | None = None,
        run: Run | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be at least 1 step")
        self.items, self.tokenizer, self.every, self.batch, self.autocast = items, tokenizer, every, batch, autocast
        self.detector = Forgetting(policy, drop=drop, level=level, fallback=self._fall_back)
        self.given, self.run = run, run
        self.model: Any = None
        self.newest: dict[str, float] = {}
        self.asked = 0  # the step of the newest look

    @classmethod
    def add_to(cls, trainer: Any, items: Sequence[Item], tokenizer: Any, **settings: Any) -> ProbeCallback:
        """Put one in front of a trainer's other callbacks, so that TensorBoard and W&B see its numbers."""
        callback = cls(items, tokenizer, **settings)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """The starting scores: of this model, or of the run that this one goes on with."""
        self.model, self.newest, self.asked = model, {}, state.global_step
        self.run = self.given or Run(Path(args.output_dir), {})
        before, own = self.detector, self.given is None
        if before.policy == "fallback" and not layers(model):
            raise ValueError("policy 'fallback' needs a model with 8-bit layers; convert it, or take another policy")
        looks = -(-state.max_steps // self.every) if state.max_steps > 0 else None
        self.detector = Forgetting(
            before.policy, drop=before.drop, level=before.level, looks=looks, fallback=self._fall_back
        )
        writes = state.is_world_process_zero
        if own and writes:
            self.run.path.mkdir(parents=True, exist_ok=True)
            self.run.cut(state.global_step if state.global_step else -1)
        if state.global_step or (self.given is not None and self.given.rows("probe")):
            self._go_on(state.global_step)
            return
        scores = self._score()
        self.detector.begin(scores)
        self.newest = {"probe/accuracy": scores.accuracy}
        if writes:
            self.run.append("probe", _row(0, scores, None) | {"items": digest(self.items)})

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """A look, every N steps and at the last one."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._look(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        """Rows with a training loss get the newest look."""
        if logs is not None and "loss" in logs and self.newest:
            logs.update(self.newest)
            if state.log_history:
                state.log_history[-1].update(self.newest)

    def _look(self, state: Any) -> None:
        assert self.run is not None
        self.asked = state.global_step
        scores = self._score()
        look = self.detector.compare(state.global_step, scores)
        found = look.comparison
        self.newest = {
            "probe/accuracy": found.second,
            "probe/drop": found.drop,
            "probe/drop_low": found.low,
            "probe/forgets": float(look.forgets),
        }
        if state.is_world_process_zero:
            self.run.append("probe", _row(state.global_step, scores, look))
            if look.forgets and self.detector.since is None:
                self._tell(state.global_step, look)
        self.detector.act(look)

    def _tell(self, step: int, look: Look) -> None:
        assert self.run is not None
        self.run.append("events", {"step": step, "kind": "forgetting", "text": look.text})
        if self.detector.policy == "fallback":
            text = "all 8-bit layers compute in high precision from now on, because the model forgets"
            self.run.append("events", {"step": step, "kind": "fallback", "text": text})

    def _go_on(self, step: int) -> None:
        """The detector as it was at a step, from the rows up to there."""
        assert self.run is not None
        rows = [row for row in self.run.rows("probe") if row["step"] <= step]
        file = self.run.file("probe")
        if not rows or rows[0]["step"] != 0:
            raise ValueError(
                f"training goes on from step {step}, and {file} has no starting scores (a row of step 0). Put the "
                f"file of the run's beginning back, or begin anew: the model of now is no start to compare with"
            )
        if rows[0].get("items") != digest(self.items):
            raise ValueError(
                f"the starting scores in {file} are of other items than the {len(self.items)} that are to be asked "
                f"now; go on with the same items"
            )
        alarms = [row["step"] for row in rows if row.get("forgets")]
        start = [bool(answer) for answer in rows[0]["answers"]]
        self.asked = rows[-1]["step"]
        self.detector.load_state({"start": start, "looked": len(rows) - 1, "since": min(alarms, default=None)})

    def _score(self) -> Scores:
        own = score(self.model, self.tokenizer, self.items, batch=self.batch, autocast=self.autocast)
        return of_first_rank(own, next(self.model.parameters()).device)

    def _fall_back(self) -> None:
        assert self.model is not None
        hold_high(self.model)


def of_first_rank(own: Scores, device: torch.device) -> Scores:
    """The scores that all ranks go by: near a tie they may round differently, and must not act on it differently."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return own
    rows = torch.tensor([own.correct, own.margins, own.log_probabilities], dtype=torch.float64, device=device)
    distributed.broadcast(rows, 0)
    correct, margins, log_probabilities = rows.tolist()
    return Scores([bool(answer) for answer in correct], margins, log_probabilities)


def _row(step: int, scores: Scores, look: Look | None) -> dict[str, Any]:
    """A look as a row of probe.jsonl; without one the start."""
    row: dict[str, Any] = {
        "step": step,
        "answers": [int(correct) for correct in scores.correct],
        "margins": scores.margins,
        "accuracy": scores.accuracy,
    }
    if look is None:
        return row
    found = look.comparison
    numbers = {"drop": found.drop, "low": found.low, "high": found.high, "p_value": found.p_value}
    return row | numbers | {"alarm_low": look.alarm_low, "forgets": look.forgets, "level": found.level}
