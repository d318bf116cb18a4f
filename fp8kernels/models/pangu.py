"""openPangu-Embedded as transformers' stock Llama, in both directions; no code of the checkpoint is run.

The model that config.json calls PanguEmbedded computes what Llama computes: blocks of RMSNorm before attention and
before the MLP, rotary positions in the half-rotation convention, grouped keys and values, SwiGLU. Its one flag `bias`
stands for biases of q, k, v and the output projection, which is `attention_bias` of LlamaConfig; the MLP has none. The
tensors have the same names: at 26 layers with a tied head 340 of them.

source   configuration_openpangu_dense.py and modular_openpangu_dense.py of the checkpoint (model_type PanguEmbedded)
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..headers import CONFIG

MODEL_TYPE = "PanguEmbedded"
ARCHITECTURE = "PanguEmbeddedForCausalLM"
AUTO_MAP = "pangu_auto_map"  # where a LlamaConfig keeps the names of the checkpoint's own code, unused here
LENGTHS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
SAME = (*LENGTHS, "hidden_act", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
OPTIONAL = ("head_dim", "attention_dropout", "initializer_range", "use_cache")


def is_pangu(config: dict[str, Any]) -> bool:
    """Whether a config.json is of openPangu-Embedded: by its model_type, or by its only architecture."""
    return config.get("model_type") == MODEL_TYPE or config.get("architectures") == [ARCHITECTURE]


def from_pangu_config(config: dict[str, Any]) -> Any:
    """The transformers.LlamaConfig that computes what a Pangu config.json describes.

    raises   ValueError naming the field, if one that the arithmetic depends on is missing, or one is there that a Llama
             does not have
    """
    from transformers import LlamaConfig

    theta, scaling = _rope(config)
    missing = [name for name in (*SAME, "bias") if name not in config] + (["rope_theta"] if theta is None else [])
    if missing:
        raise ValueError(
            f"the Pangu config lacks {', '.join(missing)}; take the config.json that came with the weights"
        )
    if scaling not in (None, "default"):
        raise ValueError(f"the Pangu config scales its positions ({scaling!r}); openPangu-Embedded does not")
    for name in ("bias", "tie_word_embeddings"):
        if not isinstance(config[name], bool):
            raise ValueError(f"the Pangu config has {name} = {config[name]!r}; it is true or false")
    fields = {name: config[name] for name in (*SAME, *OPTIONAL) if name in config}
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None:
        fields["dtype"] = dtype
    if isinstance(config.get("auto_map"), dict):
        fields[AUTO_MAP] = config["auto_map"]
    return LlamaConfig(
        attention_bias=config["bias"],
        mlp_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": float(theta)},
        architectures=["LlamaForCausalLM"],
        **fields,
    )


def to_pangu_config(config: Any) -> dict[str, Any]:
    """The config.json of openPangu-Embedded for a LlamaConfig: what `from_pangu_config` took, given back.

    auto_map is there if the config came from a Pangu config.json that had it.

    raises   ValueError naming the field, if a Pangu model cannot have it (a bias in the MLP, scaled positions)
    """
    if getattr(config, "model_type", None) != "llama":
        raise ValueError(f"a Pangu config can be made of a LlamaConfig; this is {type(config).__name__}")
    if config.mlp_bias:
        raise ValueError("the MLP of openPangu-Embedded has no bias, this Llama's has (mlp_bias)")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"openPangu-Embedded does not scale its positions, this Llama does ({rope['rope_type']!r})")
    fields = {name: getattr(config, name) for name in (*SAME, *OPTIONAL)}
    auto_map = getattr(config, AUTO_MAP, None)
    dtype = getattr(config, "dtype", None)
    return {
        "architectures": [ARCHITECTURE],
        **({"auto_map": auto_map} if auto_map else {}),
        "bias": bool(config.attention_bias),
        **fields,
        "model_type": MODEL_TYPE,
        "rope_theta": float(rope["rope_theta"]),
        **({"torch_dtype": str(dtype).removeprefix("torch.")} if dtype is not None else {}),
    }


def save_pangu(model: Any, folder: str | Path) -> Path:
    """Write a Llama as the checkpoint of openPangu-Embedded that its own code reads: config.json and safetensors files.

    model    a LlamaForCausalLM, also a converted one: weights and biases are written, states of 8-bit layers are not
    folder   new or empty; it is there whole or not at all. Beside it belong the files that this does not write: the
             tokenizer, the licence, and the checkpoint's own code if that is to load it

    raises   FileExistsError if the folder holds something; ValueError if the model lacks tensors of a Pangu, has others
             (an adapter that is not merged) or a config that a Pangu cannot have
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists; give another folder, or empty this one")
    config = to_pangu_config(model.config)
    tensors = _plain_tensors(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        model.save_pretrained(staged, state_dict=tensors)
        (staged / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _finish(staged)
        if folder.exists():
            folder.rmdir()
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def _plain_tensors(model: Any) -> dict[str, Any]:
    """The state of a model without states of 8-bit layers and without a head that is the embedding."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        wanted = LlamaForCausalLM(model.config).state_dict()
    if model.config.tie_word_embeddings:
        wanted.pop("lm_head.weight")
    parameters = dict(model.named_parameters())
    missing = sorted(wanted.keys() - parameters.keys())
    others = sorted(parameters.keys() - wanted.keys() - {"lm_head.weight"})
    if missing or others:
        raise ValueError(
            f"{type(model).__name__} is not a plain Llama: it lacks {missing[:2]} and has {others[:2]}; "
            "merge an adapter into the model first (merge_and_unload)"
        )
    return {name: parameters[name].detach() for name in wanted}


def _rope(config: dict[str, Any]) -> tuple[Any, Any]:
    """The base of the rotary positions and what scales them, where transformers 4 or where 5 writes them."""
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"the Pangu config has {nested!r} where its positions are described")
    return config.get("rope_theta", nested.get("rope_theta")), nested.get("rope_type", nested.get("type"))


def _finish(folder: Path) -> None:
    """Have the disk take the bytes now, and make the private folder of mkdtemp an ordinary one."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
