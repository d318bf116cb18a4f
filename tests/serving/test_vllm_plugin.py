"""vLLM's plug-in: on vLLM's own classes where it is installed, else on stand-ins bound to its record."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
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
from fp8kernels.serving import load

CONFIG = "fp8kernels.integrations.vllm.config"
LAYER = "model.layers.0"
QKV, GATE_UP = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}, {"gate_proj": 0, "up_proj": 1}
PACKED = {"qkv_proj": list(QKV), "gate_up_proj": list(GATE_UP)}
HIDDEN, INTERMEDIATE = common.SIZE.hidden, common.SIZE.intermediate
HIF8 = LayerEntry("hif8", "tensor", "hif8", "tensor", "static", FORMATS["hif8"].target, False)
E4M3 = LayerEntry("e4m3", "tensor", "e4m3", "tensor", "static", FORMATS["e4m3"].target, False)
BLOCKS = LayerEntry("e4m3", "128x128", "e4m3", "1x128", "current", FORMATS["e4m3"].target, False)
KEYS = ("weight_codes", "weight_scale", "input_scale")
PORT = 29573  # of vLLM's process group of one


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's linear layers, on one rank."""
    monkeypatch.delitem(sys.modules, CONFIG, raising=False)
    if importlib.util.find_spec("vllm") is None:
        from serving import fake_server, vllm_stand_in

        fake_server.install(vllm_stand_in.modules(), monkeypatch)
        yield importlib.import_module("vllm.model_executor.layers.linear")
    else:
        with _own_config():
            yield importlib.import_module("vllm.model_executor.layers.linear")
    sys.modules.pop(CONFIG, None)


def _own_config() -> Any:
    """What vLLM's own layers need around them."""
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    found = VllmConfig()
    if not torch.distributed.is_initialized():
        with set_current_vllm_config(found):
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{PORT}", 0, backend="gloo")
            initialize_model_parallel(1)
    return set_current_vllm_config(found)


