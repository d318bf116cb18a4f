"""transformers' own from_pretrained on 8-bit folders: the layers, the numbers and the refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving import common
from torch import nn

from fp8kernels import quantize
from fp8kernels.convert import convert
from fp8kernels.export import export
from fp8kernels.integrations.hugging_face import Fp8KernelsConfig, Fp8KernelsQuantizer, register
from fp8kernels.models.linears import as_linears
from fp8kernels.nn.inference import InferenceLinear, nbytes
from fp8kernels.serving import load
from fp8kernels.telemetry import sqnr_db

LAYERS = 7 * common.SIZE.layers
HEAD = "lm_head.weight"


def from_pretrained(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **settings)


def held(model: nn.Module) -> dict[str, InferenceLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, InferenceLinear)}


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def bf16_folder(hif8: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hif8` with high precision in bf16, as a user exports it."""
    folder = tmp_path_factory.mktemp("bf16") / "model"
    export(hif8, folder)
    return folder


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    common.plain().to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_logits_are_those_of_the_trained_model_to_the_bit(hif8: Any, native_folder: Path, prompt_ids) -> None:
    model = from_pretrained(native_folder)
    assert len(held(model)) == LAYERS
    assert not any(isinstance(module, nn.Linear) for name, module in model.named_modules() if name != "lm_head")
    assert torch.equal(logits(model, prompt_ids), logits(hif8, prompt_ids))
    assert torch.equal(logits(model, prompt_ids), logits(load(native_folder), prompt_ids))


@pytest.mark.parametrize(
    "settings",
    [{}, {"dtype": "auto"}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": "auto"}],
    ids=str,
)
def test_the_ways_to_ask_for_bf16_give_what_serving_gives(settings, bf16_folder: Path, prompt_ids) -> None:
    model, ours = from_pretrained(bf16_folder, **settings), load(bf16_folder)
    assert model.dtype == torch.bfloat16
    assert nbytes(model) == nbytes(ours)
    assert torch.equal(logits(model, prompt_ids), logits(ours, prompt_ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_codes_and_scales_keep_their_dtypes_whatever_is_asked_for(dtype, bf16_folder: Path, prompt_ids) -> None:
    model = from_pretrained(bf16_folder, dtype=dtype)
    stored = load_file(bf16_folder / "model.safetensors")
    assert model.model.embed_tokens.weight.dtype == dtype
    for name, layer in held(model).items():
        assert torch.equal(layer.weight_codes, stored[f"{name}.weight_codes"])
        assert torch.equal(layer.weight_scale, stored[f"{name}.weight_scale"])
        assert torch.equal(layer.input_scale, stored[f"{name}.input_scale"])
    assert logits(model, prompt_ids).dtype == dtype


@pytest.mark.parametrize("shards", ["1GB", "100KB"])
def test_saving_and_loading_again_keeps_every_byte(shards: str, bf16_folder: Path, tmp_path: Path, prompt_ids) -> None:
    model = from_pretrained(bf16_folder)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards != "1GB")
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = json.loads((bf16_folder / "config.json").read_text())
    assert config["quantization_config"] == wanted["quantization_config"]
    state = model.state_dict()
    for again in (from_pretrained(tmp_path), load(tmp_path)):
        assert again.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
        assert torch.equal(logits(again, prompt_ids), logits(model, prompt_ids))


def test_a_tied_embedding_stays_tied(tmp_path: Path, prompt_ids) -> None:
    trained = common.trained("e4m3-row", steps=2, tie_word_embeddings=True)
    export(trained, tmp_path / "model", dtype=torch.float32)
    for model in (from_pretrained(tmp_path / "model"), load(tmp_path / "model")):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(logits(model, prompt_ids), logits(trained, prompt_ids))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=2, n_positions=64)).eval()


def test_gpt2_keeps_layers_of_its_own_class_and_loads(tmp_path: Path, prompt_ids) -> None:
    """Its layers are transposed in files; one of them stays in high precision."""
    model = gpt2()
    as_linears(model)
    convert(model, "e4m3-row", filter=lambda module, name: name != "transformer.h.1.mlp.c_fc", verbose=False)
    export(model.eval(), tmp_path / "model", dtype=torch.float32)
    for loaded in (from_pretrained(tmp_path / "model"), load(tmp_path / "model")):
        assert len(held(loaded)) == 7
        assert torch.equal(logits(loaded, prompt_ids), logits(model, prompt_ids))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(tmp_path / "again"), prompt_ids), logits(model, prompt_ids))


