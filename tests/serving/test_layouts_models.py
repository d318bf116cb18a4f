"""export of models of all kinds: fused projections, GPT-2's transposed layers, tied embeddings, adapters, no config."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import common
from torch import Tensor, nn

import fp8kernels
from fp8kernels.convert import convert
from fp8kernels.export import calibrate, check_report, export
from fp8kernels.export.formats import FORMATS, LAYOUTS
from fp8kernels.models.linears import as_linears
from fp8kernels.recipe import get_recipe

pytest.importorskip("compressed_tensors")

IDS = torch.arange(12)[None]  # [1, 12]
TINY: dict[str, Any] = {"vocab_size": 96, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def read(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def calibrated(model: nn.Module, recipe: Any = "hif8-qat") -> Any:
    """Converted, with static scales from two batches, in eval mode."""
    convert(model, recipe, verbose=False)
    calibrate(model, [IDS, IDS.flip(1)])
    return model.eval()


def build(name: str) -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    if name == "phi3":
        settings = {**TINY, "intermediate_size": 256, "max_position_embeddings": 64, "pad_token_id": 0}
        return hf.Phi3ForCausalLM(hf.Phi3Config(**settings))
    if name == "gpt_neox":
        return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TINY, intermediate_size=256, max_position_embeddings=64))
    if name == "qwen2_tied":
        settings = {**TINY, "intermediate_size": 256, "max_position_embeddings": 64, "num_key_value_heads": 2}
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**settings, tie_word_embeddings=True))
    if name == "mixtral":
        settings = {**TINY, "intermediate_size": 256, "num_local_experts": 2, "num_key_value_heads": 2}
        return hf.MixtralForCausalLM(hf.MixtralConfig(**settings))
    raise KeyError(name)


def reference(name: str, folder: Path) -> Any:
    """The plain model with the weights that the file decodes to."""
    tensors = read(folder)
    state = {key: tensor for key, tensor in tensors.items() if not key.endswith("_scale")}
    for key, tensor in state.items():
        if tensor.dtype == torch.float8_e4m3fn:
            state[key] = tensor.float() * tensors[f"{key}_scale"]
    if "embed_out.weight" in state:  # GPT-NeoX
        state["lm_head.weight"] = state.pop("embed_out.weight")
    model = build(name)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected
    return model.eval()


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "qwen2_tied"])
def test_architectures_round_trip_through_transformers(name: str, tmp_path: Path) -> None:
    """Names fit, and decoded weights are ours bit for bit; GPT-NeoX calls its head by another name in files."""
    from transformers import AutoModelForCausalLM

    model = calibrated(build(name))
    for layout in ("compressed-tensors", "compressed-tensors-dynamic"):
        report = export(model, tmp_path / layout, format=layout, dtype=torch.float32)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / layout, dtype=torch.float32, output_loading_info=True
        )
        assert {key: list(found) for key, found in info.items() if found} == {}
        wanted = reference(name, tmp_path / layout)
        with torch.no_grad():
            logits, plain = loaded(IDS).logits, wanted(IDS).logits
        for layer in report.layers:
            assert torch.equal(loaded.get_submodule(layer).weight, wanted.get_submodule(layer).weight), layer
        ignored = config_of(tmp_path / layout)["quantization_config"]["ignore"]
        assert set(ignored) == ({"lm_head", "embed_out"} if name == "gpt_neox" else {"lm_head"})
        noise = (logits - plain).square().sum() / plain.square().sum()
        assert 0 < float(noise) < 10 ** (-20 / 10), "rounding of inputs alone lies between them, over 20 dB down"


def test_fused_projections_have_one_scale(tmp_path: Path) -> None:
    report = export(calibrated(build("phi3")), tmp_path / "phi", format="compressed-tensors")
    tensors = read(tmp_path / "phi")
    assert tensors["model.layers.0.self_attn.qkv_proj.weight_scale"].shape == (1,)
    assert tensors["model.layers.1.mlp.gate_up_proj.input_scale"].shape == (1,)
    assert report.shared == ()


@pytest.mark.parametrize(("groups", "high"), [(4, set()), (2, {"qkv_proj"})])
def test_fused_projections_are_cut_between_blocks_or_not_at_all(groups: int, high: set[str], tmp_path: Path) -> None:
    """Servers split them into q, k and v: of 128 rows each with four heads of keys, of 64 with two."""
    import transformers as hf

    torch.manual_seed(0)
    settings = {**TINY, "intermediate_size": 256, "max_position_embeddings": 64, "pad_token_id": 0}
    model = hf.Phi3ForCausalLM(hf.Phi3Config(**settings, num_key_value_heads=groups))
    report = export(calibrated(model), tmp_path / "out", format="compressed-tensors-block")
    assert {name.rpartition(".")[2] for name in report.kept} == {"lm_head"} | high


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    report = export(calibrated(build("qwen2_tied")), tmp_path / "tied", format="compressed-tensors")
    tensors = read(tmp_path / "tied")
    assert "lm_head.weight" not in tensors
    assert "model.embed_tokens.weight" in tensors
    assert report.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert config_of(tmp_path / "tied")["tie_word_embeddings"] is True


def test_a_head_that_is_no_longer_the_embedding_is_said_to_be_untied(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = calibrated(build("qwen2_tied"))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    export(model, tmp_path / "untied", format="compressed-tensors", dtype=torch.float32)
    assert config_of(tmp_path / "untied")["tie_word_embeddings"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "untied", dtype=torch.float32)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_an_8_bit_head_of_a_tied_model(tmp_path: Path) -> None:
    """The embedding stays in high precision, the head has codes: no loader may tie them."""
    from transformers import AutoModelForCausalLM

    recipe = get_recipe("e4m3-delayed").replace(overrides=())
    model = calibrated(build("qwen2_tied"), recipe)
    report = export(model, tmp_path / "head", format="compressed-tensors", dtype=torch.float32)
    assert "lm_head" in report.layers
    config = config_of(tmp_path / "head")
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["ignore"] == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "head", dtype=torch.float32)
    with torch.no_grad():
        loaded(IDS)
    tensors = read(tmp_path / "head")
    found = tensors["lm_head.weight"].float() * tensors["lm_head.weight_scale"]
    assert torch.equal(loaded.lm_head.weight, found)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_experts_have_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    """transformers holds experts in one tensor and saves them one by one; attention is 8-bit, experts are not."""
    from transformers import AutoModelForCausalLM

    model = calibrated(build("mixtral"))
    export(model, tmp_path / "moe", format="compressed-tensors-dynamic", dtype=torch.float32)
    plain = build("mixtral")
    plain.save_pretrained(tmp_path / "plain")
    assert {name for name in read(tmp_path / "moe") if not name.endswith("_scale")} == set(read(tmp_path / "plain"))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32, output_loading_info=True)
    assert {key: list(found) for key, found in info.items() if found} == {}
    assert torch.equal(dict(loaded.named_parameters())["model.norm.weight"], model.model.norm.weight)


@pytest.mark.parametrize("format", ["compressed-tensors", "compressed-tensors-dynamic", "fp8"])
def test_experts_and_routers_are_said_to_be_in_high_precision(format: str, tmp_path: Path) -> None:
    model = calibrated(build("mixtral"))
    kept = export(model, tmp_path / "moe", format=format).kept
    assert "no Linear layer" in kept["model.layers.0.block_sparse_moe.gate"]
    assert check_report(tmp_path / "moe").problems == []
    settings = json.loads((tmp_path / "moe" / "config.json").read_text())["quantization_config"]
    ignored = settings["ignored_layers" if format == "fp8" else "ignore"]
    assert "model.layers.0.block_sparse_moe.experts.0.w1" in ignored
    assert not any("embed" in name or "norm" in name for name in ignored)


def test_transposed_layers_stay_in_high_precision_and_are_listed(tmp_path: Path) -> None:
    """GPT-2's Conv1D keeps weights as [in, out], which no loader of these layouts reads as 8-bit."""
    import transformers as hf

    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=96, n_embd=128, n_layer=1, n_head=4, n_positions=64))
    as_linears(model)
    calibrated(model)
    with pytest.raises(ValueError, match=r"Conv1D.*format='native'"):
        export(model, tmp_path / "gpt2", format="compressed-tensors")
    model.extra = nn.Linear(128, 128)
    convert(model, "e4m3-row", verbose=False)
    report = export(model, tmp_path / "gpt2", format="compressed-tensors-dynamic", dtype=torch.float32)
    assert list(report.layers) == ["extra"]
    assert "Conv1D" in report.kept["transformer.h.0.attn.c_attn"]
    assert read(tmp_path / "gpt2")["transformer.h.0.attn.c_attn.weight"].shape == (128, 384)
    assert "transformer.h.0.attn.c_attn" in config_of(tmp_path / "gpt2")["quantization_config"]["ignore"]


