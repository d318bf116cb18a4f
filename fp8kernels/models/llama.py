"""A Llama of any size, with random weights, as transformers builds it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LlamaSize:
    """The lengths that make a Llama.

    vocab     the number of tokens
    context   the longest sequence
    kv_heads  heads of keys and values; as many as `heads` where None
    """

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    context: int
    kv_heads: int | None = None


def llama(size: LlamaSize, **config: Any) -> nn.Module:
    """A transformers LlamaForCausalLM in fp32; `config` goes to LlamaConfig as it is (pad_token_id and the like).

    raises   ImportError naming the extra to install, where transformers is absent
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched to build a model from a size
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError("a Llama needs transformers: pip install 'fp8kernels[demo]'") from error
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocab,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads or size.heads,
            max_position_embeddings=size.context,
            **config,
        )
    )
