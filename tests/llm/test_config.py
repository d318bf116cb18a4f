"""A configuration that is wrong says where, and one that is right has the published defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fp8kernels.models.llama import LlamaSize
from fp8kernels.runs.precision import recipe_of
from fp8kernels.training.llm import Config, read_config
from fp8kernels.training.llm.baseline import differences
from fp8kernels.training.llm.order import order

SMALL: dict[str, Any] = {"model": {"path": "m"}, "data": {"train": ["a.txt"]}, "steps": 10}


def changed(**changes: Any) -> dict[str, Any]:
    return SMALL | changes


def test_the_defaults_are_the_published_ones() -> None:
    config = read_config(changed(steps=5000))
    assert (config.learning_rate, config.scheduler, config.warm_up()) == (1e-5, "cosine", 300)
    assert (config.betas, config.weight_decay, config.clip) == ((0.9, 0.95), 0.1, 1.0)
    assert (config.data.sequence, config.data.packing, config.model.dtype) == (1024, True, "float32")
    assert config.recipe is None and config.lora is None and config.probe is None and not config.fsdp


def test_the_warm_up_of_a_short_run_is_a_tenth_of_it() -> None:
    assert read_config(changed(steps=100)).warm_up() == 10
    assert read_config(changed(steps=100, warmup_steps=0)).warm_up() == 0
    assert read_config(changed(steps=100, warmup_steps=50)).warm_up() == 50


def test_a_file_its_paths_its_numbers_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    file = folder / "run.yaml"
    file.write_text(
        "model: {path: ../model}\ndata:\n  train: [a.txt, /b.txt]\nsteps: 1e3\n"
        "learning_rate: 3e-4\nbetas: [0.8, 0.9]\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    config = read_config(file, ["data.sequence=64", "lora.r=4", "weight_decay=1e-2", "probe.items=items.jsonl"])
    assert config.learning_rate == 3e-4 and config.weight_decay == 1e-2 and config.steps == 1000
    assert config.betas == (0.8, 0.9) and config.data.sequence == 64
    assert config.lora is not None and config.lora.r == 4
    assert config.model.path is not None and config.model.path.resolve() == tmp_path / "model"
    assert config.data.train == [folder / "a.txt", Path("/b.txt")]
    assert config.probe is not None and config.probe.items == tmp_path / "items.jsonl"
    again = read_config(config.as_dict())
    assert again == config and isinstance(again, Config)


def test_a_model_by_its_size() -> None:
    size = {"vocab": 300, "hidden": 64, "intermediate": 96, "layers": 2, "heads": 4, "context": 64}
    assert read_config(changed(model={"size": size})).model.size == LlamaSize(300, 64, 96, 2, 4, 64)


@pytest.mark.parametrize(
    "values, message",
    [
        (changed(stepps=3), "unknown key 'stepps'; did you mean 'steps'"),
        (changed(data={"train": ["a"], "secuence": 4}), "unknown key 'data.secuence'; did you mean 'sequence'"),
        (changed(zzz=1), "unknown key 'zzz'; known are model, data, steps"),
        ({"steps": 1}, "model is missing"),
        (changed(steps="many"), "steps is str 'many', it must be a whole number"),
        (changed(steps=2.5), "steps is float '2.5', it must be a whole number"),
        (changed(steps=True), "steps is bool 'True'"),
        (changed(fsdp="yes"), "fsdp is str 'yes', it must be true or false"),
        (changed(steps=0), "steps=0 must be at least 1"),
        (changed(betas=[0.9]), r"betas is list '\[0.9\]', it holds 2 values"),
        (changed(betas=[0.9, 1.0]), "must each be at least 0 and below 1"),
        (changed(model={}), "give either path .* or size"),
        (changed(model={"path": "m", "dtype": "fp8"}), "model: dtype='fp8' is none of"),
        (changed(model="m"), "model is str 'm', it must hold keys and values"),
        (changed(data={"train": []}), "data: train names no file"),
        (changed(data={"train": ["a"], "hold_out": 1.5}), "hold_out=1.5"),
        (changed(data={"train": ["a"], "hold_out": 0.1, "validation": ["b"]}), "hold_out=0.1"),
        (changed(scheduler="cosinus"), "scheduler='cosinus' is none of"),
        (changed(saturation={"policy": "panic"}), "saturation: policy='panic' is none of"),
        (changed(lora={"target_modules": 4}), "lora.target_modules is int '4', it must be text, or a list"),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(values)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no file"):
        read_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1", encoding="utf-8")
    with pytest.raises(ValueError, match=r"broken.yaml is no YAML file: .*line 1"):
        read_config(broken)
    broken.write_bytes(b"\xff\x00\xfe")
    with pytest.raises(ValueError, match="is no YAML file"):
        read_config(broken)
    broken.write_text("- a\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds list"):
        read_config(broken)
    with pytest.raises(ValueError, match=r"--set 'steps': write it as key=value"):
        read_config(changed(), ["steps"])
    with pytest.raises(ValueError, match="'steps' is int '10' and has no keys"):
        read_config(changed(), ["steps.a=1"])


def test_recipes_of_configurations() -> None:
    assert recipe_of(None) is None
    recipe = recipe_of(
        "hif8-qat",
        {
            "window": 8,
            "algorithm": "most_recent",
            "input": {"target": 224},
            "grad": "e5m2",
            "alarm": {"policy": "fallback"},
            "keep": ["*down_proj"],
        },
    )
    assert recipe is not None
    assert (recipe.window, recipe.algorithm, recipe.input.target) == (8, "most_recent", 224)
    assert recipe.grad is not None and recipe.grad.fmt == "e5m2" and recipe.alarm.policy == "fallback"
    assert recipe.for_layer("model.layers.0.mlp.down_proj")[0] is None
    assert recipe.for_layer("model.layers.0.mlp.up_proj")[0] is not None
    for changes, message in (
        ({"windows": 3}, "did you mean 'window'"),
        ({"input": {"tarket": 3}}, "unknown field 'tarket'"),
        ({"input": None}, "only the gradient"),
        ({"grad": {"target": 3}}, "fmt is needed"),
        ({"overrides": []}, "keep"),
        ({"window": "x"}, "recipe_changes"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe_of("hif8-qat", changes)
    with pytest.raises(ValueError, match="did you mean 'hif8-qat'"):
        recipe_of("hif8-qatt", {})


def test_the_order_of_data_follows_from_the_seed() -> None:
    first = order(5, 12, seed=1)
    assert first.tolist() == order(5, 12, seed=1).tolist() != order(5, 12, seed=2).tolist()
    assert sorted(first[:5].tolist()) == sorted(first[5:10].tolist()) == list(range(5))
    assert first[:7].tolist() == order(5, 7, seed=1).tolist()


def test_differences_are_named_and_sections_can_be_left_out() -> None:
    first, second = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}
    assert differences(first, second) == ["b.c: 2 and 4", "e: None and 5"]
    assert differences(first, second, but=("b",)) == ["e: None and 5"]
