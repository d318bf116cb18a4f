"""Folders in the layouts of others: what stands in them, and what transformers with compressed-tensors makes of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import common
from torch import Tensor, nn

import fp8kernels
from fp8kernels.export import ExportReport, export
from fp8kernels.export.formats import LAYOUTS
from fp8kernels.formats import E4M3
from fp8kernels.headers import read_headers
from fp8kernels.scaling.delayed import INPUT

pytest.importorskip("compressed_tensors")

Written = dict[str, tuple[Path, ExportReport, dict[str, Tensor]]]
COMPRESSED = [name for name in LAYOUTS if name.startswith("compressed-tensors")]
WHOLE = ("compressed-tensors", "fp8")  # one scale for a weight
MOST_LOST = 1.0  # dB; HiF8 and E4M3 have the same three bits of mantissa near amax, where most of the signal is


def read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def high(layout: str) -> list[str]:
    """Linear layers in high precision: k and v of 64 rows fill no block of 128, and servers join q with them."""
    parts = "qkv" if layout == "compressed-tensors-block" else ""
    return [f"model.layers.{i}.self_attn.{part}_proj" for i in range(common.SIZE.layers) for part in parts] + [
        "lm_head"
    ]


def decoded(tensors: dict[str, Tensor], name: str) -> Tensor:
    """code * scale of one layer, fp32 [N, K], by torch alone."""
    weight, scale = tensors[f"{name}.weight"].float(), tensors[f"{name}.weight_scale"]
    rows, columns = weight.shape
    if scale.numel() == 1 or scale.shape == (rows, 1):
        return weight * scale
    return weight * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


@pytest.fixture(scope="module")
def written(hif8: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """One model in every layout, high precision kept in fp32."""
    found = {}
    for name in LAYOUTS:
        folder = tmp_path_factory.mktemp("layouts") / name
        report = export(hif8, folder, format=name, tokenizer=tokenizer, dtype=torch.float32)
        found[name] = folder, report, read(folder)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_have_the_names_shapes_and_dtypes_of_the_layout(layout: str, written: Written, hif8: Any) -> None:
    folder, report, _ = written[layout]
    layers = {n: m for n, m in hif8.named_modules() if isinstance(m, fp8kernels.nn.Linear)}
    for name in high(layout)[:-1]:
        del layers[name]
    assert list(report.layers) == list(layers)
    expected = {}
    for name, layer in layers.items():
        rows, columns = layer.weight.shape
        blocks = (math.ceil(rows / 128), math.ceil(columns / 128))
        scale = {"tensor": (1,), "row": (rows, 1), "128x128": blocks}[LAYOUTS[layout].block]
        expected[f"{name}.weight"] = ("F8_E4M3", (rows, columns))
        expected[f"{name}.weight_scale"] = ("F32", scale)
        if layout in WHOLE:
            expected[f"{name}.input_scale"] = ("F32", (1,))
    for name, parameter in hif8.named_parameters():
        if name.removesuffix(".weight") not in layers:
            expected[name] = ("F32", tuple(parameter.shape))
    found = {name: (header.dtype, header.shape) for name, header in read_headers(folder).items()}
    assert found == expected
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(report.files)
    assert sorted(path.name for path in folder.iterdir()) == sorted(report.files)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_scale_is_exact_in_bf16_and_shared_where_servers_fuse(layout: str, written: Written) -> None:
    _, report, tensors = written[layout]
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale")}
    assert scales
    for name, scale in scales.items():
        assert torch.equal(scale, scale.to(torch.bfloat16).float()), name
        assert bool((scale > 0).all()), name
    if layout in WHOLE:
        groups = [
            (f"model.layers.{i}.{parent}", parts)
            for i in range(common.SIZE.layers)
            for parent, parts in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
        ]
        for parent, parts in groups:
            for key in ("weight_scale", "input_scale"):
                assert len({float(tensors[f"{parent}.{part}.{key}"]) for part in parts}) == 1, (parent, key)
        assert report.shared == tuple(tuple(f"{parent}.{part}" for part in parts) for parent, parts in groups)
    else:
        assert report.shared == ()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_the_trained_ones_rounded_once(layout: str, written: Written, hif8: Any) -> None:
    _, report, tensors = written[layout]
    for name in report.layers:
        weight = hif8.get_submodule(name).weight.detach()
        found, scale = decoded(tensors, name), tensors[f"{name}.weight_scale"].max()
        error = (found - weight).abs()
        assert bool((error <= torch.maximum(weight.abs() * 2.0**-4, scale * 2.0**-10)).all()), name
        assert float(found.abs().max()) <= float(weight.abs().max()) * (1 + 2.0**-4), "nothing is cut"


def test_static_input_scales_are_the_trained_ones(written: Written, hif8: Any, e4m3: Any, tmp_path: Path) -> None:
    """The amax that the history knows lands at 448, less what rounding the scale up to bf16 takes (2**-7)."""
    _, _, tensors = written["compressed-tensors"]
    export(e4m3, tmp_path / "e4m3", format="compressed-tensors")
    for model, found in ((hif8, tensors), (e4m3, read(tmp_path / "e4m3"))):
        for name, layer in model.named_modules():
            if not isinstance(layer, fp8kernels.nn.Linear):
                continue
            known = float(layer.fp8_history[INPUT].max())
            lands = known / float(found[f"{name}.input_scale"])
            if not name.endswith(("k_proj", "q_proj", "v_proj", "gate_proj", "up_proj")):
                assert E4M3.max * (1 - 2.0**-7) <= lands <= E4M3.max * (1 + 1e-6), name
            else:
                assert lands <= E4M3.max * (1 + 1e-6), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_report_says_what_each_layer_loses(layout: str, written: Written, hif8: Any) -> None:
    from fp8kernels.console import console

    _, report, tensors = written[layout]
    for name, layer in report.layers.items():
        weight = hif8.get_submodule(name).weight.detach().double()
        signal, noise = weight.square().sum(), (weight - decoded(tensors, name).double()).square().sum()
        assert layer.written == pytest.approx(10 * math.log10(float(signal / noise)), abs=1e-6)
        q = fp8kernels.quantize(weight.float(), "hif8", scale=float(hif8.get_submodule(name).fp8_scale[1]))
        noise = (weight - q.dequantize().double()).square().sum()
        assert layer.trained == pytest.approx(10 * math.log10(float(signal / noise)), abs=1e-6)
        assert layer.lost < MOST_LOST, f"{name} loses {layer.lost:.2f} dB"
    assert list(report.kept) == high(layout)
    assert report.kept["lm_head"] == "not converted"
    screen = console()
    with screen.capture() as captured:
        screen.print(report.table())
    said = captured.get()
    for word in ("model.layers.*.mlp.down_proj", "dB", "lm_head", "not converted", "hif8"):
        assert word in said


def test_config_json_in_the_words_of_the_loaders(written: Written) -> None:
    """By compressed-tensors' own class, and for fp8 by the keys of vLLM's Fp8Config."""
    from compressed_tensors.quantization import QuantizationConfig

    for name in COMPRESSED:
        config = json.loads((written[name][0] / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["dtype"] == "float32"
        settings = QuantizationConfig.model_validate(config["quantization_config"])
        (scheme,) = settings.config_groups.values()
        fused = [f"{one.removesuffix('q_proj')}qkv_proj" for one in high(name) if one.endswith("q_proj")]  # for SGLang
        assert (settings.format, settings.ignore) == ("float-quantized", high(name) + fused)
        assert scheme.targets == ["Linear"]
        assert (
            scheme.weights.strategy == {"tensor": "tensor", "row": "channel", "128x128": "block"}[LAYOUTS[name].block]
        )
        assert scheme.input_activations.dynamic is (name != "compressed-tensors")
    config = json.loads((written["fp8"][0] / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("layout", COMPRESSED)
def test_transformers_computes_what_the_file_says(
    layout: str, dtype: torch.dtype, written: Written, prompt_ids: Tensor
) -> None:
    """Names fit, decoded weights are ours bit for bit, and so are logits in fp32, where transformers' linear layers
    round inputs by the static scale (or by their own amax) and multiply by decoded weights.
    """
    from transformers import AutoModelForCausalLM

    folder, report, tensors = written[layout]
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert {key: list(found) for key, found in info.items() if found} == {}
    with torch.no_grad():
        logits = loaded(prompt_ids).logits  # the first forward decodes the weights
    for name in report.layers:
        layer = loaded.get_submodule(name)
        assert torch.equal(layer.weight, decoded(tensors, name).to(dtype)), name
        for key in ("weight_scale", "input_scale"):
            if (scale := getattr(layer, key, None)) is not None:
                assert torch.equal(scale.float(), tensors[f"{name}.{key}"]), f"{name}.{key} was rounded by the loader"
    if dtype == torch.float32:
        reference = emulated(layout, tensors, report)
        with torch.no_grad():
            assert torch.equal(logits, reference(prompt_ids).logits)


def test_the_static_scale_decides_what_transformers_computes(
    written: Written, prompt_ids: Tensor, tmp_path: Path
) -> None:
    """input_scale is not ignored there: with scales a thousand times as large most inputs become 0."""
    import shutil

    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder, _, tensors = written["compressed-tensors"]
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    wrong = {
        name: tensor * (1024 if name.endswith("input_scale") else 1)
        for name, tensor in tensors.items()
        if tensor.dtype != torch.float8_e4m3fn
    }
    save_file({**tensors, **wrong}, changed / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        right, other = (AutoModelForCausalLM.from_pretrained(f)(prompt_ids).logits for f in (folder, changed))
    assert not torch.equal(right, other)


class Rounded(nn.Module):
    """A linear layer whose inputs are rounded to E4M3 first, in the order that compressed-tensors computes in."""

    def __init__(self, linear: nn.Linear, inputs: str, scale: Tensor | None) -> None:
        super().__init__()
        self.linear, self.inputs, self.scale = linear, inputs, scale

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.unflatten(-1, (-1, 128)) if self.inputs == "group" else x
        scale = grouped.abs().amax(-1, keepdim=True) / E4M3.max if self.scale is None else self.scale
        codes = (grouped / scale).clamp(-E4M3.max, E4M3.max).to(torch.float8_e4m3fn)
        return self.linear((codes.to(x.dtype) * scale).view_as(x))


def emulated(layout: str, tensors: dict[str, Tensor], report: ExportReport) -> Any:
    """The plain model with decoded weights, its 8-bit layers' inputs rounded; fp32."""
    model = common.plain().eval()
    state = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale")}
    state.update({f"{name}.weight": decoded(tensors, name) for name in report.layers})
    model.load_state_dict(state)
    for name in report.layers:
        linear = model.get_submodule(name)
        model.set_submodule(name, Rounded(linear, LAYOUTS[layout].inputs, tensors.get(f"{name}.input_scale")))
    return model


