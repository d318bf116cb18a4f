"""SGLang's plug-in: on SGLang's own classes where it is installed, else on stand-ins bound to its record."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from serving import common
from serving.fake_server import fill, numbers

from fp8kernels.export import export
from fp8kernels.export.config import quantization_config
from fp8kernels.export.layout import LayerEntry
from fp8kernels.formats import FORMATS
from fp8kernels.nn.inference import InferenceLinear
from fp8kernels.nn.inference_joined import JoinedLinear
from fp8kernels.serving import load

LAYER = "model.layers.0"
QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
HEADS, KV_HEADS = common.SIZE.heads, common.SIZE.kv_heads
HIDDEN, INTERMEDIATE = common.SIZE.hidden, common.SIZE.intermediate
ENTRY = LayerEntry("hif8", "tensor", "hif8", "tensor", "static", FORMATS["hif8"].target, False)
KEYS = ("weight_codes", "weight_scale", "input_scale")


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of SGLang that a test speaks to, on one rank."""
    if importlib.util.find_spec("sglang") is None:
        from serving import fake_server, sglang_stand_in

        fake_server.install(sglang_stand_in.modules(), monkeypatch)
    for name in ("fp8kernels.integrations.sglang.quantization",):
        monkeypatch.delitem(sys.modules, name, raising=False)
    parallel = importlib.import_module("sglang.srt.runtime_context").get_parallel()
    with parallel.override(tp_size=1, tp_rank=0):
        yield importlib.import_module("sglang.srt.layers")
    sys.modules.pop("fp8kernels.integrations.sglang.quantization", None)


