"""One run from its configuration to its folder: check everything, train, keep what can be kept."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from ...runs import Run
from . import checkpoints
from .baseline import check_resume, read_baseline
from .config import Config, read_config

CHECKPOINTS, MODEL, TENSORBOARD = "checkpoints", "model", "tensorboard"


def train(config: Config | dict[str, Any] | Path | str, out: Path | str, *, resume: bool = False) -> Run:
    """Train a causal language model and leave a run's folder.

    config   a Config, a dictionary with its keys, or a YAML file
    out      the folder; it must not hold a run, unless resumed
    resume   go on from the newest whole checkpoint of the folder, with the same settings, to the same bits
    returns  the run. Its info says "done", or "stopped" and why: a detector, a number that is not finite, Ctrl-C
    raises   FileNotFoundError, FileExistsError, ImportError or ValueError before anything is written, for settings,
             data or a folder that will not do; CheckpointError (an OSError) if a checkpoint could not be written, the
             earlier ones being whole
    """
    try:
        import accelerate  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"training needs {error.name}: pip install 'fp8kernels[train]'") from error
    from .prepare import prepare
    from .ranks import rank, wait, world
    from .steps import take_steps

    config, out = read_config(config), Path(out)
    found = _found(out, resume=resume)
    folder = out / CHECKPOINTS
    prepared = prepare(config, checkpoints.staging(folder))
    settings, data = config.as_dict(), prepared.reports()
    baseline = read_baseline(config.baseline, settings, data, world()) if config.baseline else None
    start = None
    if found is not None:
        check_resume(found, settings, data, world())
        start = newest(folder)
    wait()  # all processes have looked before the first one writes
    run: Run | None = None
    if rank() == 0:
        fields = {
            "name": config.name or out.name,
            "config": settings,
            "recipe": repr(prepared.recipe) if prepared.recipe else None,
            "baseline": str(config.baseline) if config.baseline else None,
            "data": data,
            "versions": versions(),
            "processes": world(),
            "device": str(prepared.arguments.device),
            "parameters": prepared.parameters(),
            "layers": prepared.layers,
            "steps": config.steps,
        }
        run = _begin(found, out, start, fields)
        checkpoints.begin(folder)
    wait()
    return take_steps(prepared, out, run, start=start, baseline=baseline)


def _found(out: Path, *, resume: bool) -> Run | None:
    """The run to go on with, if one is to be resumed; before minutes of loading."""
    if not resume:
        Run.refuse_used(out)
        return None
    run = Run.open(out)
    if run.info.get("status") == "done":
        raise ValueError(f"{out} is done, with all its {run.info.get('steps')} steps; begin another run elsewhere")
    return run


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; None if there is none, and the run begins again.

    raises   CheckpointError if there are checkpoints and not one of them is whole
    """
    whole = checkpoints.whole(folder)
    broken = checkpoints.broken(folder)
    if not whole and broken:
        path, reason = next(iter(broken.items()))
        raise checkpoints.CheckpointError(f"no checkpoint in {folder} is whole; {path.name}: {reason}")
    return whole[-1] if whole else None


def _begin(found: Run | None, out: Path, start: Path | None, fields: dict[str, Any]) -> Run:
    if found is None:
        return Run.create(out, **fields)
    step = checkpoints.step_of(start) if start else 0
    found.cut(step if start else -1)
    found.update(**fields, status="running", reason=None)
    what = f"resumed from {CHECKPOINTS}/{start.name}" if start else "begun again: there was no checkpoint"
    found.append("events", {"step": step, "kind": "resume", "text": what, "time": _now()})
    return found


def versions() -> dict[str, str]:
    """Of what the numbers of a run depend on."""
    import accelerate
    import torch
    import transformers

    return {
        "fp8kernels": importlib.metadata.version("fp8kernels"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "python": platform.python_version(),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
