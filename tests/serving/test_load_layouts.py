"""Every layout of 8-bit checkpoints becomes layers that hold the file's own bytes, and computes what they mean."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from serving.folders import LAYOUTS, SIZE, edit_config, write_folder
from torch import Tensor

from fp8kernels.export import export
from fp8kernels.formats import E4M3
from fp8kernels.models.llama import LlamaSize
from fp8kernels.nn.inference import InferenceLinear
from fp8kernels.serving import load
from fp8kernels.telemetry import sqnr_db

LAYERS = 7 * SIZE.layers
EDGE = 128
FLOAT8 = torch.float8_e4m3fn


def layers_of(model: torch.nn.Module) -> dict[str, InferenceLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, InferenceLinear)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_are_the_bytes_of_the_file_and_nothing_is_decoded(layout: str, tmp_path: Path) -> None:
    write_folder(tmp_path, layout)
    model = load(tmp_path)
    layers, stored = layers_of(model), load_file(tmp_path / "model.safetensors")
    assert len(layers) == LAYERS
    for name, layer in layers.items():
        weight = stored[f"{name}.weight"]
        assert weight.dtype == FLOAT8
        assert torch.equal(layer.weight_codes, weight.view(torch.uint8))
        assert not hasattr(layer, "weight")
        assert layer.weight_scale.dtype == layer.input_scale.dtype == torch.float32
    size = sum(tensor.nbytes for tensor in stored.values())
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert held <= size + 4 * LAYERS, f"{held} bytes in memory, {size} in the file and an input_scale a layer"


def expand(scale: Tensor, shape: torch.Size, *, rows: int, columns: int) -> Tensor:
    """A scale for each element: [N, K] of a grid whose patches have so many rows and columns."""
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x as E4M3 with these scales, in fp64; torch's own cast rounds."""
    return (x / scale).clamp(-E4M3.max, E4M3.max).to(FLOAT8).double() * scale.double()


def reference(layout: str, x: Tensor, name: str, stored: dict[str, Tensor]) -> Tensor:
    """What the file says the layer computes: decoded weights times rounded inputs, summed in fp64."""
    weight = stored[f"{name}.weight"].double()  # [N, K]
    scale = stored[f"{name}.weight_scale_inv" if layout == "fp8-block" else f"{name}.weight_scale"].double()
    if "block" in layout:
        weight = weight * expand(scale, weight.shape, rows=EDGE, columns=EDGE)
        groups = x.reshape(len(x), -1, EDGE)  # [M, K / 128, 128]
        amax = groups.abs().amax(-1, keepdim=True)
        return rounded(groups, amax / E4M3.max).reshape(x.shape) @ weight.T
    weight = weight * (scale if scale.ndim == 2 else scale.reshape(1, 1))
    if layout == "dynamic":
        return rounded(x, x.abs().amax(-1, keepdim=True) / E4M3.max) @ weight.T
    return rounded(x, stored[f"{name}.input_scale"].float().reshape(1, 1)) @ weight.T


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_computes_what_its_file_says(layout: str, tmp_path: Path) -> None:
    write_folder(tmp_path, layout)
    layers, stored = layers_of(load(tmp_path)), load_file(tmp_path / "model.safetensors")
    torch.manual_seed(0)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        x = torch.randn(5, layers[name].in_features)
        wanted = reference(layout, x, name, stored)
        found = layers[name](x).double()
        size = (x.abs().double() @ layers[name].weight_codes.view(FLOAT8).double().abs().T).amax()
        bound = (x.shape[1] + 2) * 2.0**-24 * wanted.abs().amax() + 2.0**-24 * size  # fp32 sums (Higham 2002, 3.1)
        worst = (found - wanted).abs().amax()
        assert worst <= bound, f"{layout} {name}: {worst:.3g} from the reference, {bound:.3g} allowed"


def test_the_dtype_that_the_files_name_is_that_of_the_rest_of_the_model(tmp_path: Path) -> None:
    write_folder(tmp_path, "static")
    model = load(tmp_path)
    assert model.dtype == torch.bfloat16
    tokens = torch.arange(8)[None]
    assert bool(torch.isfinite(model(tokens).logits).all())
    assert not any(tensor.requires_grad for tensor in model.parameters())
    assert not model.training


