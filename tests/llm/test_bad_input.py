"""Bad input on the command line: exit code 2, one clear message, no traceback, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fp8kernels.cli import app
from fp8kernels.runs import Run
from fp8kernels.training.tokens import byte_tokenizer

from . import common
from .settings import config

pytest.importorskip("accelerate")


def command(folder: Path, settings: dict[str, Any], *arguments: str) -> Any:
    """`fp8kernels train llm`, with the configuration in a file; the result has exit_code, stdout, stderr."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return CliRunner().invoke(app, ["train", "llm", str(path), "--out", str(folder / "run"), *arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: Path, settings: dict[str, Any], *arguments: str) -> str:
    """The message of a refusal, which changes nothing on the disk."""
    run = folder / "run"
    before = files(run) if run.exists() else None
    result = command(folder, settings, *arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)  # not what Python would print a traceback of
    assert "Traceback" not in result.output
    messages = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert (files(run) if run.exists() else None) == before
    return result.stderr[result.stderr.index("error: ") :]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a text, once for all tests."""
    folder = tmp_path_factory.mktemp("made")
    config(folder)
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A folder of one's own with the model and the text."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


Change = Callable[[Path], object]


def without_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()


def half_the_tensors(source: Path) -> None:
    state = load_file(source / "model.safetensors")
    save_file({name: state[name] for name in sorted(state)[::2]}, source / "model.safetensors", {"format": "pt"})


def half_the_bytes(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_shard_missing(source: Path) -> None:
    state = load_file(source / "model.safetensors")
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, its in shards.items():
        save_file({name: state[name] for name in its}, source / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, its in shards.items() for name in its}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "model.safetensors").unlink()
    (source / "model-00002-of-00002.safetensors").unlink()


def a_nan(source: Path) -> None:
    state = load_file(source / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(state, source / "model.safetensors", {"format": "pt"})


def another_model(source: Path) -> None:
    description = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(description | {"intermediate_size": 128}))


def a_larger_tokenizer(source: Path) -> None:
    byte_tokenizer(common.texts(), common.VOCAB + 60).save_pretrained(source)


def no_tokenizer(source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink(missing_ok=True)


def no_end_token(source: Path) -> None:
    tokenizer = common.tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(source)


BAD_MODELS: dict[str, tuple[Change, str]] = {
    "no folder": (shutil.rmtree, "source"),
    "empty folder": (lambda source: [path.unlink() for path in source.iterdir()], "config.json"),
    "no weights": (without_weights, "source"),
    "half of the tensors": (half_the_tensors, "lack"),
    "half of the bytes": (half_the_bytes, "model.safetensors"),
    "a shard missing": (a_shard_missing, "model-00002-of-00002.safetensors"),
    "a NaN": (a_nan, "model.layers.1.mlp.up_proj.weight"),
    "another model's config": (another_model, "another shape"),
    "config cut short": (lambda source: (source / "config.json").write_text('{"model_type": "ll'), "config.json"),
    "larger tokenizer": (a_larger_tokenizer, "has ids up to"),
    "no tokenizer": (no_tokenizer, "tokenizer"),
    "no end token": (no_end_token, "no end token"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_model_or_tokenizer_that_will_not_do(place: Path, name: str) -> None:
    change, words = BAD_MODELS[name]
    change(place / "source")
    assert words in refused(place, config(place) if (place / "source").exists() else settings_of(place))


def settings_of(folder: Path) -> dict[str, Any]:
    """The configuration of `config`, which would make the model anew, where the test has removed it."""
    (folder / "source").mkdir()
    settings = config(folder)
    (folder / "source").rmdir()
    return settings


def rows(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


IDS = [10 + n % 50 for n in range(64)]
BAD_DATA: dict[str, tuple[Change, dict[str, Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), {}, "text.jsonl holds no document"),
    "binary": (lambda path: path.write_bytes(bytes(range(256)) * 9), {}, "text.jsonl, line 1 is not text"),
    "compressed": (lambda path: path.write_bytes(b"\x1f\x8b\x08\xff" * 99), {}, "is not"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-9]), {}, "is not JSON: Unterminated string"),
    "missing": (lambda path: path.unlink(), {}, "nothing matches"),
    "another field": (lambda path: rows(path, {"txt": "a"}), {}, "set text_field to 'txt'"),
    "null": (lambda path: rows(path, {"text": "a"}, {"text": None}), {}, "line 2: the field 'text' holds null"),
    "too little": (lambda path: rows(path, {"text": "a"}), {}, "do not fill one block of 16"),
    "a long document": (lambda path: None, {"too_long": "error"}, "text.jsonl, line 1 has"),
    "a long sequence": (lambda path: None, {"sequence": 65}, "context of 64"),
    "shifted labels": (
        lambda path: rows(path, {"input_ids": IDS, "labels": IDS}, {"input_ids": IDS, "labels": [*IDS[1:], 0]}),
        {},
        "text.jsonl, line 2: the labels are shifted by one already",
    ),
    "other labels": (
        lambda path: rows(path, {"input_ids": IDS, "labels": IDS[::-1]}),
        {},
        "labels are other tokens",
    ),
    "another model's tokens": (lambda path: rows(path, {"input_ids": [*IDS, 5000]}), {}, "has the token 5000"),
    "chats": (lambda path: rows(path, {"messages": [{"role": "user", "content": "a"}]}), {}, "no chat template"),
    "no parquet": (lambda path: path.rename(path.with_suffix(".parquet")), {"train": "*.parquet"}, "as parquet"),
    "validated on what is trained on": (
        lambda path: None,
        {"validation": "text.jsonl"},
        "training data and in the val",
    ),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_will_not_do(place: Path, name: str) -> None:
    change, changes, words = BAD_DATA[name]
    settings = config(place)
    settings["data"] = settings["data"] | {"hold_out": 0.0} | changes
    change(place / "text.jsonl")
    assert words in refused(place, settings)


BAD_SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "unknown key": ({"lerning_rate": 1e-3}, (), "did you mean 'learning_rate'"),
    "unknown key inside": ({"saturation": {"evry": 2}}, (), "saturation.evry"),
    "unknown recipe": ({"recipe": "hif8-qta"}, (), "hif8-qat"),
    "unknown change": ({"recipe_changes": {"windo": 4}}, (), "window"),
    "a word for a number": ({"steps": "many"}, (), "steps"),
    "nothing in 8 bits": ({"recipe_changes": {"warmup_steps": 6}}, (), "nothing would be trained in 8 bits"),
    "no equals sign": ({}, ("--set", "steps"), "key=value"),
    "no baseline": ({"baseline": "nowhere"}, (), "nowhere"),
    "resume nothing": ({}, ("--resume",), "holds no run"),
    "smoothing over shards": ({"fsdp": True, "trainer": {"label_smoothing_factor": 0.1}}, (), "label_smoothing"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_will_not_do(place: Path, name: str) -> None:
    changes, arguments, words = BAD_SETTINGS[name]
    assert words in refused(place, config(place) | changes, *arguments)


@pytest.mark.parametrize("text", ["steps: [1", "- steps", "", "\0"])
def test_a_configuration_that_is_none(place: Path, text: str) -> None:
    path = place / "broken.yaml"
    path.write_text(text)
    result = CliRunner().invoke(app, ["train", "llm", str(path), "--out", str(place / "run")])
    assert result.exit_code == 2 and "broken.yaml" in result.stderr and isinstance(result.exception, SystemExit)
    missing = CliRunner().invoke(app, ["train", "llm", str(place / "none.yaml"), "--out", str(place / "run")])
    assert missing.exit_code == 2 and "none.yaml" in missing.stderr
    assert not (place / "run").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(place: Path) -> None:
    (place / "run").mkdir()
    (place / "run" / "thesis.tex").write_text("years of work")
    assert "run exists and holds no run" in refused(place, config(place))
    assert (place / "run" / "thesis.tex").read_text() == "years of work"


def test_a_run_is_not_overwritten_and_not_resumed_with_another_recipe(place: Path) -> None:
    settings = config(place, steps=3, save_every=2)
    assert command(place, settings).exit_code == 0
    assert "holds a run already" in refused(place, settings)
    assert "is done" in refused(place, settings, "--resume")
    Run.open(place / "run").update(status="stopped")  # as if it had been interrupted
    assert "recipe: 'hif8-qat' and 'e4m3-delayed'" in refused(place, settings | {"recipe": "e4m3-delayed"}, "--resume")
    assert "recipe: 'hif8-qat' and None" in refused(
        place, settings | {"recipe": None, "recipe_changes": {}}, "--resume"
    )
    assert "window" in refused(place, settings, "--resume", "--set", "recipe_changes.window=9")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(place: Path) -> None:
    settings = config(place, learning_rate=1e30, scheduler="constant", save_every=1)
    settings |= {"warmup_steps": 3, "recipe_changes": {"window": 4, "warmup_steps": 1}}
    result = command(place, settings)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    run = Run.open(place / "run")
    assert run.info["status"] == "stopped"
    step = len(run.rows("log")) + 1
    assert f"step {step}: " in run.info["reason"] and "is not finite" in run.info["reason"]
    (event,) = (row for row in run.rows("events") if row["kind"] == "nan")
    assert event["step"] == step
    last = max((place / "run" / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert last.name == f"checkpoint-{step - 1}" and last.name in run.info["reason"]
    assert all(bool(value.isfinite().all()) for value in load_file(last / "model.safetensors").values())
    assert run.info["reason"] in result.stdout + result.stderr