class Net(nn.Module):
    """No model of transformers: a patch embedding, attention and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 128, 4, stride=4)
        self.attention = nn.MultiheadAttention(128, 4, batch_first=True)
        self.first = nn.Linear(128, 200)
        self.second = nn.Linear(200, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(patches, patches, patches)
        return self.second(self.first(mixed).relu())


def test_a_model_without_a_config_exports_what_it_can_and_lists_the_rest(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = convert(Net(), "e4m3-row", verbose=False)
    report = export(model, tmp_path / "net", format="compressed-tensors-block", dtype=torch.float32)
    tensors = read(tmp_path / "net")
    assert tensors["first.weight"].dtype == torch.float8_e4m3fn
    assert tensors["first.weight_scale"].shape == (2, 1), "200 rows: the last block has 72"
    assert "200 inputs are no multiple of 128" in report.kept["second"]
    assert "Conv2d" in report.left["patches"]
    assert torch.equal(tensors["patches.weight"], model.patches.weight)
    assert not [name for name in tensors if "fp8_" in name]
    assert any("no config" in note for note in report.notes)
    assert set(config_of(tmp_path / "net")) == {"quantization_config", "dtype"}
    for name in report.layers:
        weight, scale = model.get_submodule(name).weight, tensors[f"{name}.weight_scale"]
        grown = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)[:, : weight.shape[1]]
        error = (tensors[f"{name}.weight"].float() * grown - weight).abs()
        assert bool((error <= torch.maximum(weight.abs() * 2.0**-4, grown * 2.0**-10)).all())


def test_layers_that_servers_fuse_are_8_bit_together_or_not_at_all(tmp_path: Path) -> None:
    recipe = get_recipe("hif8-qat").with_override("*.0.self_attn.k_proj", None)
    model = calibrated(common.plain(), recipe)
    report = export(model, tmp_path / "out", format="compressed-tensors")
    assert report.kept["model.layers.0.self_attn.k_proj"] == "not converted"
    for name in ("q_proj", "v_proj"):
        assert "k_proj" in report.kept[f"model.layers.0.self_attn.{name}"]
    assert "model.layers.1.self_attn.q_proj" in report.layers
    ignored = config_of(tmp_path / "out")["quantization_config"]["ignore"]
    parts = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert ignored == [*parts, "lm_head", "model.layers.0.self_attn.qkv_proj"]  # the last one is SGLang's name


def adapted(**settings: Any) -> Any:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)
    return peft.get_peft_model(calibrated(common.plain()), config).eval()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_lora_is_merged_into_a_copy(format: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**settings)
    before = copy.deepcopy(model.state_dict())
    report = export(model, tmp_path / "merged", format=format, dtype=torch.float32)
    assert any("merged" in note for note in report.notes)
    assert not [name for name in read(tmp_path / "merged") if "lora" in name or "base_layer" in name]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain = copy.deepcopy(model).merge_and_unload()
    export(plain, tmp_path / "plain", format=format, dtype=torch.float32)
    ours, wanted = read(tmp_path / "merged"), read(tmp_path / "plain")
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted)


def test_adapters_that_nothing_can_merge_say_the_way_out(tmp_path: Path) -> None:
    import peft

    inner = adapted().base_model.model
    with pytest.raises(ValueError, match="merge_and_unload"):
        export(inner, tmp_path / "inner", format="compressed-tensors")
    prompts = peft.get_peft_model(
        calibrated(common.plain()), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(ValueError, match="get_base_model"):
        export(prompts, tmp_path / "prompts", format="compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_margins_powers_of_two_and_e5m2_translate(tmp_path: Path) -> None:
    """Head-room stays head-room, a power of two stays one, and E5M2 arrives as E4M3."""
    recipe = get_recipe("hif8-qat").replace(margin=1, power_of_two=True)
    for number, changed in enumerate((recipe, get_recipe("hif8-qat").with_format(input="e5m2", weight="e5m2"))):
        model = calibrated(common.plain(), changed)
        report = export(model, tmp_path / str(number), format="compressed-tensors")
        for name, layer in report.layers.items():
            module = model.get_submodule(name)
            assert isinstance(module, fp8kernels.nn.Linear)
            amax = float(module.fp8_history[0].max())
            assert layer.input_scale is not None
            lands = amax / layer.input_scale
            assert lands <= 448 * 2.0**-changed.margin * (1 + 1e-6)
            if changed.power_of_two:
                assert math.frexp(layer.scale)[0] == math.frexp(layer.input_scale)[0] == 0.5
            else:
                assert layer.trained_fmt == "e5m2"
                assert layer.lost < 0, "E4M3 has a bit of mantissa more"


def test_a_clamp_is_what_a_static_scale_does_by_itself(tmp_path: Path) -> None:
    """Values beyond the target were cut in training; E4M3 saturates there. Dynamic scales cut nothing, and say so."""
    recipe = get_recipe("hif8-qat")
    clamped = recipe.replace(input=dataclasses.replace(recipe.input, clamp=True))
    plain, cut = calibrated(common.plain(), recipe), calibrated(common.plain(), clamped)
    with pytest.raises(ValueError, match="clamps its input"):
        export(cut, tmp_path / "native")
    for number, model in enumerate((plain, cut)):
        report = export(model, tmp_path / str(number), format="compressed-tensors")
        assert not any("clamp" in note for note in report.notes)
    ours, wanted = read(tmp_path / "1"), read(tmp_path / "0")
    assert all(torch.equal(ours[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted)
    report = export(cut, tmp_path / "dynamic", format="compressed-tensors-dynamic")
    assert any("clamp" in note for note in report.notes)


def test_every_layout_is_known() -> None:
    assert (*FORMATS,) == ("native", *LAYOUTS)
