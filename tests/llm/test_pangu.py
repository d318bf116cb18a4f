"""openPangu-Embedded as a stock Llama: names, arithmetic written out here in plain torch, both directions, one step."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llm import common
from safetensors.torch import load_file, save_file
from torch import Tensor

import fp8kernels
from fp8kernels.headers import read_headers
from fp8kernels.models.causal_lm import load_causal_lm
from fp8kernels.models.pangu import from_pangu_config, save_pangu, to_pangu_config
from fp8kernels.models.sentencepiece import SAMPLES
from fp8kernels.models.tokenizer import load_tokenizer

THETA = 4e6
CONFIG = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
        "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
    },
    "bias": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "model_type": "PanguEmbedded",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_theta": THETA,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.53.2",
    "use_cache": True,
    "vocab_size": common.VOCAB,
}
PUBLISHED = CONFIG | {
    "bos_token_id": 1,
    "eos_token_id": 45892,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "num_attention_heads": 12,
    "num_hidden_layers": 26,
    "num_key_value_heads": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 153376,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a Pangu checkpoint, written down from its description and not from transformers."""
    hidden, wide, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, rows in {"q": hidden, "k": keys, "v": keys, "o": hidden}.items():
            found[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            if config["bias"]:
                found[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        found |= {f"{at}mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
        found[f"{at}mlp.down_proj.weight"] = (hidden, wide)
        found |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocabulary, hidden)
    return found


def checkpoint(config: dict[str, Any], *, spread: float = 0.2) -> dict[str, Tensor]:
    """Random tensors under Pangu's names, large enough that no part of the arithmetic is lost in rounding."""
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) * spread for name, shape in shapes(config).items()}
    return {name: 1 + tensor if "norm" in name else tensor for name, tensor in tensors.items()}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    common.tokenizer().save_pretrained(folder)
    return folder


