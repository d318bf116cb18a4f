"""A checkpoint is there whole or not at all: kills and full disks in the middle of a save, and what is kept."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed.plain import one_thread

from fp8kernels.runs import Run
from fp8kernels.training.llm import checkpoints, train
from fp8kernels.training.llm.checkpoints import CheckpointError

from .settings import assert_same, config, untimed, weights


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def staged(folder: Path, step: int) -> Path:
    """A small folder as the trainer would leave it."""
    path = checkpoints.staging(folder) / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights" * step)
    return path


def test_seal_and_rotate(tmp_path: Path) -> None:
    for step in (2, 10, 4, 30):
        staged(tmp_path, step)
        assert checkpoints.seal(tmp_path, step) == tmp_path / f"checkpoint-{step}"
    assert [checkpoints.step_of(path) for path in checkpoints.whole(tmp_path)] == [2, 4, 10, 30]
    gone = checkpoints.rotate(tmp_path, keep=2, best=2)
    assert [path.name for path in gone] == ["checkpoint-4"]
    assert [checkpoints.step_of(path) for path in checkpoints.whole(tmp_path)] == [2, 10, 30]


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda path: (path / "files.json").unlink(), "no files.json"),
        (lambda path: (path / "files.json").write_text('{"a"', encoding="utf-8"), "cannot be read"),
        (lambda path: (path / "model.safetensors").unlink(), "is missing"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x"), "has 1 bytes, written were 14"),
    ],
)
def test_what_is_damaged_is_not_whole(tmp_path: Path, damage: Any, why: str) -> None:
    staged(tmp_path, 2)
    path = checkpoints.seal(tmp_path, 2)
    assert checkpoints.why_not_whole(path) is None
    damage(path)
    assert why in str(checkpoints.why_not_whole(path))
    assert checkpoints.whole(tmp_path) == [] and list(checkpoints.broken(tmp_path)) == [path]


@pytest.mark.parametrize("writer", ["optimizer.pt", "files.json"])
def test_a_full_disk_leaves_the_checkpoint_before_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    settings = config(tmp_path, steps=5)
    unbroken = train(settings, tmp_path / "unbroken")
    out = tmp_path / "run"
    real_save, real_text = torch.save, Path.write_text

    def full(name: Path) -> None:
        if "checkpoint-4" in str(name) and writer in name.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(what: Any, where: Any, *args: Any, **rest: Any) -> None:
        real_save(what, where, *args, **rest)
        full(Path(where))

    def write_text(self: Path, text: str, *args: Any, **rest: Any) -> int:
        full(self)
        return real_text(self, text, *args, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        patch.setattr(Path, "write_text", write_text)
        with pytest.raises(CheckpointError, match=r"checkpoint 4 could not be written: .*No space left"):
            train(settings, out)
    info = Run.open(out).info
    assert info["status"] == "stopped" and "No space left" in info["reason"] and "checkpoint-2" in info["reason"]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert checkpoints.why_not_whole(out / "checkpoints" / "checkpoint-2") is None
    resumed = train(settings, out, resume=True)
    assert untimed(resumed) == untimed(unbroken)
    assert_same(weights(resumed), weights(unbroken))


SCRIPT = """
import sys, time, torch
from fp8kernels.training.llm import train
real = torch.save
def slow(what, where, *args, **rest):
    real(what, where, *args, **rest)
    if "checkpoint-4" in str(where):
        print("half", flush=True)
        time.sleep(60)
torch.save = slow
torch.set_num_threads(1)
train(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save(tmp_path: Path) -> None:
    settings = config(tmp_path, steps=5)
    unbroken = train(settings, tmp_path / "unbroken")
    file, out = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(file), str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert "half\n" in process.stdout, "it ended before the save"
    finally:
        process.kill()
        process.wait()
    assert (out / "checkpoints" / ".staging" / "checkpoint-4").is_dir()
    assert [path.name for path in checkpoints.whole(out / "checkpoints")] == ["checkpoint-2"]
    assert Run.open(out).info["status"] == "running"
    resumed = train(settings, out, resume=True)
    assert untimed(resumed) == untimed(unbroken)
    assert_same(weights(resumed), weights(unbroken))


def test_control_c_saves_the_step_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8kernels.training.llm.trainer import Finite

    settings = config(tmp_path, steps=5, save_every=0)
    unbroken = train(settings, tmp_path / "unbroken")
    real = Finite.on_pre_optimizer_step

    def interrupt(self: Finite, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step + 1 == 3:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, args, state, control, **rest)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Finite, "on_pre_optimizer_step", interrupt)
        run = train(settings, tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before
    assert run.info["status"] == "stopped" and "interrupted at step 3" in run.info["reason"]
    assert "checkpoint-3; go on from it with --resume" in run.info["reason"]
    assert not (run.path / "model").exists()
    resumed = train(settings, tmp_path / "run", resume=True)
    assert untimed(resumed) == untimed(unbroken)
    assert_same(weights(resumed), weights(unbroken))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    run = train(config(tmp_path, steps=5, save_every=1, validate_every=1, keep=1, learning_rate=0.3), tmp_path / "run")
    losses = {row["step"]: row["validation_loss"] for row in run.rows("log")}
    best = min(losses, key=lambda step: losses[step])
    assert best < 5  # at this learning rate the model gets worse
    kept = [checkpoints.step_of(path) for path in checkpoints.whole(run.path / "checkpoints")]
    assert kept == [best, 5]
