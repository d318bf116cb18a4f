"""A run that was interrupted and went on is the run that was not: losses, weights, scales, rows, to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed.plain import one_thread

from fp8kernels.runs import Run
from fp8kernels.training.llm import train

from .settings import assert_same, config, probe_file, untimed, weights


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class Kill(BaseException):
    """What no handler expects."""


def killed(settings: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch, *, step: int) -> None:
    """Train until the optimizer step of that number is about to be taken, and die there."""
    from fp8kernels.training.llm.trainer import Finite

    def die(self: Finite, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step + 1 == step:
            raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(Finite, "on_pre_optimizer_step", die)
        with pytest.raises(Kill):
            train(settings, out)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="plain"),
        pytest.param({"lora": {"r": 2, "dropout": 0.1}}, id="lora"),
        pytest.param({"recipe": None, "recipe_changes": {}}, id="bf16"),
    ],
)
def test_an_interrupted_run_ends_as_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    probe = {"items": str(probe_file(tmp_path)), "every": 3}
    settings = config(tmp_path, **(changes | {"probe": probe}))
    unbroken = train(settings, tmp_path / "unbroken")
    killed(settings, tmp_path / "broken", monkeypatch, step=6)
    rows = Run.open(tmp_path / "broken").rows("log")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    resumed = train(settings, tmp_path / "broken", resume=True)
    assert resumed.info["status"] == unbroken.info["status"] == "done"
    for kind in ("log", "layers", "probe"):
        assert untimed(resumed, kind) == untimed(unbroken, kind)
    assert len(unbroken.rows("log")) == 6 and len(unbroken.rows("probe")) == 3
    assert bool(unbroken.rows("layers")) == (settings["recipe"] is not None)
    assert_same(weights(resumed), weights(unbroken))
    assert [row["kind"] for row in resumed.rows("events")].count("resume") == 1


def test_without_a_checkpoint_a_resumed_run_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, steps=3, save_every=0)
    killed(settings, tmp_path / "run", monkeypatch, step=2)
    resumed = train(settings, tmp_path / "run", resume=True)
    assert [row["step"] for row in resumed.rows("log")] == [1, 2, 3]


def test_resume_refuses_other_settings_and_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, steps=3)
    killed(settings, tmp_path / "run", monkeypatch, step=3)
    with pytest.raises(ValueError, match="recipe: 'hif8-qat' and 'e4m3-delayed'"):
        train(settings | {"recipe": "e4m3-delayed"}, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"recipe_changes.window: 4 and 8"):
        train(settings | {"recipe_changes": {"window": 8, "warmup_steps": 1}}, tmp_path / "run", resume=True)
    Run.open(tmp_path / "run").update(processes=2)
    with pytest.raises(ValueError, match=r"processes: 2 and 1"):
        train(settings, tmp_path / "run", resume=True)
    Run.open(tmp_path / "run").update(processes=1)
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 and 0.002"):
        train(settings | {"learning_rate": 2e-3}, tmp_path / "run", resume=True)
    text = tmp_path / "text.jsonl"
    kept = text.read_text(encoding="utf-8")
    text.write_text(kept.replace("maps", "ropes"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokens of data.train: digest"):
        train(settings, tmp_path / "run", resume=True)
    text.write_text(kept, encoding="utf-8")
    assert train(settings | {"keep": 3}, tmp_path / "run", resume=True).info["status"] == "done"
    with pytest.raises(ValueError, match="is done"):
        train(settings, tmp_path / "run", resume=True)


def test_what_is_no_run_is_not_resumed_and_a_run_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        train(config(tmp_path), tmp_path / "nothing", resume=True)
    Run.create(tmp_path / "there")
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(config(tmp_path), tmp_path / "there")
    with pytest.raises(FileExistsError, match="exists and holds no run"):
        train(config(tmp_path), tmp_path / "source")


def test_a_half_checkpoint_is_never_resumed_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, steps=5)
    unbroken = train(settings, tmp_path / "unbroken")
    killed(settings, tmp_path / "run", monkeypatch, step=5)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    shutil.copytree(folder / "checkpoint-2", folder / ".staging" / "checkpoint-9")
    resumed = train(settings, tmp_path / "run", resume=True)
    assert "checkpoint-2" in next(row["text"] for row in resumed.rows("events") if row["kind"] == "resume")
    assert untimed(resumed) == untimed(unbroken)
    assert_same(weights(resumed), weights(unbroken))
    assert not (folder / ".staging").exists()