@pytest.fixture(scope="module")
def block_folder(e4m3_block: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("block") / "model"
    export(e4m3_block, folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def row_folder(e4m3_row: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("row") / "model"
    export(e4m3_row, folder, dtype=torch.float32)
    return folder


def config(folder: Path | None = None, layers: dict[str, LayerEntry] | None = None, packed: Any = None) -> Any:
    """What SGLang makes of a folder's config.json, after the plug-in has been found twice."""
    from fp8kernels.integrations.sglang import register

    register()
    register()
    from sglang.srt.layers.quantization import get_quantization_config

    if folder is not None:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    else:
        found = quantization_config(layers or {})
    # SGLang adds these two to what it read.
    return get_quantization_config("fp8kernels").from_config(
        found | {"packed_modules_mapping": packed or {}, "hf_config": None}
    )


def qkv(config: Any, prefix: str = f"{LAYER}.self_attn.qkv_proj") -> Any:
    from sglang.srt.layers.linear import QKVParallelLinear

    return QKVParallelLinear(
        HIDDEN,
        HIDDEN // HEADS,
        HEADS,
        KV_HEADS,
        bias=False,
        params_dtype=torch.bfloat16,
        quant_config=config,
        prefix=prefix,
    )


def gate_up(config: Any) -> Any:
    from sglang.srt.layers.linear import MergedColumnParallelLinear

    return MergedColumnParallelLinear(
        HIDDEN,
        [INTERMEDIATE] * 2,
        bias=False,
        params_dtype=torch.bfloat16,
        quant_config=config,
        prefix=f"{LAYER}.mlp.gate_up_proj",
    )


def row(config: Any, name: str, inputs: int, outputs: int) -> Any:
    from sglang.srt.layers.linear import RowParallelLinear

    return RowParallelLinear(
        inputs, outputs, bias=False, params_dtype=torch.bfloat16, quant_config=config, prefix=f"{LAYER}.{name}"
    )


def served(model: Any, name: str) -> InferenceLinear:
    """A layer of serving, on its own: not the product that it may be part of."""
    found = model.get_submodule(name)
    assert isinstance(found, InferenceLinear), f"{name} is {type(found).__name__}"
    if isinstance(found, JoinedLinear):
        found.joined.dissolve()
    return found


def test_the_plug_in_is_found_and_may_be_called_again(sglang: Any) -> None:
    from fp8kernels.integrations.sglang import register

    register()
    register()
    from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
    from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
    from sglang.srt.layers.quantization.base_config import QuantizationConfig

    assert QUANTIZATION_CHOICES.count("fp8kernels") == 1
    assert issubclass(QUANTIZATION_METHODS["fp8kernels"], QuantizationConfig)
    assert CPU_QUANTIZATION_METHODS["fp8kernels"] is QUANTIZATION_METHODS["fp8kernels"]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", ("native_folder", "row_folder"))
def test_fused_layers_compute_what_serving_computes(
    sglang: Any, kind: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    tensors, model, found = load_file(folder / "model.safetensors"), load(folder), config(folder)
    x = numbers(5, HIDDEN, dtype=dtype)
    for make, parent, parts in (
        (qkv, f"{LAYER}.self_attn", dict(zip(QKV, "qkv", strict=True))),
        (gate_up, f"{LAYER}.mlp", dict(zip(GATE_UP, (0, 1), strict=True))),
    ):
        layer = fill(make(found), tensors, parent, parts)
        out = layer.quant_method.apply(layer, x)
        expected = torch.cat([served(model, f"{parent}.{name}")(x) for name in parts], dim=-1)
        assert out.dtype == dtype and torch.equal(out, expected), f"{parent}: {(out - expected).abs().max()}"


@pytest.mark.parametrize("kind", ("native_folder", "row_folder", "block_folder"))
def test_layers_cut_by_their_inputs_compute_what_serving_computes(
    sglang: Any, kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    tensors, model, found = load_file(folder / "model.safetensors"), load(folder), config(folder)
    for parent, name, inputs in (("self_attn", "o_proj", HIDDEN), ("mlp", "down_proj", INTERMEDIATE)):
        layer = fill(row(found, f"{parent}.{name}", inputs, HIDDEN), tensors, f"{LAYER}.{parent}", {name: None})
        x, bias = numbers(2, 3, inputs), numbers(HIDDEN)
        expected = served(model, f"{LAYER}.{parent}.{name}")(x)
        assert torch.equal(layer.quant_method.apply(layer, x), expected)
        one = served(model, f"{LAYER}.{parent}.{name}")
        one.bias = bias
        assert torch.equal(layer.quant_method.apply(layer, x, bias), one(x))


def test_blocks_of_merged_layers_are_a_grid_again(sglang: Any, block_folder: Path) -> None:
    tensors, model = load_file(block_folder / "model.safetensors"), load(block_folder)
    layer = fill(gate_up(config(block_folder)), tensors, f"{LAYER}.mlp", dict(zip(GATE_UP, (0, 1), strict=True)))
    (run,) = layer.fp8kernels_served.runs
    assert run.scale.shape == (2 * INTERMEDIATE // 128, HIDDEN // 128)
    x = numbers(4, HIDDEN)
    expected = torch.cat([served(model, f"{LAYER}.mlp.{name}")(x) for name in GATE_UP], dim=-1)
    assert torch.equal(layer.quant_method.apply(layer, x), expected)


@pytest.mark.parametrize("kind", ("native_folder", "row_folder"))
def test_ranks_hold_their_parts_and_together_the_whole(sglang: Any, kind: str, request: pytest.FixtureRequest) -> None:
    from sglang.srt.runtime_context import get_parallel

    folder = request.getfixturevalue(kind)
    tensors, model, found = load_file(folder / "model.safetensors"), load(folder), config(folder)
    x, wide = numbers(3, HIDDEN), numbers(3, INTERMEDIATE)
    outs, downs = [], []
    for rank in range(2):
        with get_parallel().override(tp_size=2, tp_rank=rank):
            layer = fill(qkv(found), tensors, f"{LAYER}.self_attn", dict(zip(QKV, "qkv", strict=True)))
            down = row(found, "mlp.down_proj", INTERMEDIATE, HIDDEN)
            fill(down, tensors, f"{LAYER}.mlp", {"down_proj": None})
        outs.append(layer.quant_method.apply(layer, x).split(list(layer.fp8kernels_served.parts), dim=-1))
        half = INTERMEDIATE // 2
        assert torch.equal(
            down.weight_codes.data, tensors[f"{LAYER}.mlp.down_proj.weight_codes"][:, rank * half : (rank + 1) * half]
        )
        downs.append(down.quant_method.apply(down, wide[:, rank * half : (rank + 1) * half].float()))
    for number, name in enumerate(QKV):
        whole = torch.cat([out[number] for out in outs], dim=-1)
        assert torch.equal(whole, served(model, f"{LAYER}.self_attn.{name}")(x)), name
    if kind == "native_folder":  # static inputs: each rank rounds as one would; else each goes by its own part's amax
        expected = served(model, f"{LAYER}.mlp.down_proj")(wide.float())
        bound = (INTERMEDIATE + 2) * 2**-24 * 2  # of |x| @ |w|.T, below, in fp32
        size = wide.float().abs() @ decoded(tensors, f"{LAYER}.mlp.down_proj").abs().T
        assert ((downs[0] + downs[1] - expected).abs() <= bound * 4 * size).all()


def decoded(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    values = torch.tensor(FORMATS["hif8"].values, dtype=torch.float32)
    return values[tensors[f"{name}.weight_codes"].int()] * tensors[f"{name}.weight_scale"]


def test_parts_with_scales_of_their_own_stay_apart(sglang: Any, native_folder: Path) -> None:
    tensors, found = load_file(native_folder / "model.safetensors"), config(native_folder)
    parent = f"{LAYER}.self_attn"
    for factor, name in enumerate(QKV, start=1):  # exact factors, so that nothing else changes
        for key in KEYS[1:]:
            tensors[f"{parent}.{name}.{key}"] = tensors[f"{parent}.q_proj.{key}"] * factor
    layer = fill(qkv(found), tensors, parent, dict(zip(QKV, "qkv", strict=True)))
    assert [run.stop - run.start for run in layer.fp8kernels_served.runs] == list(layer.fp8kernels_served.parts)
    model, x = load(native_folder), numbers(4, HIDDEN)
    expected = []
    for name in QKV:
        one = served(model, f"{parent}.{name}")
        for key in KEYS:
            getattr(one, key).copy_(tensors[f"{parent}.{name}.{key}"])
        expected.append(one(x))
    assert torch.equal(layer.quant_method.apply(layer, x), torch.cat(expected, dim=-1))


def test_new_weights_go_the_way_of_the_first(sglang: Any, native_folder: Path) -> None:
    tensors = load_file(native_folder / "model.safetensors")
    parts = dict(zip(QKV, "qkv", strict=True))
    layer = fill(qkv(config(native_folder)), tensors, f"{LAYER}.self_attn", parts)
    x = numbers(4, HIDDEN)
    before = layer.quant_method.apply(layer, x)
    other = {name.replace("layers.1", "layers.0"): tensor for name, tensor in tensors.items() if "layers.1" in name}
    for name, part in parts.items():  # without process_weights_after_loading: a running server may not call it
        for key in KEYS:
            parameter = getattr(layer, key)
            parameter.weight_loader(parameter, other[f"{LAYER}.self_attn.{name}.{key}"], part)
    after = layer.quant_method.apply(layer, x)
    model = load(native_folder)
    assert not torch.equal(after, before)
    assert torch.equal(after, torch.cat([served(model, f"model.layers.1.self_attn.{name}")(x) for name in QKV], dim=-1))


def test_the_head_is_left_or_read_with_its_padding(sglang: Any, native_folder: Path) -> None:
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    rows, given = 300, {"params_dtype": torch.bfloat16}
    tensors = load_file(native_folder / "model.safetensors")
    name = f"{LAYER}.mlp.up_proj"
    head = {key: tensors[f"{name}.{key}"] for key in KEYS}
    head["weight_codes"] = head["weight_codes"].repeat(2, 1)[:rows]
    found = config(layers={"lm_head": ENTRY})
    layer = ParallelLMHead(rows, HIDDEN, quant_config=found, prefix="lm_head", **given)
    fill(layer, {f"model.lm_head.{key}": tensor for key, tensor in head.items()}, "model", {"lm_head": None})
    out = layer.quant_method.apply(layer, numbers(2, HIDDEN))
    whole = ReplicatedLinear(HIDDEN, rows, bias=False, quant_config=found, prefix="lm_head", **given)
    fill(whole, {f"model.lm_head.{key}": tensor for key, tensor in head.items()}, "model", {"lm_head": None})
    assert out.shape == (2, 320) and not out[:, rows:].any()
    assert torch.equal(out[:, :rows], whole.quant_method.apply(whole, numbers(2, HIDDEN)))
    embedding = object.__new__(VocabParallelEmbedding)
    torch.nn.Module.__init__(embedding)
    assert found.get_quant_method(embedding, "lm_head") is None
    assert config(native_folder).get_quant_method(layer, "lm_head") is None


def test_layers_in_high_precision_are_sglangs_own(sglang: Any) -> None:
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    found = config(layers={"model.layers.1.self_attn.o_proj": ENTRY, f"{LAYER}.mlp.down_proj": ENTRY})
    layer = row(found, "self_attn.o_proj", HIDDEN, HIDDEN)
    assert isinstance(layer.quant_method, UnquantizedLinearMethod) and layer.weight.dtype == torch.bfloat16
    with pytest.raises(
        ValueError, match=r"none of the 8-bit layers .*'model.layers.0.mlp.down_proj'.*self_attn.o_proj"
    ):
        layer.quant_method.process_weights_after_loading(layer)
    row(found, "mlp.down_proj", INTERMEDIATE, HIDDEN)
    layer.quant_method.process_weights_after_loading(layer)  # now the names are the model's


def test_parts_that_are_not_read_alike_are_refused(sglang: Any) -> None:
    parent = f"{LAYER}.self_attn"
    with pytest.raises(ValueError, match=r"qkv_proj.*q_proj: weight hif8 tensor.*v_proj: high precision.*convert"):
        qkv(config(layers={f"{parent}.q_proj": ENTRY, f"{parent}.k_proj": ENTRY}))
    other = LayerEntry("e4m3", "tensor", "e4m3", "tensor", "static", FORMATS["e4m3"].target, False)
    with pytest.raises(ValueError, match=r"q_proj: weight hif8.*v_proj: weight e4m3"):
        qkv(config(layers={f"{parent}.{name}": other if name == "v_proj" else ENTRY for name in QKV}))


def test_layers_fused_in_the_checkpoint_are_one(sglang: Any, native_folder: Path) -> None:
    tensors, parent = load_file(native_folder / "model.safetensors"), f"{LAYER}.mlp"
    fused = {f"{parent}.gate_up_proj.{key}": tensors[f"{parent}.up_proj.{key}"] for key in KEYS}
    fused[f"{parent}.gate_up_proj.weight_codes"] = torch.cat(
        [tensors[f"{parent}.{name}.weight_codes"] for name in GATE_UP]
    )
    layer = gate_up(config(layers={f"{parent}.gate_up_proj": ENTRY}))
    fill(layer, fused, parent, {"gate_up_proj": None})
    apart = fill(gate_up(config(native_folder)), tensors, parent, dict(zip(GATE_UP, (0, 1), strict=True)))
    assert torch.equal(layer.weight_codes, apart.weight_codes)
    (run,) = layer.fp8kernels_served.runs
    assert run.scale.shape == (1, 1) and torch.equal(run.scale, fused[f"{parent}.gate_up_proj.weight_scale"])


@pytest.mark.parametrize("key", KEYS)
def test_a_tensor_that_never_came_is_named(sglang: Any, native_folder: Path, key: str) -> None:
    tensors, found = load_file(native_folder / "model.safetensors"), config(native_folder)
    layer = qkv(found)
    for name, part in zip(QKV, "qkv", strict=True):
        for each in KEYS:
            if (each, part) != (key, "k"):
                parameter = getattr(layer, each)
                parameter.weight_loader(parameter, tensors[f"{LAYER}.self_attn.{name}.{each}"], part)
    with pytest.raises(ValueError, match=rf"qkv_proj: the checkpoint brought no {key} for its parts \[1\]"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_scale_that_decodes_nothing_is_refused(sglang: Any, native_folder: Path) -> None:
    tensors = load_file(native_folder / "model.safetensors")
    tensors[f"{LAYER}.self_attn.k_proj.weight_scale"] *= float("nan")
    with pytest.raises(ValueError, match=r"qkv_proj.*weight_scale holds nan"):
        fill(qkv(config(native_folder)), tensors, f"{LAYER}.self_attn", dict(zip(QKV, "qkv", strict=True)))


def test_blocks_that_ranks_would_cut_are_refused(sglang: Any) -> None:
    from sglang.srt.runtime_context import get_parallel

    blocks = LayerEntry("e4m3", "128x128", "e4m3", "1x128", "current", FORMATS["e4m3"].target, False)
    found = config(layers={f"{LAYER}.self_attn.o_proj": blocks})
    with get_parallel().override(tp_size=2, tp_rank=0), pytest.raises(ValueError, match=r"64 inputs.*128.*fewer ranks"):
        row(found, "self_attn.o_proj", HIDDEN, HIDDEN)


def test_a_config_that_no_layer_can_mean_is_refused(sglang: Any) -> None:
    config(layers={"a": ENTRY})
    from sglang.srt.layers.quantization import get_quantization_config

    with pytest.raises(ValueError, match="version"):
        get_quantization_config("fp8kernels").from_config(quantization_config({"a": ENTRY}) | {"version": 9})
