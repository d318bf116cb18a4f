"""The run's folder: whole rows, whole files, and nothing lost by a kill."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
import torch

from fp8kernels.runs import Run


def test_rows_come_back_as_they_were_given(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a", config={"steps": 3}, baseline=None)
    rows = [{"step": step, "loss": 1.5 / step, "names": ["x", "ü\n"]} for step in (1, 2, 3)]
    run.append("log", rows[0])
    run.append("log", *rows[1:])
    again = Run.open(tmp_path / "a")
    assert again.rows("log") == rows
    assert again.info["status"] == "running" and again.info["config"] == {"steps": 3}
    assert again.rows("probe") == []


def test_numbers_of_numpy_and_torch_are_numbers_and_nan_is_null(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    run.append(
        "log", {"step": numpy.int64(1), "loss": torch.tensor(2.5), "bad": math.nan, "worse": torch.tensor(math.inf)}
    )
    assert run.rows("log") == [{"step": 1, "loss": 2.5, "bad": None, "worse": None}]


def test_a_line_that_a_kill_cut_short_is_not_read(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    run.append("log", {"step": 1}, {"step": 2})
    with run.file("log").open("a") as file:
        file.write('{"step": 3, "lo')
    assert [row["step"] for row in run.rows("log")] == [1, 2]
    run.cut(2)  # as a resumed run does before it appends
    run.append("log", {"step": 3})
    assert [row["step"] for row in run.rows("log")] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    run.file("log").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        run.rows("log")


def test_cut_forgets_what_came_after(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    run.append("log", *({"step": step} for step in range(1, 6)))
    run.append("events", {"step": 2, "kind": "saved"}, {"step": 4, "kind": "nan"})
    run.cut(3)
    assert [row["step"] for row in run.rows("log")] == [1, 2, 3]
    assert [row["step"] for row in run.rows("events")] == [2]


def test_a_folder_is_not_taken_twice_and_never_emptied(tmp_path: Path) -> None:
    Run.create(tmp_path / "a")
    with pytest.raises(FileExistsError, match="holds a run already"):
        Run.create(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds no run"):
        Run.create(tmp_path / "b")
    with pytest.raises(FileNotFoundError, match=r"no run\.json"):
        Run.open(tmp_path / "b")


def test_a_full_disk_leaves_what_run_json_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "a", steps=0)

    def full(path: Path, *rest: object, **more: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            run.finish("done")
    assert run.info["status"] == "running"
    assert Run.open(tmp_path / "a").info["status"] == "running"
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["run.json"]


def test_a_status_or_kind_that_there_is_not(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "a")
    with pytest.raises(ValueError, match="finished"):
        run.finish("finished")
    with pytest.raises(ValueError, match="losses"):
        run.append("losses", {"step": 1})
