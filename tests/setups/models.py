"""Small real models with random weights: the classes of transformers, two layers each, fp32 on a CPU."""

from __future__ import annotations

import functools
import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

FAMILIES = ("llama", "qwen3", "bert", "vit")
WIDTH, HIDDEN, HEADS, LAYERS, WORDS, TOKENS, PIXELS = 32, 64, 4, 2, 48, 12, 8
DECODER = {"num_key_value_heads": 2, "max_position_embeddings": TOKENS, "use_cache": False}
SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}


def build(family: str, seed: int = 0) -> nn.Module:
    """A model of a family; the same seed gives the same weights. Without dropout, so that runs can be compared."""
    import transformers

    torch.manual_seed(seed)
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **DECODER, vocab_size=WORDS))
    if family == "qwen3":
        config = transformers.Qwen3Config(**SHAPE, **DECODER, vocab_size=WORDS, head_dim=WIDTH // HEADS)
        return transformers.Qwen3ForCausalLM(config)
    dropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "bert":
        config = transformers.BertConfig(**SHAPE, **dropped, vocab_size=WORDS, max_position_embeddings=TOKENS)
        return transformers.BertForMaskedLM(config)
    if family == "vit":
        config = transformers.ViTConfig(**SHAPE, **dropped, image_size=PIXELS, patch_size=4, num_labels=WORDS)
        return transformers.ViTForImageClassification(config)
    raise ValueError(f"{family!r} is none of {FAMILIES}")


@functools.cache
def _batch(family: str, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    if family == "vit":
        # every third batch is brighter, so that a history of inputs has more than one largest value
        pixels = torch.randn(2, 3, PIXELS, PIXELS, generator=draw) * (3.0 if seed % 3 == 1 else 1.0)
        return {"pixel_values": pixels, "labels": torch.randint(WORDS, (2,), generator=draw)}
    ids = torch.randint(WORDS, (2, TOKENS), generator=draw)
    return {"input_ids": ids, "labels": ids}


def batch(family: str, seed: int) -> dict[str, Any]:
    """The arguments of a forward of such a model, with labels, so that the result has a loss."""
    return dict(_batch(family, seed))
