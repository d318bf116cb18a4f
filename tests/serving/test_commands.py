"""The commands export and check: from a run or a plain model to a folder, and mistakes told in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from serving import common
from typer.testing import CliRunner

from fp8kernels.cli import app
from fp8kernels.integrations.exported import RECIPES
from fp8kernels.serving import load

COMPRESSED = "compressed-tensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was not trained in 8 bits, as transformers saves it; to read."""
    folder = tmp_path_factory.mktemp("plain") / "model"
    common.plain().save_pretrained(folder)
    common.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(common.TEXT), encoding="utf-8")
    return path


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("form", RECIPES)
def test_a_plain_model_becomes_a_folder_that_check_finds_whole_and_load_computes(
    form: str, plain: Path, text: Path, tmp_path: Path
) -> None:
    words = [] if form.endswith(("dynamic", "block")) else ["--text", text]
    done = run("export", plain, "--out", tmp_path / "out", "--format", form, *words)
    assert done.exit_code == 0, done.output
    checked = run("check", tmp_path / "out")
    assert checked.exit_code == 0, checked.output
    assert "is whole" in checked.output
    ids = common.prompt_ids()
    with torch.no_grad():
        wanted, found = common.plain()(ids).logits, load(tmp_path / "out")(ids).logits.float()
    error = (found - wanted).norm() / wanted.norm()
    assert 0 < error < 0.2, f"8 bits are not exact, and not far off: {error}"


def test_static_formats_of_an_untrained_model_ask_for_text(plain: Path, tmp_path: Path) -> None:
    done = run("export", plain, "--out", tmp_path / "out", "--format", COMPRESSED)
    assert done.exit_code == 2
    assert "give text to calibrate on" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "gguf"], "it is one of native"),
        (["--dtype", "float8"], "it is bfloat16 or float32"),
        (["--recipe", "hif8"], "hif8-qat"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
    ids=["format", "dtype", "recipe", "text"],
)
def test_mistakes_are_one_line(words: list[str], message: str, plain: Path, tmp_path: Path) -> None:
    done = run("export", plain, "--out", tmp_path / "out", *words)
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert not (tmp_path / "out").exists()


def test_what_is_quantized_already_is_not_exported_again(native_folder: Path, tmp_path: Path) -> None:
    done = run("export", native_folder, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "is quantized already" in done.output


def test_a_folder_of_others_is_not_replaced(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    done = run("export", plain, "--out", tmp_path / "out", "--format", "compressed-tensors-dynamic")
    assert done.exit_code == 2
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_check_ends_with_1_and_names_what_is_wrong(native_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(native_folder, tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    done = run("check", folder)
    assert done.exit_code == 1
    assert "model.safetensors" in done.output


def test_check_of_no_folder_ends_with_2(tmp_path: Path) -> None:
    assert run("check", tmp_path / "nowhere").exit_code == 2


def test_static_scales_in_the_files_are_those_of_the_text(plain: Path, text: Path, tmp_path: Path) -> None:
    assert run("export", plain, "--out", tmp_path / "out", "--format", COMPRESSED, "--text", text).exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == COMPRESSED
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = [tensor for name, tensor in tensors.items() if name.endswith("input_scale")]
    assert len(scales) == 7 * common.SIZE.layers
    assert all(scale.shape == (1,) and 0 < float(scale) < 1 for scale in scales)
