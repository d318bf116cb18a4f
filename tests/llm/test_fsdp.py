"""FSDP2 over two processes: the losses of one process, whole models in the run's folder, resumed to the bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed.plain import one_thread

from fp8kernels.integrations.trained import load_trained
from fp8kernels.nn.step import layers
from fp8kernels.runs import Run
from fp8kernels.training.llm import train

from .settings import assert_same, config, untimed, weights

BF16 = 2.0**-8  # the rounding of gathered weights; without FSDP autocast rounds the same weights in the products alone


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def launch(folder: Path, settings: dict[str, Any], name: str, *, resume: bool = False) -> Run:
    """Run the settings over two processes."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [str(Path(__file__).with_name("launched.py")), str(file), str(folder / name)]
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*start, *script, "resume" if resume else "new"], capture_output=True, text=True, timeout=240, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return Run.open(folder / name)


@pytest.mark.slow
def test_two_processes_share_the_weights(tmp_path: Path) -> None:
    settings = config(tmp_path, steps=4, batch=1, fsdp=True)
    run = launch(tmp_path, settings, "sharded")
    whole = train(settings | {"fsdp": False, "batch": 2}, tmp_path / "whole")
    assert run.info["status"] == "done"
    for row, other in zip(run.rows("log"), whole.rows("log"), strict=True):
        assert row["tokens"] == other["tokens"] == 2 * 2 * 16
        assert row["loss"] == pytest.approx(other["loss"], rel=BF16) and row["loss"] * 2**10 % 1 != 0  # not of bf16
    model, _ = load_trained(run.path)
    assert type(model).__name__ == "LlamaForCausalLM" and len(layers(model)) == 14
    assert_shapes(run, whole)

    shutil.copytree(run.path, tmp_path / "again")
    for path in (tmp_path / "again/checkpoints/checkpoint-4", tmp_path / "again/model"):
        shutil.rmtree(path)
    Run.open(tmp_path / "again").finish("stopped", "for a test")
    resumed = launch(tmp_path, settings, "again", resume=True)
    assert untimed(resumed) == untimed(run)
    assert_same(weights(resumed), weights(run))


def assert_shapes(first: Run, second: Run) -> None:
    one, other = weights(first), weights(second)
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in other.items()}


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fsdp: accelerate does not shard over 1 process\(es\) on cpu"):
        train(config(tmp_path, fsdp=True), tmp_path / "run")
    with pytest.raises(ValueError, match="label_smoothing_factor does not go with fsdp"):
        train(config(tmp_path, fsdp=True, trainer={"label_smoothing_factor": 0.1}), tmp_path / "run")
    with pytest.raises(ValueError, match="lora with fsdp"):
        train(config(tmp_path, fsdp=True, lora={"r": 2}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
