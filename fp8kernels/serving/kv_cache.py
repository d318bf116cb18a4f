"""An 8-bit cache of keys and values for models of transformers: half the memory of bf16, read at half the cost.

Needs transformers (the extra 'fp8kernels[serve]').
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..export.kv_cache import Scales
from ..formats import Format, get_format
from . import kv_attention
from .code_store import CodeStore
from .kv_attention import CachedTensor


class EightBitLayer(DynamicLayer):
    """The keys and values of one layer as codes.

    The first rows (the prompt) go to attention as they came, so that a prompt is attended to without error of the
    cache; later rows, and all rows from then on, are read as codes.
    """

    def __init__(self, fmt: Format, scales: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        key_scale, value_scale = scales or (None, None)
        self.stores = CodeStore(fmt, key_scale), CodeStore(fmt, value_scale)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Code new keys and values [B, KH, n, D]; returns what attention is to read, [B, KH, T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.stores
        is_first = keys.length == 0
        keys.append(key_states)
        values.append(value_states)
        if is_first:
            return key_states, value_states
        return self._view(keys), self._view(values)

    def _view(self, store: CodeStore) -> Tensor:
        assert store.scale is not None
        return CachedTensor(store.filled(), store.scale, store.fmt, self.dtype)

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores)

    @property
    def recoded(self) -> int:
        """How often a head was coded anew because a number did not fit."""
        return sum(store.recoded for store in self.stores)

    def get_seq_length(self) -> int:
        return self.stores[0].length

    def reset(self) -> None:
        self.is_initialized = False
        for store in self.stores:
            store.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; their number is given below zero, as transformers does."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove below zero, got {tokens_to_remove}")
        for store in self.stores:
            store.length = max(0, store.length + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for store in self.stores:
            store.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for store in self.stores:
            store.repeat(repeats)

    def offload(self) -> None:
        raise ValueError("an 8-bit cache is not offloaded; leave cache_implementation='offloaded' out")


class EightBitCache(Cache):
    """A cache whose layers of full attention hold 8-bit codes; the others are transformers' own.

    config   of the model
    fmt      "hif8", "e4m3" or another format
    scales   calibrated scales, a pair (keys, values) of fp32 [KH] by layer; without them, or for a layer that is
             missing, each sequence and head takes that of its prompt's amax
    plain    layers that stay in the model's dtype, with the reason
    raises   ValueError for an unknown format, and scales of a layer or a head that the model has not
    """

    def __init__(self, config: Any, fmt: Format | str = "hif8", *, scales: Scales | None = None) -> None:
        fmt = get_format(fmt)
        given = scales or {}
        layers = list(DynamicCache(config=config).layers)
        heads = getattr(config.get_text_config(decoder=True), "num_key_value_heads", None)
        for i, pair in given.items():
            if i not in range(len(layers)) or any(heads not in (None, len(scale)) for scale in pair):
                raise ValueError(
                    f"scales of layer {i} are for {[len(scale) for scale in pair]} heads of keys and values; the model "
                    f"has {len(layers)} layers with {heads} such heads: calibrate again on this model"
                )
        self.plain: dict[int, str] = {}
        for i, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[i] = EightBitLayer(fmt, given.get(i))
            else:
                self.plain[i] = type(layer).__name__
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales, room to grow included, and of the layers that stay in the model's dtype."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, EightBitLayer):
                total += layer.nbytes
            else:
                held = (getattr(layer, "keys", None), getattr(layer, "values", None))
                total += sum(x.nbytes for x in held if isinstance(x, Tensor))
        return total

    @property
    def recoded(self) -> int:
        """How often a head was coded anew because a number did not fit its scale."""
        return sum(layer.recoded for layer in self.layers if isinstance(layer, EightBitLayer))


def use_eight_bit_cache(model: Any, fmt: Format | str = "hif8", *, scales: Scales | None = None) -> Any:
    """Make `model.generate` keep keys and values in 8 bits, without further arguments; returns the model.

    model    a decoder of transformers whose attention goes through its AttentionInterface
    fmt      "hif8" or "e4m3"
    scales   as for EightBitCache

    A cache that is given (`past_key_values=`) or asked for (`cache_implementation=`) is used as it is. Layers that
    attend to a sliding window keep transformers' cache, with a warning; so does a whole model that has no others.

    raises   TypeError if the model is not one of transformers; ValueError, naming the reason, if its attention cannot
             read codes
    """
    fmt = get_format(fmt)
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(f"{type(model).__name__} is no model of transformers that generates")
    reason = why_not(model)
    if reason is not None:
        raise ValueError(f"{type(model).__name__} cannot use an 8-bit cache: {reason}")
    config = model.config.get_text_config(decoder=True)
    plain = EightBitCache(config, fmt, scales=scales).plain  # also checks the scales
    if plain:
        kinds = ", ".join(sorted(set(plain.values())))
        warnings.warn(
            f"{len(plain)} of {config.num_hidden_layers} layers of {type(model).__name__} keep transformers' own cache "
            f"({kinds}): only full attention reads 8-bit keys and values",
            stacklevel=2,
        )
    if len(plain) == config.num_hidden_layers:
        return model

    model.set_attn_implementation(kv_attention.register())
    own: Any = model  # a function of this one model, where its class has a method for all
    own._prepare_cache_for_generation = functools.partial(_prepare_cache, model, fmt, scales)
    return model


def _prepare_cache(
    model: Any,
    fmt: Format,
    scales: Scales | None,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    """What generate calls to get a cache, in place of the method of the model's class."""
    asked = model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False
    if asked or generation_config.cache_implementation not in (None, "dynamic"):
        type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    else:
        model_kwargs["past_key_values"] = EightBitCache(model.config.get_text_config(decoder=True), fmt, scales=scales)


def why_not(model: Any) -> str | None:
    """Why a model's attention cannot read an 8-bit cache, or None."""
    if model.config.is_encoder_decoder:
        return "it is an encoder and a decoder, which keep two caches"
    if not model._supports_default_dynamic_cache():
        return "it brings a cache of its own"
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its scores are capped (attn_logit_softcapping), which neither SDPA nor decode_attention does"
    if not (model._can_set_attn_implementation() and model._supports_sdpa):
        return "its attention does not go through transformers' AttentionInterface with an SDPA implementation"
    return None
