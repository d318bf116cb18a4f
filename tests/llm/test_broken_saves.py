"""A kill or a full disk in the middle of a save: the checkpoint before stays whole, and `--resume` goes on from it."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.plain import one_thread
from typer.testing import CliRunner

from fp8kernels.cli import app
from fp8kernels.runs import Run
from fp8kernels.training.llm import checkpoints

from .killed import PLACES, STEP
from .settings import assert_same, config, untimed, weights

pytest.importorskip("accelerate")

HERE = Path(__file__).parent
STEPS = 6


def command(*arguments: Path | str) -> Any:
    with one_thread():  # as the killed processes
        return CliRunner().invoke(app, ["train", "llm", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.yaml, and the run that nothing happens to in unbroken/."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "config.yaml").write_text(yaml.safe_dump(config(folder, steps=STEPS, keep=1)), encoding="utf-8")
    result = command(folder / "config.yaml", "--out", folder / "unbroken")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def killed(made: Path) -> Path:
    """The folders of the runs that were killed, one a place."""
    script = [sys.executable, str(HERE / "killed.py"), str(made / "config.yaml"), str(made / "killed")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return made / "killed"


def assert_goes_on_to_the_same_end(made: Path, out: Path, *, step: int) -> None:
    """`--resume` takes the checkpoint of that step and ends as the unbroken run, to the bit."""
    result = command(made / "config.yaml", "--out", out, "--resume")
    assert result.exit_code == 0, result.output
    unbroken, resumed = Run.open(made / "unbroken"), Run.open(out)
    assert resumed.info["status"] == "done"
    (event,) = (row for row in resumed.rows("events") if row["kind"] == "resume")
    assert event["step"] == step
    assert untimed(resumed) == untimed(unbroken)
    assert_same(weights(resumed), weights(unbroken))
    left = [path.name for path in (out / "checkpoints").iterdir()]
    assert left == [path.name for path in (made / "unbroken" / "checkpoints").iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_after_a_kill_the_newest_whole_checkpoint_is_taken(made: Path, killed: Path, place: str) -> None:
    folder = killed / place / "checkpoints"
    before = {"rotation": STEP, "final": STEPS}.get(place, STEP - 2)
    assert checkpoints.step_of(checkpoints.whole(folder)[-1]) == before
    assert Run.open(killed / place).info["status"] == "running"  # nothing had time to say otherwise
    assert not (killed / place / "model").exists()
    assert_goes_on_to_the_same_end(made, killed / place, step=before)


@pytest.fixture
def small_files() -> Iterator[Any]:
    """A function that lets no file grow beyond so many bytes, for the rest of the test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "list"])
def test_a_disk_that_takes_no_more_leaves_the_checkpoint_before(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_files: Any, what: str
) -> None:
    """The system itself refuses to write on: every write of the checkpoint, or the last one alone."""
    from fp8kernels.training.llm.trainer import LanguageTrainer

    save, seal = LanguageTrainer._save_checkpoint, checkpoints.seal

    def save_full(self: LanguageTrainer, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == STEP:
            small_files(50_000)  # bytes; rows and run.json are smaller, the model is larger
        save(self, *args, **kwargs)

    def seal_full(folder: Path, step: int) -> Path:
        if step == STEP:
            small_files(10)
        return seal(folder, step)

    with monkeypatch.context() as patch:
        if what == "model":
            patch.setattr(LanguageTrainer, "_save_checkpoint", save_full)
        else:
            patch.setattr(checkpoints, "seal", seal_full)
        result = command(made / "config.yaml", "--out", tmp_path / "run")
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    assert f"error: checkpoint {STEP} could not be written" in result.stderr and "File too large" in result.stderr
    found = checkpoints.whole(tmp_path / "run" / "checkpoints")
    assert [checkpoints.step_of(path) for path in found] == [STEP - 2]
    if what == "model":  # there was room to write it down
        run = Run.open(tmp_path / "run")
        assert run.info["status"] == "stopped" and f"checkpoint-{STEP - 2}" in run.info["reason"]
    assert_goes_on_to_the_same_end(made, tmp_path / "run", step=STEP - 2)


@pytest.mark.slow
def test_a_disk_that_does_not_take_the_trained_model_keeps_what_it_was_made_of(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_files: Any
) -> None:
    from fp8kernels.training.llm import steps

    save = steps.save_trained

    def save_full(*args: Any, **kwargs: Any) -> None:
        small_files(50_000)
        save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "save_trained", save_full)
        result = command(made / "config.yaml", "--out", tmp_path / "run")
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit) and "File too large" in result.stderr
    assert not (tmp_path / "run" / "model").exists()
    assert Run.open(tmp_path / "run").info["status"] == "stopped"
    assert_goes_on_to_the_same_end(made, tmp_path / "run", step=STEPS)