@pytest.fixture
def ranks(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Layers made after ranks(rank, size) are those of that rank."""

    def be(rank: int, size: int) -> None:
        monkeypatch.setattr(vllm, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(vllm, "get_tensor_model_parallel_world_size", lambda: size)

    return be


@pytest.fixture(scope="module")
def folders(
    native_folder: Path, e4m3_row: Any, e4m3_block: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Native checkpoints, one for each block of weights."""
    made = {"tensor": native_folder}
    for name, model in (("row", e4m3_row), ("128x128", e4m3_block)):
        made[name] = tmp_path_factory.mktemp(name) / "model"
        export(model, made[name], dtype=torch.float32)
    return made


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    """What serving makes of the folders: the numbers to compare with."""
    return {name: load(folder) for name, folder in folders.items()}


def config(source: Path | dict[str, LayerEntry]) -> Any:
    """What vLLM makes of a folder's config.json, after the plug-in has been loaded twice."""
    from fp8kernels.integrations.vllm import register

    register()
    register()
    from vllm.model_executor.layers.quantization import get_quantization_config

    if isinstance(source, Path):
        settings = json.loads((source / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    else:
        settings = quantization_config(source)
    found = get_quantization_config(settings["quant_method"]).from_config(settings)
    found.packed_modules_mapping.update(PACKED)  # as vLLM's model classes do
    return found


def qkv(found: Any) -> Any:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    heads, kv_heads = common.SIZE.heads, common.SIZE.kv_heads
    return QKVParallelLinear(
        HIDDEN, HIDDEN // heads, heads, kv_heads, bias=False, quant_config=found, prefix=f"{LAYER}.self_attn.qkv_proj"
    )


def gate_up(found: Any) -> Any:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    return MergedColumnParallelLinear(
        HIDDEN, [INTERMEDIATE] * 2, bias=False, quant_config=found, prefix=f"{LAYER}.mlp.gate_up_proj"
    )


def row(found: Any, name: str, inputs: int) -> Any:
    from vllm.model_executor.layers.linear import RowParallelLinear

    return RowParallelLinear(inputs, HIDDEN, bias=False, quant_config=found, prefix=f"{LAYER}.{name}")


def served(model: Any, name: str) -> InferenceLinear:
    found = model.get_submodule(name)
    assert isinstance(found, InferenceLinear), f"{name} is {type(found).__name__}"
    return found


def test_vllm_finds_the_plug_in_by_its_entry_point(vllm: Any) -> None:
    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    from fp8kernels.integrations.vllm import register

    (found,) = importlib.metadata.entry_points(group=DEFAULT_PLUGINS_GROUP, name="fp8kernels")
    assert found.value == "fp8kernels.integrations.vllm:register"
    assert found.load() is register


def test_registering_again_changes_nothing(vllm: Any) -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    first = config({f"{LAYER}.self_attn.o_proj": HIF8})
    assert type(config({f"{LAYER}.self_attn.o_proj": HIF8})) is type(first)
    assert isinstance(first, QuantizationConfig) and first.get_name() == "fp8kernels"
    assert QUANTIZATION_METHODS.count("fp8kernels") == 1
    assert first.get_min_capability() == 80 and torch.bfloat16 in first.get_supported_act_dtypes()
    assert first.get_config_filenames() == []


def test_without_vllm_the_reason_names_it() -> None:
    from fp8kernels.integrations.vllm import register

    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(ImportError, match=r"vllm>=0\.33.*fp8kernels serve"):
            register()
    else:
        register()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("block", ("tensor", "row"))
def test_fused_layers_compute_what_serving_computes(
    vllm: Any, folders: dict[str, Path], models: Any, block: str, dtype: torch.dtype
) -> None:
    folder = folders[block]
    tensors, model, found = load_file(folder / "model.safetensors"), models[block], config(folder)
    x = numbers(5, HIDDEN, dtype=dtype)
    for make, parent, parts in ((qkv, f"{LAYER}.self_attn", QKV), (gate_up, f"{LAYER}.mlp", GATE_UP)):
        out, _ = fill(make(found), tensors, parent, parts)(x)
        expected = torch.cat([served(model, f"{parent}.{name}")(x) for name in parts], dim=-1)
        assert out.dtype == dtype and torch.equal(out, expected), f"{parent}: {(out - expected).abs().max()}"


@pytest.mark.parametrize("block", ("tensor", "row", "128x128"))
def test_layers_cut_by_their_inputs_compute_what_serving_computes(
    vllm: Any, folders: dict[str, Path], models: Any, block: str
) -> None:
    folder = folders[block]
    tensors, model, found = load_file(folder / "model.safetensors"), models[block], config(folder)
    for parent, name, inputs in (("self_attn", "o_proj", HIDDEN), ("mlp", "down_proj", INTERMEDIATE)):
        layer = fill(row(found, f"{parent}.{name}", inputs), tensors, f"{LAYER}.{parent}", {name: None})
        one, x, bias = served(model, f"{LAYER}.{parent}.{name}"), numbers(2, 3, inputs), numbers(HIDDEN)
        assert torch.equal(layer(x)[0], one(x))
        one.bias = bias
        assert torch.equal(layer.quant_method.apply(layer, x, bias), one(x))
        one.bias = None


def test_merged_blocks_are_one_grid(vllm: Any, folders: dict[str, Path], models: Any) -> None:
    folder, parent = folders["128x128"], f"{LAYER}.mlp"
    layer = fill(gate_up(config(folder)), load_file(folder / "model.safetensors"), parent, GATE_UP)
    (run,) = layer.fp8kernels_served.runs
    assert run.scale.shape == (2 * INTERMEDIATE // 128, HIDDEN // 128)
    x, model = numbers(4, HIDDEN), models["128x128"]
    assert torch.equal(layer(x)[0], torch.cat([served(model, f"{parent}.{name}")(x) for name in GATE_UP], dim=-1))


@pytest.mark.parametrize("block", ("tensor", "row"))
def test_ranks_together_hold_the_whole(
    vllm: Any, folders: dict[str, Path], models: Any, block: str, ranks: Any
) -> None:
    folder = folders[block]
    tensors, model, found = load_file(folder / "model.safetensors"), models[block], config(folder)
    x, outs, codes = numbers(3, HIDDEN), [], []
    for rank in range(2):
        ranks(rank, 2)
        layer = fill(qkv(found), tensors, f"{LAYER}.self_attn", QKV)
        outs.append(layer(x)[0].split(list(layer.fp8kernels_served.parts), dim=-1))
        down = fill(row(found, "mlp.down_proj", INTERMEDIATE), tensors, f"{LAYER}.mlp", {"down_proj": None})
        codes.append(down.weight_codes.data)
    for number, name in enumerate(QKV):
        whole = torch.cat([out[number] for out in outs], dim=-1)
        assert torch.equal(whole, served(model, f"{LAYER}.self_attn.{name}")(x)), name
    assert torch.equal(torch.cat(codes, dim=1), tensors[f"{LAYER}.mlp.down_proj.weight_codes"])


def test_more_ranks_than_key_heads_repeat_them(vllm: Any, folders: dict[str, Path], ranks: Any) -> None:
    folder, head = folders["tensor"], HIDDEN // common.SIZE.heads
    tensors, found = load_file(folder / "model.safetensors"), config(folder)
    for rank in range(4):  # two heads of keys and values
        ranks(rank, 4)
        layer = fill(qkv(found), tensors, f"{LAYER}.self_attn", QKV)
        first = rank // 2 * head
        keys = tensors[f"{LAYER}.self_attn.k_proj.weight_codes"][first : first + head]
        assert torch.equal(layer.weight_codes.data[head : 2 * head], keys)


def test_blocks_that_ranks_would_cut_are_refused(vllm: Any, ranks: Any) -> None:
    ranks(0, 2)
    with pytest.raises(ValueError, match=r"o_proj.*64 inputs.*128.*fewer ranks"):
        row(config({f"{LAYER}.self_attn.o_proj": BLOCKS}), "self_attn.o_proj", HIDDEN)


def test_parts_of_a_fused_layer_that_are_not_read_alike_are_refused(vllm: Any) -> None:
    parent = f"{LAYER}.self_attn"
    with pytest.raises(ValueError, match=r"qkv_proj.*q_proj: weight hif8 tensor.*v_proj: high precision.*convert"):
        qkv(config({f"{parent}.q_proj": HIF8, f"{parent}.k_proj": HIF8}))
    with pytest.raises(ValueError, match=r"q_proj: weight hif8.*v_proj: weight e4m3"):
        qkv(config({f"{parent}.{name}": E4M3 if name == "v_proj" else HIF8 for name in QKV}))


def test_layers_in_high_precision_are_vllms_own(vllm: Any, folders: dict[str, Path]) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    layer = row(config({"model.layers.1.self_attn.o_proj": HIF8}), "self_attn.o_proj", HIDDEN)
    assert type(layer.quant_method) is vllm.UnquantizedLinearMethod
    assert layer.weight.shape == (HIDDEN, HIDDEN) and not hasattr(layer, "weight_codes")
    found = config(folders["tensor"])
    head = ParallelLMHead(300, HIDDEN, quant_config=found, prefix="lm_head")
    assert found.get_quant_method(head, "lm_head") is None
    assert found.get_quant_method(torch.nn.Module(), f"{LAYER}.self_attn.attn") is None  # keys and values: vLLM's


def test_an_8_bit_head_is_read_with_vllms_padding(vllm: Any, folders: dict[str, Path]) -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    rows, tensors = 300, load_file(folders["tensor"] / "model.safetensors")
    given = {f"model.lm_head.{key}": tensors[f"{LAYER}.mlp.up_proj.{key}"] for key in KEYS}
    given["model.lm_head.weight_codes"] = given["model.lm_head.weight_codes"].repeat(2, 1)[:rows]
    found, x = config({"lm_head": HIF8}), numbers(2, HIDDEN)
    head = ParallelLMHead(rows, HIDDEN, quant_config=found, prefix="lm_head")
    out = fill(head, given, "model", {"lm_head": None}).quant_method.apply(head, x)
    whole = ReplicatedLinear(HIDDEN, rows, bias=False, quant_config=found, prefix="lm_head")
    assert out.shape == (2, 320) and not out[:, rows:].any()
    assert torch.equal(out[:, :rows], fill(whole, given, "model", {"lm_head": None})(x)[0])
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        head.quant_method.tie_weights(head, torch.nn.Module())


def test_an_8_bit_embedding_and_8_bit_experts_are_refused(vllm: Any) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    found = config({"model.embed_tokens": HIF8, f"{LAYER}.mlp.experts.0.w1": HIF8})
    with pytest.raises(ValueError, match=r"model\.embed_tokens.*cannot look up"):
        VocabParallelEmbedding(300, HIDDEN, quant_config=found, prefix="model.embed_tokens")
    with pytest.raises(ValueError, match=r"1 linear layers of experts.*experts\.0\.w1"):
        found.get_quant_method(torch.nn.Module(), f"{LAYER}.mlp.experts")


def test_names_follow_vllms_model_class(vllm: Any) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    found = config({f"model.language_model.{LAYER}.self_attn.o_proj": HIF8})
    found.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.language_model.": ""}))
    assert hasattr(row(found, "self_attn.o_proj", HIDDEN), "weight_codes")


def test_layers_fused_in_the_checkpoint_are_cut_by_vllm(vllm: Any, folders: dict[str, Path]) -> None:
    tensors, parent = load_file(folders["tensor"] / "model.safetensors"), f"{LAYER}.mlp"
    fused = {f"{parent}.gate_up_proj.{key}": tensors[f"{parent}.up_proj.{key}"] for key in KEYS}
    fused[f"{parent}.gate_up_proj.weight_codes"] = torch.cat([tensors[f"{parent}.{n}.weight_codes"] for n in GATE_UP])
    layer = fill(gate_up(config({f"{parent}.gate_up_proj": HIF8})), fused, parent, {"gate_up_proj": None})
    assert torch.equal(layer.weight_codes.data, fused[f"{parent}.gate_up_proj.weight_codes"])
    (run,) = layer.fp8kernels_served.runs
    assert torch.equal(run.scale, fused[f"{parent}.gate_up_proj.weight_scale"])


def test_new_weights_go_the_way_of_the_first(vllm: Any, folders: dict[str, Path], models: Any) -> None:
    tensors = load_file(folders["tensor"] / "model.safetensors")
    layer, x = fill(qkv(config(folders["tensor"])), tensors, f"{LAYER}.self_attn", QKV), numbers(4, HIDDEN)
    before = layer(x)[0]
    for name, part in QKV.items():  # without process_weights_after_loading: a running server may not call it
        for key in KEYS:
            parameter = getattr(layer, key)
            parameter.weight_loader(parameter, tensors[f"model.layers.1.self_attn.{name}.{key}"], part)
    after, parent = layer(x)[0], "model.layers.1.self_attn"
    assert not torch.equal(after, before)
    expected = [served(models["tensor"], f"{parent}.{name}")(x) for name in QKV]
    assert torch.equal(after, torch.cat(expected, dim=-1))


@pytest.mark.parametrize("key", KEYS)
def test_a_tensor_that_never_came_is_named(vllm: Any, folders: dict[str, Path], key: str) -> None:
    tensors, layer = load_file(folders["tensor"] / "model.safetensors"), qkv(config(folders["tensor"]))
    for name, part in QKV.items():
        for each in KEYS:
            if (each, part) != (key, "k"):
                parameter = getattr(layer, each)
                parameter.weight_loader(parameter, tensors[f"{LAYER}.self_attn.{name}.{each}"], part)
    with pytest.raises(ValueError, match=rf"qkv_proj: the checkpoint brought no {key} for its parts \[1\]"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_config_of_another_version_is_refused(vllm: Any) -> None:
    cls = type(config({f"{LAYER}.self_attn.o_proj": HIF8}))
    with pytest.raises(ValueError, match="version"):
        cls.from_config(quantization_config({"a": HIF8}) | {"version": 9})


def test_a_layer_compiles_into_one_graph(vllm: Any, folders: dict[str, Path]) -> None:
    layer = fill(
        qkv(config(folders["tensor"])), load_file(folders["tensor"] / "model.safetensors"), f"{LAYER}.self_attn", QKV
    )
    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x), fullgraph=True, backend="aot_eager")
    for tokens in (1, 5, 6):  # the second makes the dimension dynamic
        x = numbers(tokens, HIDDEN)
        assert torch.equal(compiled(x), layer.quant_method.apply(layer, x))
