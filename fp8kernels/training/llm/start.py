"""The model of a run before its first step: loaded or new, converted, with adapters."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ...convert import convert
from ...models.causal_lm import load_causal_lm
from ...models.llama import LlamaSize, llama
from ...models.tokenizer import check_tokenizer, load_tokenizer
from ...nn.state import ScaledLayer
from ...recipe import Recipe
from ..tokens import byte_tokenizer
from .config import Config, LoraSettings, ModelSettings


def build_plain(config: Config, texts: Any) -> tuple[Any, Any]:
    """The model and its tokenizer, in high precision.

    texts   a function that gives the training texts: a model by its size learns its tokenizer from them
    raises  what load_causal_lm raises; ValueError for a size that cannot be
    """
    from transformers import set_seed

    dtype = getattr(torch, config.model.dtype)
    set_seed(config.seed)  # of the weights of a new model
    if config.model.path is not None:
        model, tokenizer = load_causal_lm(config.model.path, dtype=dtype, tokenizer=config.tokenizer)
    else:
        assert config.model.size is not None
        size = config.model.size
        if config.tokenizer is not None:
            tokenizer = load_tokenizer(config.tokenizer)
        else:
            tokenizer = byte_tokenizer(list(texts()), size.vocab)
        model = _new(size, tokenizer, config.model).to(dtype)
        check_tokenizer(tokenizer, model)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and config.data.sequence > context:
        raise ValueError(f"data.sequence={config.data.sequence} is longer than the model's context of {context} tokens")
    return model, tokenizer


def _new(size: LlamaSize, tokenizer: Any, settings: ModelSettings) -> nn.Module:
    for number, name in ((size.heads, "heads"), (size.layers, "layers"), (size.vocab, "vocab")):
        if number < 1:
            raise ValueError(f"model.size.{name}={number} must be at least 1")
    if size.hidden % size.heads or size.heads % (size.kv_heads or size.heads):
        raise ValueError(f"model.size: heads must divide hidden, and kv_heads must divide heads; it is {settings.size}")
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return llama(size, **ids)


def make_eight_bit(model: nn.Module, recipe: Recipe | None) -> list[str]:
    """Convert the model in place; returns the names of its 8-bit layers, none for the BF16 run."""
    if recipe is None:
        return []
    convert(model, recipe, verbose=False)
    return [name for name, module in model.named_modules() if isinstance(module, ScaledLayer)]


def add_adapters(model: nn.Module, settings: LoraSettings | None) -> Any:
    """The model with adapters of PEFT around its layers, or as it is.

    raises   ImportError naming the extra; ValueError if no layer has such a name
    """
    if settings is None:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora needs PEFT: pip install 'fp8kernels[train]'") from error
    values = dataclasses.asdict(settings)
    lora = LoraConfig(
        r=values["r"],
        lora_alpha=values["alpha"],
        lora_dropout=values["dropout"],
        target_modules=values["target_modules"],
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ValueError(f"lora: {error}") from None