def other_models() -> dict[str, Any]:
    import transformers

    size = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    return {
        "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**size, **heads)),  # biases
        "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**size, **heads)),  # one layer for q, k, v
        "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**size, **heads, head_dim=32)),  # tied
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**size, **heads, num_local_experts=2)  # experts are no linear layers
        ),
        "opt": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=300, hidden_size=64, ffn_dim=128, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
            )
        ),
    }


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gemma", "mixtral", "opt"])
def test_other_architectures_round_trip_to_the_bit(name: str, tmp_path: Path, prompt_ids) -> None:
    torch.manual_seed(0)
    model = convert(other_models()[name]().eval(), "hif8-qat", verbose=False)
    export(model, tmp_path / "model", dtype=torch.float32)
    for loaded in (from_pretrained(tmp_path / "model"), load(tmp_path / "model")):
        assert held(loaded)
        assert torch.equal(logits(loaded, prompt_ids), logits(model, prompt_ids))


def test_the_model_without_its_head_loads_from_the_same_folder(bf16_folder: Path, prompt_ids) -> None:
    from transformers import AutoModel

    body, whole = AutoModel.from_pretrained(bf16_folder), from_pretrained(bf16_folder)
    with torch.no_grad():
        assert torch.equal(body(prompt_ids).last_hidden_state, whole.model(prompt_ids).last_hidden_state)


@pytest.mark.parametrize(("weights", "inputs"), [("hif8", None), ("e4m3", None), ("e4m3", "hif8")])
def test_a_plain_checkpoint_is_rounded_row_by_row_while_it_is_read(
    weights: str, inputs: str | None, plain_folder: Path, tmp_path: Path, prompt_ids
) -> None:
    plain = load(plain_folder)
    model = from_pretrained(plain_folder, quantization_config=Fp8KernelsConfig(weights=weights, inputs=inputs))
    layers = held(model)
    assert len(layers) == LAYERS
    assert isinstance(model.lm_head, nn.Linear), "the head stays in high precision"
    for name, layer in layers.items():
        wanted = quantize(plain.get_submodule(name).weight, weights, block="row")
        assert torch.equal(layer.weight_codes, wanted.codes)
        assert torch.equal(layer.weight_scale, wanted.scale)
        assert (layer.input_role.fmt, layer.input_role.block) == (inputs or weights, "row")
        assert float(layer.input_scale) == 0
    model.save_pretrained(tmp_path)
    for again in (from_pretrained(tmp_path), load(tmp_path)):
        assert torch.equal(logits(again, prompt_ids), logits(model, prompt_ids))


def test_layers_that_are_named_stay_in_high_precision(plain_folder: Path) -> None:
    config = Fp8KernelsConfig(weights="e4m3", modules_to_not_convert=["down_proj", "model.layers.1"])
    model = from_pretrained(plain_folder, quantization_config=config)
    assert sorted({name.split(".")[2] for name in held(model)}) == ["0"]
    assert len(held(model)) == 6
    with pytest.raises(ValueError, match="no linear layer was left"):
        from_pretrained(plain_folder, quantization_config=Fp8KernelsConfig(modules_to_not_convert=["model"]))


def test_gpt2_and_biases_are_rounded_on_the_fly(tmp_path: Path, prompt_ids) -> None:
    model = gpt2()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path)
    found = from_pretrained(tmp_path, quantization_config=Fp8KernelsConfig(weights="e4m3"))
    for name, layer in held(found).items():
        old = model.get_submodule(name)
        assert torch.equal(layer.weight_codes, quantize(old.weight.t().contiguous(), "e4m3", block="row").codes)
        assert torch.equal(layer.bias, old.bias)
    assert len(held(found)) == 8


SPOILT = {
    "lost": (lambda tensors, name: tensors.pop(f"{name}.weight_codes"), "hold no .*weight_codes"),
    "zero": (lambda tensors, name: tensors[f"{name}.weight_scale"].zero_(), "weight_scale holds 0"),
    "nan": (lambda tensors, name: tensors[f"{name}.input_scale"].fill_(float("nan")), "input_scale holds nan"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_layer_that_is_missing_or_decodes_nothing_is_refused(case: str, bf16_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bf16_folder, tmp_path / "bad"))
    change, match = SPOILT[case]
    tensors = load_file(folder / "model.safetensors")
    change(tensors, "model.layers.0.mlp.up_proj")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match):
        from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda found: found.update(version=2), "version 2"),
        (lambda found: found.pop("groups"), "no groups"),
        (lambda found: found["groups"][0].update(weight_fmt="fp4"), "fp4"),
        (lambda found: found["groups"][0]["layers"].append("model.layers.9.mlp.up_proj"), r"layers\.9"),
        (lambda found: found["groups"][0]["layers"].append("model.norm"), "LlamaRMSNorm"),
    ],
    ids=["version", "groups", "format", "unknown-layer", "norm"],
)
def test_a_config_that_the_model_cannot_follow_is_refused(change, match, bf16_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bf16_folder, tmp_path / "bad"))
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        from_pretrained(folder)


