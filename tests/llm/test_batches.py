"""What reaches the model of a run: the same batches for the same seed and data, in 8 bits or not, resumed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8kernels.training.llm import train
from fp8kernels.training.llm.data import load_data
from fp8kernels.training.llm.labels import IGNORED

from . import common
from .settings import config

pytest.importorskip("accelerate")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Every micro-batch that is trained on, in order."""
    from fp8kernels.training.llm.trainer import LanguageTrainer

    batches: list[dict[str, Tensor]] = []
    step = LanguageTrainer.training_step

    def look(self: LanguageTrainer, model: Any, inputs: Any, *rest: Any, **named: Any) -> Tensor:
        batches.append({key: value.clone() for key, value in inputs.items()})
        return step(self, model, inputs, *rest, **named)

    monkeypatch.setattr(LanguageTrainer, "training_step", look)
    return batches


def assert_equal(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> None:
    assert len(first) == len(second)
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one), number


def test_a_run_in_8_bits_and_its_run_in_bf16_see_the_same_batches(
    tmp_path: Path, seen: list[dict[str, Tensor]]
) -> None:
    settings = config(tmp_path)
    train(settings, tmp_path / "hif8")
    hif8 = seen.copy()
    seen.clear()
    train(settings | {"recipe": None, "recipe_changes": {}}, tmp_path / "bf16")
    assert_equal(hif8, seen)
    assert len(seen) == 6 * 2 and all(batch["input_ids"].shape == (2, 16) for batch in seen)
    bf16 = seen.copy()
    seen.clear()
    train(settings | {"seed": 7}, tmp_path / "seed")
    assert any(not one["input_ids"].equal(other["input_ids"]) for one, other in zip(bf16, seen, strict=True))


def test_each_pass_takes_every_block_once_and_labels_are_the_tokens(
    tmp_path: Path, seen: list[dict[str, Tensor]]
) -> None:
    settings = config(tmp_path)
    settings["data"] = settings["data"] | {"sequence": 64}
    data = load_data(settings["data"]["train"], common.tokenizer(), sequence=64, hold_out=0.2).train
    passes = 2
    steps = -(-passes * len(data) // 4)
    train(settings | {"steps": steps, "recipe": None, "recipe_changes": {}, "save_every": 0}, tmp_path / "run")
    rows = torch.cat([batch["input_ids"] for batch in seen])[: passes * len(data)]
    for one in rows.chunk(passes):
        assert sorted(one.tolist()) == sorted(data.ids.tolist())
    assert not rows[: len(data)].equal(rows[len(data) :])
    assert all(batch["labels"].equal(batch["input_ids"]) for batch in seen)


def test_rows_of_their_own_reach_the_model_with_their_padding_masked(
    tmp_path: Path, seen: list[dict[str, Tensor]]
) -> None:
    settings = config(tmp_path, steps=2, recipe=None, recipe_changes={})
    settings["data"] = settings["data"] | {"packing": False}
    run = train(settings, tmp_path / "run")
    for batch in seen:
        there = batch["attention_mask"].bool()
        assert (batch["labels"][~there] == IGNORED).all()
        assert batch["labels"][there].equal(batch["input_ids"][there])
    assert run.rows("log")[0]["tokens"] == sum(int(batch["attention_mask"].sum()) for batch in seen[:2])
