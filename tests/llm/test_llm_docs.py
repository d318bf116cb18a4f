"""docs/LLM.md does what it says: its commands, its configuration and its Python, on models that are small enough."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from distributed.plain import one_thread
from typer.testing import CliRunner

from fp8kernels.cli.app import app
from fp8kernels.models.llama import llama
from fp8kernels.runs import Run
from fp8kernels.training.llm import read_config

from .common import SIZE, text_file, tokenizer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "LLM.md").read_text(encoding="utf-8")
LESS = ("steps=3", "batch=2", "data.sequence=32", "data.train=text.jsonl", "validate_every=0")  # seconds, not minutes
SMALLER = {
    "base": ("model.size={vocab: 300, hidden: 64, intermediate: 96, layers: 2, heads: 4, context: 64}",),
    "qat": ("recipe_changes={window: 4, warmup_steps: 1}", "save_every=0"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a section of the page."""
    text = re.search(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.S | re.M)
    assert text is not None, section
    found = re.findall(rf"```{language}\n(.*?)```", text[1], flags=re.S)
    assert found, f"{section} has no {language}"
    return found


def command(line: str) -> list[str]:
    """The words of a command, with fewer steps of a smaller model where it trains."""
    name, *words = shlex.split(line)
    assert name == "fp8kernels"
    if words[0] == "train":
        for change in (*LESS, *SMALLER[Path(words[2]).stem]):
            words += ["--set", change]
    return words


@pytest.mark.slow
def test_the_quick_start_and_what_it_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    shutil.copy(ROOT / "README.md", tmp_path)
    text_file(tmp_path, 16)
    monkeypatch.chdir(tmp_path)
    for line in blocks("Quick start", "sh")[0].splitlines():
        result = CliRunner().invoke(app, command(line))
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
    assert Run.open("runs/hif8").info["status"] == "done" and "ape" in Run.open("runs/hif8").rows("log")[0]
    assert "<svg" in Path("runs/report.html").read_text(encoding="utf-8")

    small = read_config("examples/qat.yaml", [*LESS, *SMALLER["qat"]])
    monkeypatch.setattr("fp8kernels.training.llm.run.read_config", lambda source: small)
    scope: dict[str, object] = {}
    for block in (*blocks("Quick start", "python"), *blocks("A run's folder", "python")):
        exec(block, scope)
    assert type(scope["model"]).__name__ == "LlamaForCausalLM"


def test_the_configurations_are_valid(tmp_path: Path) -> None:
    for block in blocks("Quick start", "yaml"):
        (tmp_path / "run.yaml").write_text(block, encoding="utf-8")
        config = read_config(tmp_path / "run.yaml")
        assert config.recipe == "hif8-qat-mlp" and config.learning_rate == 1e-5 and config.warm_up() == 300
    for file in sorted((ROOT / "examples").glob("*.yaml")):
        read_config(file)


def test_each_key_of_the_table_is_one_and_each_key_is_in_it() -> None:
    table = re.search(r"^## Configuration\n(.*?)(?=^## )", PAGE, flags=re.S | re.M)
    assert table is not None
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", table[1], flags=re.M) for name in re.findall(r"`([\w.*]+)`", row)
    }
    sections = {name.partition(".")[0] for name in named}
    from dataclasses import fields

    from fp8kernels.training.llm import Config

    assert sections == {field.name for field in fields(Config)} - {"name"}


def test_the_models_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "models" / "llama-1b"
    model = llama(SIZE, attention_bias=True, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks("Models", "python"):
        exec(block, scope)
    assert (tmp_path / "models" / "pangu-qat" / "config.json").is_file()
