"""Calibrated scales of the cache: the amax of the sample, through config.json to the last bit, and used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fp8kernels.convert import convert
from fp8kernels.export import export
from fp8kernels.export.kv_cache import cache_scales, kv_cache_entry
from fp8kernels.formats import get_format
from fp8kernels.serving import load
from fp8kernels.serving.code_store import aim
from fp8kernels.serving.kv_cache import EightBitCache
from fp8kernels.serving.kv_calibrate import calibrate_cache, scales_by_module

LAYERS = 2


@pytest.fixture
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("fmt", ["hif8", "e4m3"])
def test_the_sample_fits_and_reaches_the_aim(model: LlamaForCausalLM, fmt: str) -> None:
    batches = [torch.randint(0, 50, (3, 20)) for _ in range(4)]
    scales = calibrate_cache(model, batches, fmt)
    assert set(scales) == set(range(LAYERS))
    largest = torch.zeros(LAYERS, 2, 2)  # layer, keys or values, head
    for ids in batches:
        cache = EightBitCache(model.config, fmt, scales=scales)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        for i, layer in enumerate(cache.layers):
            for j, store in enumerate(layer.stores):
                assert torch.equal(store.scale, scales[i][j].expand(3, 2)) and store.recoded == 0
                values = get_format(fmt).decode(store.filled()).abs().amax((0, 2, 3))
                largest[i, j] = largest[i, j].maximum(values)
    assert (largest <= aim(get_format(fmt)) * 17 / 16).all() and (largest >= aim(get_format(fmt)) * 15 / 16).all()


def test_config_json_keeps_every_bit() -> None:
    scales = {0: (torch.rand(4), torch.rand(4) * 1e-6), 11: (torch.rand(4) * 1e6, torch.rand(4))}
    entry = json.loads(json.dumps(kv_cache_entry("e4m3", scales)))
    assert entry["fmt"] == "e4m3"
    back = cache_scales(entry)
    assert set(back) == {0, 11}
    assert all(torch.equal(a, b) for i in scales for a, b in zip(scales[i], back[i], strict=True))
    assert kv_cache_entry("hif8") == {"fmt": "hif8"}
    assert cache_scales({"fmt": "hif8"}) is None and cache_scales(None) is None


@pytest.mark.parametrize(
    "scales, said",
    [
        ([], "object of lists"),
        ({"a": [[1.0], [1.0]]}, "names layers by number"),
        ({"0": [[1.0]]}, "two lists"),
        ({"0": [[1.0], [1.0, 2.0]]}, "two lists"),
        ({"0": [[], []]}, "two lists"),
        ({"3": [[1.0], [0.0]]}, "layer 3 has the scale 0.0"),
        ({"3": [[-1.0], [1.0]]}, "layer 3 has the scale -1.0"),
        ({"3": [[True], [1.0]]}, "layer 3 has the scale True"),
        ({"3": [[1.0], ["x"]]}, "layer 3 has the scale x"),
        ({"3": [[1.0], [float("nan")]]}, "layer 3 has the scale nan"),
        ({"3": [[float("inf")], [1.0]]}, "layer 3 has the scale inf"),
        ({"3": [[10**400], [1.0]]}, "layer 3 has the scale 1000"),
        ({"3": [[1e-60], [1.0]]}, "layer 3 has the scale 1e-60"),
    ],
)
def test_bad_scales_are_named(scales: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cache_scales({"fmt": "hif8", "scales": scales})


def test_what_cannot_be_calibrated(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="no batch of tokens"):
        calibrate_cache(model, [])
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 1 has keys or values that are NaN"):
        calibrate_cache(model, [torch.randint(0, 50, (1, 5))])
    with pytest.raises(ValueError, match="unknown format"):
        kv_cache_entry("int8")


def test_a_folder_asks_for_the_cache_and_has_its_scales(model: LlamaForCausalLM, tmp_path: Path) -> None:
    scales = calibrate_cache(model, [torch.randint(0, 50, (2, 20))], "e4m3")
    convert(model, "hif8-qat", verbose=False)

    def exported(name: str, kv_cache: Any) -> Path:
        export(model, tmp_path / name, dtype=torch.float32, kv_cache=kv_cache)
        return tmp_path / name

    assert isinstance(cache_of(load(exported("plain", None))), DynamicCache)
    assert isinstance(cache_of(load(exported("format", "hif8"))), EightBitCache)
    folder = exported("scales", kv_cache_entry("e4m3", scales))
    cache = cache_of(load(folder))
    assert torch.equal(cache.layers[1].stores[0].scale[0], scales[1][0])
    other = cache_of(load(folder, kv_cache="hif8"))  # scales of another format are not taken
    assert not torch.equal(other.layers[1].stores[0].scale[0], scales[1][0])
    folder = exported("layer", kv_cache_entry("e4m3", {5: scales[1]}))
    with pytest.raises(ValueError, match=r"scales of layer 5 .* has 2 layers with 2 such heads"):
        load(folder)
    with pytest.raises(ValueError, match=r"layer 0 has the scale 0\.0"):
        exported("zero", {"fmt": "e4m3", "scales": {"0": [[1.0, 1.0], [0.0, 1.0]]}})
    with pytest.raises(ValueError, match="unknown format 'int8'"):
        exported("unknown", "int8")
    assert not (tmp_path / "zero").exists() and not (tmp_path / "unknown").exists()


def test_one_scale_for_all_heads_for_the_other_servers(model: LlamaForCausalLM, tmp_path: Path) -> None:
    scales = calibrate_cache(model, [torch.randint(0, 50, (2, 20))], "e4m3")
    by_module = scales_by_module(model, scales)
    assert by_module["model.layers.1.self_attn"] == tuple(float(each.max()) for each in scales[1])
    convert(model, "hif8-qat", verbose=False)
    assert scales_by_module(model, scales) == by_module
    export(model, tmp_path / "out", format="compressed-tensors-dynamic", cache_scales=by_module)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for i, pair in scales.items():
        for key, scale in zip(("k_scale", "v_scale"), pair, strict=True):
            got = float(stored[f"model.layers.{i}.self_attn.{key}"])
            assert 0 <= got / float(scale.max()) - 1 <= 2**-7  # rounded up to bf16
    with pytest.raises(ValueError, match=r"layers \[0, 1\] have no attention module"):
        scales_by_module(torch.nn.Linear(2, 2), scales)


def cache_of(model: Any) -> Any:
    """What generate used for its keys and values."""
    ids = torch.randint(1, 50, (1, 8))
    settings = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings).past_key_values
