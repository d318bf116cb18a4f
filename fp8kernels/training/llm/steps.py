"""The steps of a prepared run, and how it ends: done, stopped, interrupted or broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ...integrations.transformers import TelemetryCallback
from ...runs import Run
from ...runs.precision import EIGHT_BIT, load_eight_bit
from . import checkpoints
from .config import Config
from .ending import Ending
from .finish import save_trained
from .keep import Keeper
from .nonfinite import NonFiniteError
from .prepare import Prepared
from .progress import ProgressLine
from .ranks import rank, wait
from .record import Recorder
from .tensorboard import tensorboard
from .trainer import LanguageTrainer
from .watch import Watch

CHECKPOINTS, MODEL, TENSORBOARD = "checkpoints", "model", "tensorboard"


def take_steps(
    prepared: Prepared, out: Path, run: Run | None, *, start: Path | None, baseline: dict[int, float] | None
) -> Run:
    """Train to the end or until something stops it, and say in run.json which it was.

    run     None on all processes but the first
    start   the checkpoint to go on from
    raises  CheckpointError; what else breaks a run is noted in run.json and raised as it is
    """
    config, folder = prepared.config, out / CHECKPOINTS
    trainer = LanguageTrainer(
        model=prepared.model,
        arguments=prepared.arguments,
        train=prepared.train,
        validation=prepared.data.validation,
        tokenizer=prepared.tokenizer,
    )
    recorder, ending = Recorder(run, baseline, trainer.tokens), Ending()
    watch = Watch(run, config, prepared.model, prepared.tokenizer, ending)
    keeper = Keeper(run, folder, recorder, watch, keep=config.keep, adapters=config.lora is not None)
    progress = ProgressLine(recorder, watch, every=config.log_every)
    step = checkpoints.step_of(start) if start else 0
    after: list[TrainerCallback] = [Last(config, validates=prepared.data.validation is not None), keeper, progress]
    if rank() == 0:
        after.append(tensorboard(out / TENSORBOARD, step, every=config.log_every))
    handler: Any = trainer.callback_handler
    if prepared.layers:
        TelemetryCallback.add_to(trainer)
    handler.callbacks[1 if prepared.layers else 0 : 0] = [recorder, watch, ending]
    for callback in after:
        trainer.add_callback(callback)
    if start is not None:
        watch.load(checkpoints.read_state(start))
        if (start / EIGHT_BIT).is_file():
            load_eight_bit(prepared.model, start / EIGHT_BIT)
    status, reason = "done", None
    try:
        with ending.signals():
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    except NonFiniteError as error:
        status, reason = "stopped", str(error)
        _event(run, error.step, "nan", reason)
    except BaseException as error:
        recorder.flush()
        _broken(run, error, folder)
        raise
    finally:
        progress.close()
        watch.close()
    recorder.flush()
    if ending.reason is not None:
        status, reason = "stopped", ending.reason
    elif ending.interrupted:
        status, reason = "stopped", f"interrupted at step {trainer.state.global_step}"
    if status == "stopped":
        reason = f"{reason}. {way_on(folder)}"
    else:
        save_trained(trainer, prepared.tokenizer, out / MODEL, recipe_entry(config))
    wait()
    if run is None:
        return Run.open(out)
    run.finish(status, reason)
    return run


class Last(TrainerCallback):
    """The last step has a validation loss, whatever the interval."""

    def __init__(self, config: Config, *, validates: bool) -> None:
        self.steps, self.validates = config.steps, validates

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> Any:
        """Ask for it."""
        if self.validates and state.global_step >= self.steps:
            control.should_evaluate = True
        return control


def recipe_entry(config: Config) -> dict[str, Any]:
    """What `recipe_of` makes the recipe of again."""
    return {"recipe": config.recipe, "recipe_changes": config.recipe_changes}


def way_on(folder: Path) -> str:
    """What is there to go on from, in words."""
    whole = checkpoints.whole(folder)
    if not whole:
        return "There is no checkpoint yet; begin again with save_every set lower"
    return f"The last good checkpoint is {whole[-1]}; go on from it with --resume"


def _event(run: Run | None, step: int, kind: str, text: str) -> None:
    if run is not None:
        run.append("events", {"step": step, "kind": kind, "text": text})


def _broken(run: Run | None, error: BaseException, folder: Path) -> None:
    """Note what broke a run; a full disk may refuse that, too, and must not hide the first error."""
    if run is None:
        return
    what = str(error) or type(error).__name__
    try:
        run.finish("stopped", f"{what}. {way_on(folder)}")
    except OSError:
        return
