"""The steps of a prepared run, and how it ends: done, stopped, interrupted or broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ...integrations.transformers import TelemetryCallback
from ...nn.prepared import go_on
from ...nn.step import layers
from ...runs import Run
from ...runs.precision import EIGHT_BIT, load_eight_bit
from . import checkpoints
from .config import Config
from .ending import Ending
from .finish import save_trained
from .keep import Keeper
from .nonfinite import NonFiniteError
from .prepare import Prepared
from .progress import ProgressLine, no_bars
from .ranks import rank, wait
from .record import Recorder
from .tensorboard import tensorboard
from .trainer import LanguageTrainer
from .watch import Probe, Saturation

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
    saturation = Saturation(run, prepared.watch, ending)
    keeper = Keeper(run, folder, recorder, saturation, keep=config.keep, adapters=config.lora is not None)
    progress = ProgressLine(recorder, every=config.log_every)
    before: list[TrainerCallback] = [recorder, saturation, ending]  # the probe's numbers belong to the recorder's row
    if config.probe:
        before.insert(0, Probe(run or Run(out, {}), config.probe, prepared.items, prepared.tokenizer, ending))
    step = checkpoints.step_of(start) if start else 0
    after: list[TrainerCallback] = [Last(config, validates=prepared.data.validation is not None), keeper, progress]
    if rank() == 0:
        after.append(tensorboard(out / TENSORBOARD, step, every=config.log_every))
    if start is not None:
        before.append(GoOn())
        saturation.load(checkpoints.read_state(start).get("saturation", {}))
        if (start / EIGHT_BIT).is_file():
            load_eight_bit(prepared.model, start / EIGHT_BIT)
    handler: Any = trainer.callback_handler
    if prepared.layers:
        TelemetryCallback.add_to(trainer)
    handler.callbacks[1 if prepared.layers else 0 : 0] = before
    for callback in after:
        trainer.add_callback(callback)
    status, reason, kind = "done", None, "good"
    try:
        with ending.signals(), no_bars():
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    except NonFiniteError as error:
        status, reason, kind = "stopped", str(error), "finite"  # the loss may have gone wrong before it went to NaN
        _event(run, error.step, "nan", reason)
    except BaseException as error:
        recorder.flush()
        _broken(run, error, folder)
        raise
    finally:
        progress.close()
        saturation.close()
    recorder.flush()
    if ending.reason is not None:
        status, reason = "stopped", ending.reason
    elif ending.interrupted:
        status, reason = "stopped", f"interrupted at step {trainer.state.global_step}"
    if status == "stopped":
        reason = f"{reason}. {way_on(folder, ending.good_until, kind)}"
    else:
        try:
            with no_bars():
                save_trained(
                    trainer, prepared.tokenizer, out / MODEL, recipe_entry(config), use_cache=prepared.use_cache
                )
        except Exception as error:  # each library that writes has errors of its own
            failed = checkpoints.CheckpointError(f"the trained model could not be written: {error}")
            _broken(run, failed, folder)
            raise failed from error
    wait()
    if run is None:
        return Run.open(out)
    checkpoints.end(folder)
    run.finish(status, reason)
    return run


class GoOn(TrainerCallback):
    """A checkpoint was taken behind a commit, and the model stands there again."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        """The checkpoint is in the model by now."""
        go_on(layers(model))


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


def way_on(folder: Path, good_until: int | None = None, kind: str = "good") -> str:
    """What is there to go on from, in words.

    kind         what is known of every checkpoint
    good_until   the last step at which all was well; None: every checkpoint is good
    """
    whole = checkpoints.whole(folder)
    good = [path for path in whole if good_until is None or checkpoints.step_of(path) <= good_until]
    if not good:
        return "There is no good checkpoint; begin again, with save_every set lower"
    later = f" (remove the {len(whole) - len(good)} later ones first)" if len(whole) > len(good) else ""
    return f"The last {kind} checkpoint is {good[-1]}; go on from it with --resume{later}"


def _event(run: Run | None, step: int, kind: str, text: str) -> None:
    if run is not None:
        run.append("events", {"step": step, "kind": kind, "text": text})


def _broken(run: Run | None, error: BaseException, folder: Path) -> None:
    """Note what broke a run; a full disk may refuse that, too, and must not hide the first error."""
    if run is None:
        return
    what = str(error) or type(error).__name__
    checkpoints.end(folder)  # what is half written takes room
    try:
        run.finish("stopped", f"{what}. {way_on(folder)}")
    except OSError:
        return
