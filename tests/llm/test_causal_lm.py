"""load_causal_lm: architectures that load, convert and take a step; folders that are refused, and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from llm import common
from llm.folders import edit, rewrite, shard
from safetensors.torch import load_file, save_file
from torch import Tensor

import fp8kernels
from fp8kernels.convert import decide
from fp8kernels.models.causal_lm import check_causal, load_causal_lm
from fp8kernels.recipe import get_recipe

UP = "model.layers.0.mlp.up_proj.weight"


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"head_dim": 8},
    "qwen2": GROUPED | {"tie_word_embeddings": True},
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8},
    "phi": SMALL,
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "granite": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "cohere": GROUPED,
    "smollm3": GROUPED,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "gpt_neox": SMALL,
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "mixtral": GROUPED | EXPERTS,
    "qwen2_moe": GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
QUICK = ("llama", "qwen2", "phi", "gpt2", "gpt_neox", "mixtral")  # all of them together take half a minute


def build(model_type: str) -> Any:
    torch.manual_seed(0)
    tokens = {"vocab_size": common.VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.CONFIG_MAPPING[model_type](**tokens, **ARCHITECTURES[model_type])
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "model_type",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES],
)
def test_an_architecture_loads_converts_and_trains(model_type: str, tmp_path: Path) -> None:
    original = build(model_type).eval()
    original.save_pretrained(tmp_path)
    common.tokenizer().save_pretrained(tmp_path)
    model, tokenizer = load_causal_lm(tmp_path)
    ids = torch.tensor([tokenizer.encode("Ada sells maps on day 3.")])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, original(input_ids=ids).logits)

    decisions = decide(model, get_recipe("hif8-qat"), None)
    left = {decision.name: decision.reason for decision in decisions if decision.recipe is None}
    kept = {"mamba": "mixer.conv1d", "mixtral": "mlp.experts", "qwen2_moe": "mlp.experts"}.get(model_type)
    blocks = [name for name in left if name != "lm_head"]
    assert len(blocks) == (2 if kept else 0) and all(name.endswith(str(kept)) for name in blocks)
    if kept == "mlp.experts":  # most of the weights: not left without a word
        assert all("a stack of weights" in str(left[name]) for name in blocks)
    fp8kernels.convert(model.train(), "hif8-qat", verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    assert bool(torch.isfinite(loss))
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    converted = [f"{decision.name}.weight" for decision in decisions if decision.recipe is not None]
    assert converted and set(converted) <= set(moved)


def refused(folder: Path | str, text: str, error: type[Exception] = ValueError, **named: Any) -> None:
    with pytest.raises(error, match=text):
        load_causal_lm(folder, **named)


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2-0.5B", "gpt2", "/nowhere/at/all", "../up"], ids=["owner/name", "name", "absolute", "relative"]
)
def test_what_is_not_a_folder_is_not_looked_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def no_network(*args: Any, **named: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    refused(name, "is not a folder. Models are read from disk alone: download it first", FileNotFoundError)


def test_nothing_is_asked_of_the_network(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def no_network(*args: Any, **named: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    load_causal_lm(plain)


def test_a_file_is_not_a_folder(plain: Path) -> None:
    refused(plain / "config.json", "is a file; give the folder", FileNotFoundError)


def test_dtype_and_mode(plain: Path) -> None:
    model, tokenizer = load_causal_lm(plain)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert tokenizer.decode(tokenizer.encode("Ada sells maps")) == "Ada sells maps"
    for dtype in ("bfloat16", torch.bfloat16):
        model, _ = load_causal_lm(plain, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    refused(plain, "dtype 'int8' is none of float32, bfloat16", dtype="int8")
    refused(plain, "dtype 'fp64' is none of", dtype="fp64")


def test_no_dtype_takes_the_checkpoints(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    edit(folder / "config.json", dtype="bfloat16")
    assert next(load_causal_lm(folder)[0].parameters()).dtype == torch.bfloat16
    edit(folder / "config.json", dtype=None)
    assert next(load_causal_lm(folder)[0].parameters()).dtype == torch.bfloat16


def test_config(folder: Path) -> None:
    edit(folder / "config.json", model_type="my-own", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('code of the folder ran')", encoding="utf-8")
    refused(folder, "no model_type 'my-own'. Its own code .auto_map. is not run")
    edit(folder / "config.json", model_type="llama")
    load_causal_lm(folder)  # a known type that also brings code of its own: transformers' class, no question asked
    edit(folder / "config.json", model_type="vit")
    refused(folder, "no causal language model")
    edit(folder / "config.json", model_type=None)
    refused(folder, "names no model_type")
    edit(folder / "config.json", model_type="llama", hidden_size="wide")
    refused(folder, "does not describe a llama: .*hidden_size")
    edit(folder / "config.json", hidden_size=64, quantization_config={"quant_method": "gptq"})
    refused(folder, "quantized already .gptq.")
    (folder / "config.json").unlink()
    refused(folder, "holds no config.json; give the folder that save_pretrained", FileNotFoundError)
    refused(folder.parent, "holds no config.json", FileNotFoundError)


def test_the_folder_below_is_named(plain: Path) -> None:
    shutil.copytree(plain, plain.parent / "run" / "checkpoint-10")
    refused(plain.parent / "run", "there is one in 'checkpoint-10'", FileNotFoundError)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1, 2]", b"\xff\xfe{}", b"[" * 200_000, b'{"model_type": "llama", "model_type": "gpt2"}']
)
def test_a_config_that_is_no_json_object(text: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(text)
    refused(folder, "config.json is not")


def test_adapters_and_codes_are_told(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    refused(folder, "holds an adapter .*merge_and_unload")
    (folder / "adapter_config.json").unlink()
    (folder / "fp8kernels.json").write_text("{}", encoding="utf-8")
    refused(folder, "8-bit codes for serving")


def test_no_weights_and_other_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder / "weights.safetensors")
    refused(folder, "'weights.safetensors', but neither model.safetensors nor", FileNotFoundError)
    (folder / "weights.safetensors").unlink()
    refused(folder, "a config.json and no weights", FileNotFoundError)
    torch.save(common.model().state_dict(), folder / "pytorch_model.bin")
    refused(folder, "pickled PyTorch files, .* .'pytorch_model.bin'.*write them anew")
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
        folder / "new"
    )  # the way out that it names
    load_causal_lm(folder / "new", tokenizer=folder)


def test_shards(folder: Path) -> None:
    wanted, _ = load_causal_lm(folder)
    first, second = shard(folder)
    found, _ = load_causal_lm(folder)
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), found.parameters(), strict=True))
    half = (folder / second).rename(folder / "aside")
    refused(folder, f"lacks 1 of the 2 files that model.safetensors.index.json lists: '{second}'", FileNotFoundError)
    shutil.copy(folder / first, folder / second)
    refused(folder, f"is in {first} and in {second}")
    half.rename(folder / second)
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, "but neither model.safetensors nor model.safetensors.index.json", FileNotFoundError)


def test_an_index_and_its_files_disagree(folder: Path) -> None:
    shard(folder)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    edit(index, weight_map=listed | {"model.extra.weight": "model-00001-of-00002.safetensors"})
    refused(folder, "1 tensors are not in the file that .* gives: 'model.extra.weight'")
    for name in ("../model.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b", 3):
        edit(index, weight_map=listed | {UP: name})
        refused(folder, "files of a model lie in its own folder")
    edit(index, weight_map=listed, metadata=None)
    refused(folder, 'has no "metadata"')
    edit(index, weight_map={}, metadata={})
    refused(folder, "lists no tensors")
    index.write_text("{", encoding="utf-8")
    refused(folder, "index.json is not readable JSON")


def test_tensors_that_lack_are_left_over_or_have_another_shape(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(UP))
    refused(folder, f"hold 20 tensors and lack 1 that a LlamaForCausalLM of this config.json has: '{UP}'")
    rewrite(folder, lambda tensors: tensors.update({UP: torch.zeros(96, 63)}))
    refused(folder, r"1 tensors have another shape .*up_proj.weight is \[96, 63\], the model has \[96, 64\]")
    rewrite(
        folder, lambda tensors: tensors.update({UP: torch.zeros(96, 64), "model.layers.2.mlp.up.weight": torch.ones(1)})
    )
    refused(folder, "hold 1 tensors that a LlamaForCausalLM of this config.json does not have: 'model.layers.2.mlp.up")
    rewrite(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up.weight"))
    load_causal_lm(folder)
    edit(folder / "config.json", num_hidden_layers=1)
    refused(folder, "hold 9 tensors that .* does not have")
    edit(folder / "config.json", num_hidden_layers=10**9)
    refused(folder, "has 1000000000 layers, the weights have 21 tensors")


@pytest.mark.parametrize(
    "model_type, name", [("gpt2", "n_layer"), ("gpt_neo", "num_layers"), ("llama", "num_hidden_layers")]
)
def test_a_number_of_layers_that_nobody_has(model_type: str, name: str, folder: Path) -> None:
    edit(folder / "config.json", model_type=model_type, **{name: 10**12})
    refused(folder, "has 1000000000000 layers, the weights have 21 tensors")


def test_a_tied_head_is_not_missing_and_an_untied_one_is(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, "lack 1 .*'lm_head.weight'")
    edit(folder / "config.json", tie_word_embeddings=True)
    model, _ = load_causal_lm(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_that_are_codes(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({UP: torch.zeros(96, 64, dtype=torch.int8)}))
    refused(folder, f"1 weights are stored as ..I8.., such as '{UP}'; they are quantized already")


def test_experts_that_transformers_joins_are_checked_too(tmp_path: Path) -> None:
    build("mixtral").save_pretrained(tmp_path)
    common.tokenizer().save_pretrained(tmp_path)
    load_causal_lm(tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    refused(tmp_path, "do not make a MixtralForCausalLM|lack ")


def test_a_checkpoint_without_the_prefix_of_its_head(tmp_path: Path) -> None:
    build("qwen2").save_pretrained(tmp_path)  # tied
    common.tokenizer().save_pretrained(tmp_path)
    wanted, _ = load_causal_lm(tmp_path)
    tensors = {
        name.removeprefix("model."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found, _ = load_causal_lm(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), found.parameters(), strict=True))


def test_scales_beside_the_weights_are_left_out(plain: Path, tmp_path: Path) -> None:
    model, tokenizer = load_causal_lm(plain)
    fp8kernels.convert(model, "hif8-qat", verbose=False)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert any(".fp8_" in name for name in load_file(tmp_path / "model.safetensors"))
    again, _ = load_causal_lm(tmp_path)
    assert not any("fp8_" in name for name in again.state_dict())
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value: float, folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[UP][3, 5] = value

    rewrite(folder, spoil)
    refused(folder, rf"{UP} \[96, 64\] holds 1 values that are NaN or Inf in torch.float32, the first at \[3, 5\]")


def test_weights_that_a_dtype_cannot_hold(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[UP].fill_(1e5))
    refused(folder, "float16 ends at 65504, try dtype='float32'", dtype="float16")


def test_logits_that_are_not_finite(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["model.layers.0.mlp.down_proj.weight"].fill_(3e38))
    refused(folder, "gives logits or gradients that are NaN or Inf; its weights are finite")


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    config = transformers.BertConfig(vocab_size=common.VOCAB, pad_token_id=0, **SMALL)
    torch.manual_seed(0)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    common.tokenizer().save_pretrained(tmp_path)
    refused(tmp_path, "BertLMHeadModel is not causal")
    edit(tmp_path / "config.json", is_decoder=True)
    load_causal_lm(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_causality_is_seen_to_the_bit(dtype: str, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_causal_lm(plain, dtype=dtype)
    mixing = model.model.norm.forward
    # a leak of a millionth of a later token into the first one
    monkeypatch.setattr(model.model.norm, "forward", lambda x: mixing(x + 1e-6 * x.mean(1, keepdim=True)))
    with pytest.raises(ValueError, match="not causal"):
        check_causal(model)
    assert not model.model.embed_tokens._forward_hooks