def documented(config: dict[str, Any], tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits [T, vocabulary] of ids [T] in float64: what the description of the model states, in plain torch."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    length, size = len(ids), config["hidden_size"] // heads
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", torch.zeros((), dtype=torch.float64))

    def turn(x: Tensor) -> Tensor:  # [T, heads, size]; the pair of element i is i + size / 2
        speed = config["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = (torch.arange(length, dtype=torch.float64)[:, None] * speed)[:, None]  # [T, 1, size / 2]
        first, second = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
        )

    x = t["model.embed_tokens.weight"][ids]  # [T, hidden]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = norm(x, t[f"{at}.input_layernorm.weight"])
        q = turn(linear(y, f"{at}.self_attn.q_proj").view(length, heads, size))
        k = turn(linear(y, f"{at}.self_attn.k_proj").view(length, groups, size))
        v = linear(y, f"{at}.self_attn.v_proj").view(length, groups, size)
        mixed = torch.empty(length, heads, size, dtype=torch.float64)
        for head in range(heads):
            group = head // (heads // groups)
            for position in range(length):
                weight = torch.softmax(k[: position + 1, group] @ q[position, head] / size**0.5, dim=0)
                mixed[position, head] = weight @ v[: position + 1, group]
        x = x + linear(mixed.view(length, -1), f"{at}.self_attn.o_proj")
        y = norm(x, t[f"{at}.post_attention_layernorm.weight"])
        gate = linear(y, f"{at}.mlp.gate_proj")
        x = x + linear(gate * torch.sigmoid(gate) * linear(y, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    head = t["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, t["model.norm.weight"]) @ head.T


IDS = torch.randint(common.VOCAB, (24,), generator=torch.Generator().manual_seed(2))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS[None]).logits[0].double()
    return found


def distance(first: Tensor, second: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((first - second).abs().max() / second.abs().max())


def test_the_published_sizes_have_the_published_tensors() -> None:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(from_pangu_config(PUBLISHED))
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert found == shapes(PUBLISHED)
    assert len(found) == 340
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.head_dim == 128
    assert sum(parameter.numel() for parameter in model.parameters()) == 26 * 35_397_120 + 1536 + 153376 * 1536


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_documented_arithmetic(*, tied: bool, tmp_path: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": tied}
    tensors = checkpoint(config)
    model, _ = load_causal_lm(write(tmp_path / "model", config, tensors), dtype="float64")
    assert type(model).__name__ == "LlamaForCausalLM"
    # float64 but for the rotary angles, which transformers takes in float32: 24 positions * 2**-24 each
    assert distance(logits(model), documented(config, tensors, IDS)) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 1e4},
        {"num_key_value_heads": 1},
        {"rms_norm_eps": 1e-1},
        {"without": "self_attn.o_proj.bias"},
        {"without": "self_attn.q_proj.bias"},
    ],
    ids=lambda change: "-".join(map(str, *change.items())),
)
def test_another_arithmetic_is_told_apart(change: dict[str, Any], tmp_path: Path) -> None:
    tensors = checkpoint(CONFIG)
    model, _ = load_causal_lm(write(tmp_path / "model", CONFIG, tensors), dtype="float64")
    if part := change.get("without"):
        other = documented(CONFIG, {name: tensor for name, tensor in tensors.items() if part not in name}, IDS)
    elif "num_key_value_heads" in change:  # the second group reads the first one's keys and values
        wrong = {
            name: torch.cat([tensor.chunk(2)[0]] * 2) if "k_proj" in name or "v_proj" in name else tensor
            for name, tensor in tensors.items()
        }
        other = documented(CONFIG, wrong, IDS)
    else:
        other = documented(CONFIG | change, tensors, IDS)
    assert distance(logits(model), other) > 1e-2


def test_there_and_back_gives_the_same_config_and_tensors(tmp_path: Path) -> None:
    tensors = checkpoint(CONFIG)
    model, _ = load_causal_lm(write(tmp_path / "model", CONFIG, tensors))
    out = save_pangu(model, tmp_path / "back")
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert {key: written[key] for key in CONFIG.keys() & written.keys()} == {
        key: value for key, value in CONFIG.items() if key in written
    }
    assert CONFIG.keys() - written.keys() == {"transformers_version"}
    assert written.keys() - CONFIG.keys() == {"head_dim"}
    again = load_file(out / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "model"]


def test_names_of_the_own_code_come_back_only_if_they_were_there(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "auto_map"}
    assert "auto_map" not in to_pangu_config(from_pangu_config(config))
    assert to_pangu_config(from_pangu_config(CONFIG))["auto_map"] == CONFIG["auto_map"]
    # by way of a folder that transformers wrote, as a training run leaves it
    model, _ = load_causal_lm(write(tmp_path / "pangu", CONFIG, checkpoint(CONFIG)))
    model.save_pretrained(tmp_path / "llama")
    llama = json.loads((tmp_path / "llama" / "config.json").read_text(encoding="utf-8"))
    assert llama["model_type"] == "llama" and "auto_map" not in llama
    again, _ = load_causal_lm(tmp_path / "llama", tokenizer=tmp_path / "pangu")
    assert torch.equal(logits(again), logits(model))
    assert to_pangu_config(again.config)["auto_map"] == CONFIG["auto_map"]


def test_a_pangu_without_biases_has_none(tmp_path: Path) -> None:
    config = CONFIG | {"bias": False}
    tensors = checkpoint(config)
    assert not any(name.endswith("bias") for name in tensors)
    model, _ = load_causal_lm(write(tmp_path / "model", config, tensors), dtype="float64")
    assert distance(logits(model), documented(config, tensors, IDS)) < 1e-5
    assert to_pangu_config(model.config)["bias"] is False


@pytest.mark.parametrize("name", ["rope_theta", "bias", "rms_norm_eps", "tie_word_embeddings", "num_key_value_heads"])
def test_a_field_that_is_not_there_is_not_guessed(name: str) -> None:
    with pytest.raises(ValueError, match=f"lacks {name}"):
        from_pangu_config({key: value for key, value in CONFIG.items() if key != name})


def test_what_a_pangu_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scales its positions"):
        from_pangu_config(CONFIG | {"rope_scaling": {"type": "yarn", "factor": 4.0}})
    model = common.model()
    model.config.mlp_bias = True
    with pytest.raises(ValueError, match="MLP of openPangu-Embedded has no bias"):
        save_pangu(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="give another folder"):
        save_pangu(common.model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = common.model()

    def full(*args: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        save_pangu(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_converted_pangu_trains_and_goes_back(tmp_path: Path) -> None:
    tensors = checkpoint(CONFIG, spread=0.05)
    model, _ = load_causal_lm(write(tmp_path / "model", CONFIG, tensors))
    fp8kernels.convert(model, "hif8-qat", verbose=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS[None], labels=IDS[None]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    out = save_pangu(model, tmp_path / "out")
    assert {name: header.shape for name, header in read_headers(out).items()} == shapes(CONFIG)
    moved = load_file(out / "model.safetensors")
    assert all(not torch.equal(moved[name], tensor) for name, tensor in tensors.items())  # biases and the tied head too
    again, _ = load_causal_lm(out, tokenizer=tmp_path / "model")
    assert torch.equal(again.model.layers[1].self_attn.o_proj.bias, model.model.layers[1].self_attn.o_proj.bias)


def sentencepiece_file(**settings: Any) -> bytes:
    import sentencepiece

    text = [f"the cat sat on the mat and the dog barked {n} times" for n in range(200)] + [
        "开源盘古模型与中文混排"
    ] * 20
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=out,
        byte_fallback=True,
        hard_vocab_limit=False,
        vocab_size=360,
        minloglevel=3,
        user_defined_symbols=["[unused10]"],
        **({"model_type": "bpe"} | settings),
    )
    return out.getvalue()


PANGU_TOKENIZER = {
    "add_bos_token": True,
    "added_tokens_decoder": {"3": {"content": "[unused10]", "special": True}},
    "auto_map": {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]},
    "bos_token": "<s>",
    "eos_token": "[unused10]",
    "pad_token": "<unk>",
    "tokenizer_class": "PanguTokenizer",
    "unk_token": "<unk>",
}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"add_dummy_prefix": False},
        {"split_digits": True, "allow_whitespace_only_pieces": True},
        {"model_type": "unigram"},
    ],
    ids=lambda settings: "-".join(settings) or "defaults",
)
def test_a_sentencepiece_file_is_read_as_sentencepiece_reads_it(settings: dict[str, Any], tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file(**settings))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(PANGU_TOKENIZER), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (*SAMPLES, "the cat sat, 47 times", "盘古 mat\t dog"):
        assert tokenizer.encode(text) == [1, *library.encode(text)]
        assert tokenizer.decode(library.encode(text)) == library.decode(library.encode(text))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 3, 0)
    assert tokenizer.encode("the cat[unused10]") == [1, *library.encode("the cat"), 3]
    assert len(tokenizer) == library.get_piece_size()


def test_a_sentencepiece_tokenizer_survives_being_saved(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(PANGU_TOKENIZER), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    for text in SAMPLES:
        assert again.encode(text) == tokenizer.encode(text)
    assert again.eos_token_id == 3


def test_a_sentencepiece_file_that_cannot_be_told_whole_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file())
    without = {key: value for key, value in PANGU_TOKENIZER.items() if key not in ("added_tokens_decoder", "eos_token")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(without), encoding="utf-8")
    with pytest.raises(ValueError, match="with the sentencepiece library"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x00no tokenizer")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)