def test_training_is_refused_with_the_way_out(bf16_folder: Path, tmp_path: Path, caplog) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers.utils import logging

    peft = pytest.importorskip("peft")
    model = from_pretrained(bf16_folder)
    with pytest.raises(ValueError, match="InferenceLinear"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    logging.enable_propagation()
    try:
        with pytest.raises(ValueError, match="fine-tun"):
            Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), report_to=[]), train_dataset=[])
    finally:
        logging.disable_propagation()
    assert "fp8kernels.convert" in caplog.text
    assert model.hf_quantizer.is_serializable()


def test_plain_layers_can_be_had_again_and_trained(bf16_folder: Path, prompt_ids) -> None:
    model = from_pretrained(bf16_folder)
    before, layers = logits(model, prompt_ids), held(model)
    plain = model.dequantize()
    assert not held(plain)
    for name, layer in layers.items():
        decoded = torch.ops.fp8kernels.dequantize(layer.weight_codes, layer.weight_scale, "hif8", torch.bfloat16)
        assert torch.equal(plain.get_submodule(name).weight, decoded)
    noise = sqnr_db(before, logits(plain, prompt_ids))
    assert noise > 20, f"only the rounding of inputs is gone: {noise:.1f} dB"
    convert(plain, "hif8-qat", verbose=False)
    plain(input_ids=prompt_ids, labels=prompt_ids).loss.backward()
    assert plain.model.layers[0].mlp.up_proj.weight.grad is not None
    assert not plain.is_quantized


def test_a_compiled_forward_is_one_graph(bf16_folder: Path, prompt_ids) -> None:
    model = from_pretrained(bf16_folder)
    body = torch.compile(model.model.layers[0].mlp, backend="eager", fullgraph=True)
    x = torch.randn(1, 3, common.SIZE.hidden, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(body(x), model.model.layers[0].mlp(x))


def test_registering_again_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    register()
    register()
    assert AUTO_QUANTIZER_MAPPING["fp8kernels"] is Fp8KernelsQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["fp8kernels"] is Fp8KernelsConfig
    with pytest.raises(ValueError, match="fp9"):
        Fp8KernelsConfig(weights="fp9")


def test_importing_the_package_imports_no_transformers() -> None:
    code = "import sys, fp8kernels, fp8kernels.serving; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


PEAK = """
from pathlib import Path
import torch
{prepare}
def kib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
before = kib("VmRSS")
{load}
print(kib("VmHWM") - before)
"""
WAYS = {
    "serving": ("from fp8kernels.serving import load; load({small!r})", "model = load({large!r})"),
    "transformers": (
        "import fp8kernels.integrations.hugging_face; from transformers import AutoModelForCausalLM as M; "
        "M.from_pretrained({small!r})",
        "model = M.from_pretrained({large!r})",
    ),
}


@pytest.fixture(scope="module")
def large_folder(bf16_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of 96 MiB of codes, written by hand."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("large")
    layers, width, inner = 6, 1024, 4096
    LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        dtype="bfloat16",
    ).save_pretrained(folder)
    shapes = {f"self_attn.{key}_proj": (width, width) for key in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    tensors = {name: torch.ones(256, width, dtype=torch.bfloat16) for name in ("model.embed_tokens.weight", HEAD)}
    tensors["model.norm.weight"] = torch.ones(width, dtype=torch.bfloat16)
    names = [f"model.layers.{number}.{key}" for number in range(layers) for key in shapes]
    for number in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{number}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    for name in names:
        shape = next(shape for key, shape in shapes.items() if name.endswith(key))
        tensors[f"{name}.weight_codes"] = torch.randint(0, 100, shape, dtype=torch.uint8)
        tensors |= {f"{name}.weight_scale": torch.ones(1, 1), f"{name}.input_scale": torch.ones(1, 1)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = json.loads((bf16_folder / "config.json").read_text())["quantization_config"]
    config["quantization_config"]["groups"][0]["layers"] = names
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_loading_takes_hardly_more_memory_than_the_file(way: str, bf16_folder: Path, large_folder: Path) -> None:
    """A copy in bf16 on the way would take two times the file's size, and a second copy of the codes as much."""
    if sys.platform != "linux":
        pytest.skip("only on Linux: /proc says what a process holds")
    prepare, body = (part.format(small=str(bf16_folder), large=str(large_folder)) for part in WAYS[way])
    code = PEAK.format(prepare=prepare, load=body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown, size = int(done.stdout) * 1024, (large_folder / "model.safetensors").stat().st_size
    print(f"{grown / 2**20:.0f} MiB for a file of {size / 2**20:.0f} MiB")
    assert grown < 1.5 * size, f"{grown / 2**20:.0f} MiB for a file of {size / 2**20:.0f} MiB"