def rewrite(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Change the tensors of a folder, in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=["0-d", "1-d", "2-d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_any_float_dtype_and_shape_mean_the_same(shape, dtype: torch.dtype, tmp_path: Path) -> None:
    write_folder(tmp_path, "static")
    rewrite(
        tmp_path,
        lambda tensors: tensors.update(
            {
                name: tensor.to(torch.bfloat16).to(dtype).reshape(shape)
                for name, tensor in tensors.items()
                if name.endswith("_scale")
            }
        ),
    )
    scales = {name: tensor.float() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    layer = layers_of(load(tmp_path))[Q]
    assert layer.weight_scale.shape == layer.input_scale.shape == (1, 1)
    assert float(layer.weight_scale) == float(scales[f"{Q}.weight_scale"])
    assert float(layer.input_scale) == float(scales[f"{Q}.input_scale"])


def test_blocks_that_end_within_a_weight_are_read_row_by_row(tmp_path: Path) -> None:
    """A weight of 192 rows has two rows of blocks, the second for 64 of them."""
    write_folder(
        tmp_path, "block", size=LlamaSize(vocab=64, hidden=128, intermediate=256, layers=1, heads=2, context=32)
    )
    edit_config(tmp_path, intermediate_size=192)
    mlp = "model.layers.0.mlp"

    def resize(tensors: dict[str, Tensor]) -> None:
        torch.manual_seed(0)
        for name in (f"{mlp}.gate_proj", f"{mlp}.up_proj"):
            tensors[f"{name}.weight"] = torch.randn(192, 128).to(FLOAT8)
            tensors[f"{name}.weight_scale"] = torch.rand(2, 1) + 0.5
        del tensors[f"{mlp}.down_proj.weight_scale"]
        tensors[f"{mlp}.down_proj.weight"] = torch.randn(128, 192).to(torch.bfloat16)

    rewrite(tmp_path, resize)
    layer = layers_of(load(tmp_path))[f"{mlp}.gate_proj"]
    assert layer.weight_role.block == "1x128"
    stored = load_file(tmp_path / "model.safetensors")
    x = torch.randn(3, 128)
    wanted = reference("block", x, f"{mlp}.gate_proj", stored)
    assert torch.allclose(layer(x).double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def put(name: str, tensor: Tensor):  # type: ignore[no-untyped-def]
    return lambda tensors: tensors.__setitem__(name, tensor)


SPOILT = {
    "zero": (put(f"{Q}.weight_scale", torch.zeros(1)), rf"{Q}.weight_scale holds 0"),
    "nan": (put(f"{Q}.input_scale", torch.full((1,), float("nan"))), rf"{Q}.input_scale holds nan"),
    "negative": (put(f"{Q}.weight_scale", -torch.ones(1)), rf"{Q}.weight_scale holds -1"),
    "no scale": (lambda tensors: tensors.pop(f"{Q}.weight_scale"), rf"{Q}.weight .*0 of the scales"),
    "no input scale": (lambda tensors: tensors.pop(f"{Q}.input_scale"), rf"{Q}: its inputs are static"),
    "scale of rows": (put(f"{Q}.weight_scale", torch.ones(128, 1)), rf"{Q}.weight_scale has shape \[128, 1\]"),
    "other shape": (put(f"{Q}.weight", torch.zeros(64, 128).to(FLOAT8)), "another shape"),
    "renamed": (lambda tensors: tensors.update({"x.weight": tensors.pop("model.norm.weight")}), r"model\.norm\.weight"),
    "left over": (put("model.extra", torch.zeros(2)), r"model\.extra"),
    "packed": (put(f"{Q}.weight_packed", torch.zeros(2, dtype=torch.int32)), "weight_packed"),
    "e5m2": (put(f"{Q}.weight", torch.zeros(128, 128).to(torch.float8_e5m2)), "F8_E5M2"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_broken_folder_is_refused_with_the_reason(case: str, tmp_path: Path) -> None:
    write_folder(tmp_path, "static")
    change, match = SPOILT[case]
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=match):
        load(tmp_path)


def test_a_file_that_is_cut_short_is_refused_before_it_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path, "dynamic")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda found: found.update(quant_method="gptq"), "gptq"),
        (lambda found: found.update(config_groups={}), "config_groups"),
        (lambda found: found["config_groups"]["group_0"].update(input_activations=None), "weights alone"),
        (lambda found: found["config_groups"]["group_0"]["weights"].update(num_bits=4), "4 bits"),
        (lambda found: found["config_groups"]["group_0"]["weights"].update(strategy="channel"), r"\[128, 1\]"),
    ],
    ids=["method", "groups", "weights-only", "4-bit", "contradicts"],
)
def test_a_config_that_no_layer_can_follow_is_refused(change, match: str, tmp_path: Path) -> None:
    write_folder(tmp_path, "static")
    config = json.loads((tmp_path / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match) as refused:
        load(tmp_path)
    assert re.search(re.escape(str(tmp_path)), str(refused.value)), "the message says which folder"


def test_every_format_of_export_comes_back(hif8, prompt_ids, tmp_path: Path) -> None:
    with torch.no_grad():
        trained = hif8(prompt_ids).logits
    for fmt in ("native", "compressed-tensors", "compressed-tensors-dynamic", "compressed-tensors-block", "fp8"):
        report = export(hif8, tmp_path / fmt, format=fmt)
        written = report.layers if report.manifest is None else report.manifest.layers
        model = load(tmp_path / fmt, head="e4m3")
        assert len(written) >= LAYERS - 6, "keys and values of 64 rows have no blocks of 128, and q goes with them"
        assert sorted(layers_of(model)) == sorted([*written, "lm_head"])
        with torch.no_grad():
            noise = sqnr_db(trained, model(prompt_ids).logits)
        assert noise > 20, f"{fmt}: {noise:.1f} dB from the trained model"


def test_shards_are_read_like_one_file(tmp_path: Path) -> None:
    write_folder(tmp_path / "one", "static")
    write_folder(tmp_path / "two", "static")
    path = tmp_path / "two" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        names = sorted(file.keys())
    tensors = load_file(path)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, path.with_name(shard), metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    path.unlink()
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "one")(tokens).logits, load(tmp_path / "two")(tokens).logits)
