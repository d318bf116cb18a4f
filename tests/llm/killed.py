"""python killed.py CONFIG FOLDER: for each place of `PLACES`, a process trains into FOLDER/<place> and is killed there.

The kill is SIGKILL: no handler and no `finally` runs. Each process is a fork of this one, which has only imported.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACES = ("model", "optimizer", "list", "rename", "rotation", "final")
STEP = 4  # the checkpoint whose writing is cut; the one before is of step 2


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in(place: str) -> None:
    """Have this process die in the middle of something."""
    import torch
    from transformers import PreTrainedModel

    from fp8kernels.training.llm import checkpoints, keep, steps

    def at_step(module: Any, name: str, act: Callable[..., None]) -> None:
        before = getattr(module, name)

        def instead(*args: Any, **kwargs: Any) -> Any:
            if any(f"checkpoint-{STEP}" in str(value) or value == STEP for value in (*args, *kwargs.values())):
                act(*args, **kwargs)
                kill()
            return before(*args, **kwargs)

        setattr(module, name, instead)

    def half_a_model(model: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "model.safetensors").write_bytes(b"\0" * 1000)

    if place == "model":
        at_step(PreTrainedModel, "save_pretrained", half_a_model)
    elif place == "optimizer":
        at_step(torch, "save", lambda value, path, *args, **kwargs: Path(path).write_bytes(b"PK\3\4 half"))
    elif place == "list":  # everything is written but the list of files
        at_step(checkpoints, "seal", lambda *args: None)
    elif place == "rename":  # the list is there, the folder has not its name
        at_step(checkpoints, "flush_folder", lambda *args: None)
        rename = Path.rename
        Path.rename = lambda self, to: kill() if Path(to).name == f"checkpoint-{STEP}" else rename(self, to)  # type: ignore[assignment,return-value]
    elif place == "rotation":  # an old checkpoint is half removed
        remove = shutil.rmtree

        def half(path: Any, *args: Any, **kwargs: Any) -> None:
            if Path(path).name.endswith("checkpoint-2"):
                next(Path(path).glob("*.safetensors")).unlink()
                kill()
            remove(path, *args, **kwargs)

        checkpoints.shutil.rmtree = keep.checkpoints.shutil.rmtree = half  # type: ignore[assignment]
    elif place == "final":
        steps.save_trained = lambda *args, **kwargs: kill()
    else:
        raise ValueError(f"{place!r} is none of {PLACES}")


def main(config: str, folder: str) -> None:
    import torch

    from fp8kernels.cli import app
    from fp8kernels.training.llm import steps  # noqa: F401, read before the fork

    torch.set_num_threads(1)
    for place in PLACES:
        child = os.fork()
        if child == 0:
            die_in(place)
            app(["train", "llm", config, "--out", str(Path(folder) / place)])
            os._exit(3)  # it was not killed
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            raise SystemExit(f"{place}: the process ended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