def test_serving_load_reads_every_layout(written: Written, prompt_ids: Tensor, hif8: Any) -> None:
    """In 8-bit layers of ours, with logits near those of the trained model."""
    from fp8kernels.nn.inference import InferenceLinear

    with torch.no_grad():
        wanted = hif8(prompt_ids).logits.double()
        for name, (folder, report, _) in written.items():
            loaded = fp8kernels.serving.load(folder)
            assert any(isinstance(module, InferenceLinear) for module in loaded.modules()), name
            noise = (loaded(prompt_ids).logits.double() - wanted).square().sum()
            found = 10 * math.log10(float(wanted.square().sum() / noise))
            assert found > 20, f"{name}: {found:.1f} dB between the trained model and what is served"
            assert report.format == name


def test_shards_and_their_index(hif8: Any, tmp_path: Path, prompt_ids: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    export(hif8, whole, format="compressed-tensors", dtype=torch.float32)
    report = export(hif8, parts, format="compressed-tensors", dtype=torch.float32, max_shard_size="200KB")
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert set(shards) <= set(report.files)
    assert all((parts / shard).stat().st_size < 250_000 for shard in shards)
    one, many = read(whole), read(parts)
    assert index["weight_map"].keys() == one.keys() == many.keys()
    assert all(torch.equal(one[name].view(torch.uint8), many[name].view(torch.uint8)) for name in one)
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(folder)(prompt_ids).logits for folder in (whole, parts))
    assert torch.equal(a, b)


