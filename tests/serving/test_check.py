"""check and check_report: a whole folder of every layout has no problems; each thing that is wrong is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.folders import LAYOUTS, edit_config, read, save, settings, write_folder

from fp8kernels.convert import convert
from fp8kernels.export import Report, check, check_report, export
from fp8kernels.export.layout import Manifest
from fp8kernels.models.llama import LlamaSize, llama

LAYER = "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of a layout, written once; not to be changed."""
    folders: dict[str, Path] = {}

    def of(layout: str) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp(layout)
            write_folder(folders[layout], layout)
        return folders[layout]

    return of


@pytest.fixture
def copy(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of it that a test may break."""

    def of(layout: str) -> Path:
        return Path(shutil.copytree(written(layout), tmp_path / layout))

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_folder_has_no_problems(written: Any, layout: str) -> None:
    report = check(written(layout))
    assert isinstance(report, Report)
    assert report.problems == []
    assert len(report.rows) == 7 * 2 + 1
    assert report.method == settings(layout)["quant_method"]
    assert not any("names were not held" in said for said in report.warnings)


def test_a_native_folder_gives_its_manifest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = convert(llama(LlamaSize(300, 64, 128, 1, 2, 64)), "hif8-qat", verbose=False)
    export(model, tmp_path / "out")
    manifest = check(tmp_path / "out")
    assert isinstance(manifest, Manifest)
    report = check_report(tmp_path / "out")
    assert report.problems == []
    assert report.manifest == manifest
    assert {row.weights for row in report.rows} == {"hif8, one scale", "BF16"}


def changed(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    """Put other tensors into a folder, or take some away; "__" stands for the dots of a layer's name."""

    def edit(folder: Path) -> None:
        tensors = read(folder)
        for key, value in changes.items():
            name = key if "." in key else f"{LAYER}.{key}"
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value
        save(folder, tensors)

    return edit


def with_code(code: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = read(folder)
        codes = tensors[f"{LAYER}.weight"].view(torch.uint8)
        codes[3, 5] = code
        save(folder, tensors)

    return edit


def rename(folder: Path) -> None:
    tensors = read(folder)
    tensors["model.layers.0.self_attn.key.weight"] = tensors.pop(f"{LAYER}.weight")
    save(folder, tensors)


def number(value: float) -> torch.Tensor:
    return torch.tensor([value])


BROKEN = {
    "zero": ("static", changed(weight_scale=number(0.0)), "weight_scale: 1 of 1 scales are 0, negative, NaN or Inf"),
    "nan": ("static", changed(weight_scale=number(float("nan"))), "such as nan"),
    "inf": ("static", changed(input_scale=number(float("inf"))), "input_scale: 1 of 1 scales are 0"),
    "negative": ("dynamic", changed(weight_scale=-torch.ones(128, 1)), "128 of 128 scales are 0, negative"),
    "nan code": ("static", with_code(0x7F), f"{LAYER}.weight: 1 codes are NaN or Inf in e4m3"),
    "nan code, sign": ("fp8-block", with_code(0xFF), f"{LAYER}.weight: 1 codes are NaN or Inf in e4m3"),
    "no scale": ("static", changed(weight_scale=None), f"{LAYER}.weight is F8_E4M3 and has no scale in the files"),
    "no input scale": ("modelopt", changed(input_scale=None), f"{LAYER} has static inputs"),
    "shape": ("dynamic", changed(weight_scale=torch.ones(64, 1)), "weight_scale has shape [64, 1]"),
    "grid": ("block", changed(weight_scale=torch.ones(2, 2)), "weight_scale has shape [2, 2]"),
    "dtype": ("static", changed(weight_scale=torch.tensor([1])), f"{LAYER}.weight_scale is I64, scales are floats"),
    "not 8-bit": ("static", changed(weight=torch.ones(128, 128)), f"add {LAYER!r} to its ignore"),
    "renamed": ("static", rename, f"{LAYER}.weight_scale scales nothing"),
    "pickle": (
        "static",
        lambda at: (at / "pytorch_model.bin").write_bytes(b"\x80\x02."),
        "run code when they are read",
    ),
    "ignored": (
        "static",
        lambda folder: edit_config(folder, settings("static") | {"ignore": ["re:.*k_proj", "lm_head"]}),
        "ignores it: codes would be taken for weights",
    ),
    "no config": ("static", lambda folder: edit_config(folder, {}), "has no quantization_config"),
    "catastrophic pattern": (
        "static",
        lambda folder: edit_config(folder, settings("static") | {"ignore": ["re:(m+)+$"]}),
        "repeats what repeats",
    ),
    "ignore is a word": (
        "static",
        lambda folder: edit_config(folder, settings("static") | {"ignore": "lm_head"}),
        "a list of names",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_is_named(copy: Any, what: str) -> None:
    layout, edit, said = BROKEN[what]
    folder = copy(layout)
    edit(folder)
    problems = check_report(folder).problems
    assert any(said in problem for problem in problems), problems
    with pytest.raises(ValueError, match=str(folder)):
        check(folder)


def test_links_out_of_the_folder_are_refused_and_those_of_a_hub_cache_are_not(copy: Any, tmp_path: Path) -> None:
    folder = copy("static")
    outside = tmp_path / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    assert any("leads out of the folder" in problem for problem in check_report(folder).problems)
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    shutil.copytree(folder, cache / "snapshots" / "abc", symlinks=True)
    (cache / "blobs" / "1234").write_bytes(outside.read_bytes())
    (cache / "snapshots" / "abc" / "model.safetensors").unlink()
    (cache / "snapshots" / "abc" / "model.safetensors").symlink_to("../../blobs/1234")
    assert check_report(cache / "snapshots" / "abc").problems == []


def test_code_of_the_folder_is_not_run(copy: Any) -> None:
    folder = copy("static")
    (folder / "modeling.py").write_text("raise SystemExit('this code was run')")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    report = check_report(folder)
    assert report.problems == []
    assert any("was not run" in said for said in report.warnings)


def test_warnings_have_numbers(tmp_path: Path) -> None:
    write_folder(tmp_path, "static", share=False)
    edit_config(tmp_path, settings("static") | {"ignore": ["lm_head", "re:.*router", "model.nothing"]})
    tensors = read(tmp_path)
    tensors[f"{LAYER}.input_scale"] = torch.tensor([0.001])
    save(tmp_path, tensors | {"model.extra.weight": torch.ones(4)})
    said = "\n".join(check_report(tmp_path).warnings)
    assert "4 groups of layers that vLLM and SGLang compute as one have different weight_scale" in said
    assert " dB at worst" in said
    change = abs(float(torch.tensor(0.001).bfloat16()) / float(torch.tensor(0.001)) - 1)
    assert f"1 scales are no bf16 numbers, to which transformers casts them: {change:.2%} off at worst" in said
    assert "1 groups of layers that are computed as one have different input_scale" in said
    assert "2 ignored names match no module: 'model.nothing', 're:.*router'" in said
    assert "1 tensors belong to no module of the model: 'model.extra.weight'" in said


def test_a_config_that_promises_a_thousand_million_layers_is_not_built(copy: Any) -> None:
    folder = copy("static")
    edit_config(folder, num_hidden_layers=10**9)
    assert any("1,000,000,000 layers" in said for said in check_report(folder).warnings)


def test_no_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_report(tmp_path / "nothing")
