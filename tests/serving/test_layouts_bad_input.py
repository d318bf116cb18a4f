"""What export refuses, in words that name the layer and the way out; and a disk that fills leaves nothing behind."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import common
from torch import nn

from fp8kernels.convert import convert
from fp8kernels.export import calibrate, check, export
from fp8kernels.export import files as files_module
from fp8kernels.export.formats import FORMATS, LAYOUTS
from fp8kernels.export.requantize import bf16_exact, weight_amax, weight_scale
from fp8kernels.nn import Linear
from fp8kernels.recipe import RECIPES, get_recipe
from fp8kernels.scaling.delayed import INPUT, WEIGHT

STATIC = [name for name, layout in LAYOUTS.items() if layout.static]
IDS = torch.arange(12)[None]  # [1, 12]
NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("format", FORMATS)
def test_an_unconverted_model_says_convert_and_calibrate(format: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"convert\(model\)"):
        export(common.plain(), tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", STATIC)
def test_a_model_that_never_trained_says_calibrate_or_dynamic(format: str, tmp_path: Path) -> None:
    model = convert(common.plain(), "hif8-qat", verbose=False)
    with pytest.raises(ValueError, match=r"model\.layers\.0\..*has no input scale.*calibrate.*-dynamic"):
        export(model, tmp_path / "out", format=format)
    calibrate(model, [IDS])
    assert export(model, tmp_path / "out", format=format).layers
    export(convert(common.plain(), "hif8-qat", verbose=False), tmp_path / "dyn", format="compressed-tensors-dynamic")


@pytest.mark.parametrize("recipe", [name for name, r in RECIPES.items() if r.high_precision_blocks == (0, 0)])
@pytest.mark.parametrize("format", FORMATS)
def test_every_recipe_fits_a_format_or_hears_which_one_fits(recipe: str, format: str, tmp_path: Path) -> None:
    model = convert(common.plain(), recipe, verbose=False)
    role = get_recipe(recipe).input
    if role.scaling != "current":
        calibrate(model, [IDS])
    if format in STATIC and role.scaling == "current":
        fits = "compressed-tensors-block" if role.block == "1x128" else "compressed-tensors-dynamic"
        with pytest.raises(ValueError, match=rf"their own amax \({role.block}\).*format='{fits}'"):
            export(model, tmp_path / "out", format=format)
        assert not list(tmp_path.iterdir())
        assert export(model, tmp_path / "fits", format=fits).layers
        calibrate(model, [IDS])
    report = export(model, tmp_path / "out", format=format)
    count = len(report.layers) if report.manifest is None else len(report.manifest.layers)
    converted = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    high = [name for name in converted if name in report.kept]
    assert count == len(converted) - len(high)
    # 64 rows of keys and values: blocks of 128 do not fit them, and what servers join with them stays beside them
    blocks = format == "compressed-tensors-block" or recipe == "e4m3-block128"
    uneven = [f"{name}_proj" for name in "qkv"] if blocks and format != "native" else []
    assert {name.rpartition(".")[2] for name in high} == {name for name in uneven if any(name in c for c in converted)}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(format: str, number: float, hif8: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(hif8)
    with torch.no_grad():
        model.get_submodule(NAME).weight[3, 5] = number
    with pytest.raises(ValueError, match=rf"{NAME}\.weight .*1 values that are NaN or Inf"):
        export(model, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("row", "role"), [(INPUT, "input"), (WEIGHT, "weight")])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_no_numbers(format: str, row: int, role: str, number: float, hif8: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(hif8)
    model.get_submodule(NAME).fp8_scale[row] = number
    with pytest.raises(ValueError, match=rf"the {role} scale of layer '{NAME}' is {number}"):
        export(model, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", STATIC)
def test_a_static_scale_of_0_names_the_layer(format: str, hif8: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(hif8)
    model.get_submodule(NAME).fp8_scale[INPUT] = 0.0
    with pytest.raises(ValueError, match=rf"{NAME}.*it is 0.*calibrate"):
        export(model, tmp_path / "out", format=format)


def test_a_weight_of_zeros_has_a_scale(hif8: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = copy.deepcopy(hif8)
    nn.init.zeros_(model.get_submodule(NAME).weight)
    for layout in LAYOUTS:
        export(model, tmp_path / layout, format=layout)
        tensors = load_file(tmp_path / layout / "model.safetensors")
        assert bool((tensors[f"{NAME}.weight_scale"] == 1).all())
        assert not tensors[f"{NAME}.weight"].view(torch.uint8).any()


def test_a_layer_that_fell_back_stays_in_high_precision(hif8: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(hif8)
    model.get_submodule(NAME).fp8_high = True
    report = export(model, tmp_path / "out", format="compressed-tensors")
    assert "fallen back" in report.kept[NAME]
    assert NAME not in report.layers


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"format": "compressed-tensor"}, "did you mean 'compressed-tensors'"),
        ({"format": "gguf"}, "known are 'native'"),
        ({"dtype": torch.float16}, "float16"),
        ({"format": "fp8", "max_shard_size": "many"}, "max_shard_size='many'"),
        ({"format": "fp8", "cache_scales": {}}, "cache_scales belong"),
        ({"format": "compressed-tensors", "cache_scales": {"model.attn": (1.0, 1.0)}}, r"model\.attn"),
        ({"format": "compressed-tensors", "cache_scales": {"model.norm": (1.0, 0.0)}}, "v_scale of 'model.norm' is 0"),
    ],
)
def test_arguments_that_mean_nothing(arguments: dict[str, Any], match: str, hif8: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        export(hif8, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_an_export_that_breaks_off_leaves_the_old_folder_and_nothing_else(
    format: str, error: BaseException, hif8: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    export(hif8, tmp_path / "old", format=format)
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}

    def save(tensors: Any, path: Path, **rest: Any) -> None:
        Path(path).write_bytes(b"the first half of it")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    for name in ("old", "new"):
        with pytest.raises(type(error)):
            export(hif8, tmp_path / name, format=format)
    assert {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    assert os.listdir(tmp_path) == ["old"]


FULL = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from serving import common
from fp8kernels.convert import convert
from fp8kernels.export import calibrate, export
import torch
model = convert(common.plain(), "hif8-qat", verbose=False)
calibrate(model, [torch.arange(8)[None]])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
try:
    export(model, {out!r}, format={format!r}, max_shard_size="40KB")
except OSError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_a_file_that_the_system_cuts_off(format: str, tmp_path: Path) -> None:
    """The system itself stops a file in the middle of the weights (a limit on sizes, as a full disk would)."""
    code = FULL.format(tests=str(Path(__file__).parent.parent), out=str(tmp_path / "out"), format=format)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused:")
    assert not list(tmp_path.iterdir())


def test_only_folders_of_ours_are_replaced(hif8: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for format in (*FORMATS, "native"):
        export(hif8, out, format=format)
    assert check(out).recipe == "hif8-qat"
    from safetensors.torch import save_file

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file({"weight": torch.zeros(2)}, theirs / "model.safetensors", metadata={"format": "pt"})
    for format in FORMATS:
        with pytest.raises(FileExistsError, match="theirs"):
            export(hif8, theirs, format=format)
    assert [path.name for path in theirs.iterdir()] == ["model.safetensors"]
    (theirs / "model.safetensors").write_bytes(b"no such file")
    assert not files_module.is_ours(theirs)


def test_bf16_exact_is_the_next_number_that_bf16_holds() -> None:
    values = torch.tensor([1.0, 1.0 + 2.0**-20, 2.055e-4, 3.0e38, 2.0**-126, 0.1])
    found = bf16_exact(values)
    assert torch.equal(found, found.to(torch.bfloat16).float())
    assert bool((found >= values).all())
    assert bool((found <= values * (1 + 2.0**-7)).all())
    assert float(found[0]) == 1.0


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (130, 5), (256, 128)])
@pytest.mark.parametrize("block", ["tensor", "row", "128x128"])
def test_amaxes_and_scales_of_blocks_that_do_not_divide(shape: tuple[int, int], block: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    amax = weight_amax(weight, block)
    height, width = {"tensor": shape, "row": (1, shape[1]), "128x128": (128, 128)}[block]
    for i in range(amax.shape[0]):
        for j in range(amax.shape[1]):
            patch = weight[i * height : (i + 1) * height, j * width : (j + 1) * width]
            assert float(amax[i, j]) == float(patch.abs().max())
    assert amax.shape == (-(-shape[0] // height), -(-shape[1] // width))
    assert bool((amax / weight_scale(amax, 448.0) <= 448.0).all()), "nothing saturates"