def test_scales_of_an_8_bit_cache_travel_with_the_file(hif8: Any, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    scales = {f"model.layers.{i}.self_attn": (0.1, 0.2) for i in range(common.SIZE.layers)}
    export(hif8, tmp_path / "out", format="compressed-tensors", cache_scales=scales)
    tensors = read(tmp_path / "out")
    for name, pair in scales.items():
        for key, scale in zip(("k_scale", "v_scale"), pair, strict=True):
            found = tensors[f"{name}.{key}"]
            assert found.shape == (1,)
            assert scale <= float(found) <= scale * (1 + 2.0**-7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).kv_cache_scheme
    assert scheme is not None
    assert (scheme.num_bits, scheme.strategy, scheme.dynamic) == (8, "tensor", False)


@pytest.mark.parametrize("layout", WHOLE)
def test_codes_of_small_weights_survive_the_servers_own_rounding(layout: str, hif8: Any, tmp_path: Path) -> None:
    """vLLM and SGLang decode weights with one scale in fp16 and round them again, as is done here by hand."""
    model = copy.deepcopy(hif8)
    names = [name for name, module in model.named_modules() if isinstance(module, fp8kernels.nn.Linear)]
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).weight
            weight *= 1e-3 / weight.abs().max()  # amax / 448 is 2.2e-6, fp16's smallest number 6e-8
    report = export(model, tmp_path / "out", format=layout)
    tensors = read(tmp_path / "out")
    for name in names:
        codes, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        decoded_once = codes.to(torch.float16) * scale[0]  # [N, K] fp16
        again = (decoded_once.float() / scale).clamp(-E4M3.max, E4M3.max).to(torch.float8_e4m3fn)
        assert torch.equal(again.float(), codes.float()), name
        assert report.layers[name].lost < MOST_LOST


def test_the_model_is_left_as_it_was(hif8: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(hif8).train()
    before = copy.deepcopy(model.state_dict())
    for name in LAYOUTS:
        export(model, tmp_path / name, format=name)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
