"""The rows of a run as TensorBoard shows them: transformers' own callback, in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback


def tensorboard(folder: Path, step: int, *, every: int) -> TrainerCallback:
    """transformers' TensorBoard callback for a folder; without TensorBoard one that does nothing.

    step   of the checkpoint that the run goes on from: what was written after it is made again
    every  steps between two rows
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback
    except ImportError:
        return TrainerCallback()

    class EverySo(TensorBoardCallback):
        """Writes the logs of some steps."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
            """Rows of losses at their interval; validation losses always."""
            if logs is not None and ("loss" not in logs or state.global_step % every == 0):
                super().on_log(args, state, control, logs, **rest)

    return EverySo(SummaryWriter(str(folder), purge_step=step + 1 if step else None))
