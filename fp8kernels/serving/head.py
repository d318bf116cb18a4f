"""The head of a language model in 8 bits, rounded while it is loaded: the largest matrix that a token reads.

Each row (a token of the vocabulary) gets a scale of its own, inputs the scale of their own amax, row by row. Where the
embedding shares the head's weight, both read the same codes, and nothing is left of the matrix in high precision. An
embedding with a weight of its own stays as it is: a token reads one row of it, so it costs memory and no time.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..export.inference import inference_layer
from ..export.layout import LayerEntry
from ..formats import get_format
from ..nn.inference import InferenceLinear
from ..nn.inference_embedding import InferenceEmbedding
from ..ops import quantize
from ..scaling.qtensor import QTensor

logger = logging.getLogger(__name__)

FORMATS = ("hif8", "e4m3")
BLOCK = "row"
ROWS_AT_ONCE = 4096  # of the matrix, while its noise is measured in fp32


def give_dense_rows(model: Any) -> None:
    """Copy what a head in high precision reads; without this its weight would be copied, for every prompt.

    transformers hands the head a slice, the last token of each prompt. torch's linear multiplies such a slice with a
    frozen weight as a batch of matrices, for which it expands and copies the weight: on a CPU, torch 2.13, a hundred
    times the work of the product.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is nn.Linear and _dense not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_dense)


def _dense(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = inputs
    return (x.clone(memory_format=torch.contiguous_format), *others)


@dataclass(frozen=True)
class HeadReport:
    """What became of a head.

    sqnr_db    of rounding its weight, in dB; None where nothing was rounded
    embedding  whether the embedding reads the same codes
    reason     why something was left in high precision, or ""
    """

    fmt: str
    sqnr_db: float | None
    embedding: bool
    reason: str = ""

    def __str__(self) -> str:
        if self.sqnr_db is None:
            return f"the head stays in high precision: {self.reason}"
        shared = " and the embedding" if self.embedding else ""
        kept = f"; the embedding stays in high precision: {self.reason}" if self.reason else ""
        return f"the head{shared} in {self.fmt}, a scale a row: SQNR {self.sqnr_db:.1f} dB{kept}"


@torch.no_grad()
def use_eight_bit_head(model: Any, fmt: str) -> HeadReport:
    """Round the head of a transformers model to 8 bits, in place, and the embedding where it shares the weight.

    fmt      "hif8" or "e4m3"
    returns  what was done; logged as well. A head that is no plain linear layer is left alone with the reason, and so
             is an embedding that does more than look rows up (Gemma's scales them, max_norm changes them)
    raises   ValueError for another format
    """
    if fmt not in FORMATS:
        raise ValueError(f"head is {fmt!r}, it is one of {', '.join(map(repr, FORMATS))}, or None")
    report = _round(model, fmt)
    if report.sqnr_db is not None and hasattr(model, "save_pretrained"):
        model.save_pretrained = refuse_saving  # a folder has no place for it; half of the head would be lost
    logger.info("%s", report)
    return report


def refuse_saving(*args: Any, **kwargs: Any) -> None:
    """raises ValueError: in the place of save_pretrained, which would write a folder that nothing loads."""
    raise ValueError(
        "a model whose head was rounded while it was loaded is not saved: its folder is the one that it was loaded "
        "from; load it without head= to save it elsewhere"
    )


def _round(model: Any, fmt: str) -> HeadReport:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, InferenceLinear):
        return HeadReport(fmt, None, False, "it holds 8-bit codes already")
    if type(head) is not nn.Linear:
        return HeadReport(fmt, None, False, f"it is a {type(head).__name__}, not a linear layer")
    embedding = model.get_input_embeddings()
    shared = getattr(embedding, "weight", None) is head.weight
    coded = quantize(head.weight.detach(), fmt, block=BLOCK)  # codes [V, D], scale [V, 1]
    report = HeadReport(fmt, _sqnr_db(head.weight.detach(), coded), False)
    reason = _why_not(embedding) if shared else None
    _replace(model, head, _linear(head, coded))
    if not shared:
        return report
    if reason is not None:
        model.config.tie_word_embeddings = False  # the two no longer share a tensor
        return HeadReport(fmt, report.sqnr_db, False, reason)
    _replace(
        model,
        embedding,
        InferenceEmbedding(
            coded.codes, coded.scale, fmt, embedding.weight.dtype, padding_idx=embedding.padding_idx
        ).train(embedding.training),
    )
    return HeadReport(fmt, report.sqnr_db, True)


def _why_not(embedding: nn.Module) -> str | None:
    """Why an embedding cannot be a table of codes; padding_idx changes gradients alone, and does not matter."""
    if type(embedding) is not nn.Embedding:
        return f"{type(embedding).__name__} does more than look up rows"
    if embedding.max_norm is not None:
        return f"max_norm={embedding.max_norm:g} changes rows when they are read"
    return None


def _linear(head: nn.Linear, coded: QTensor) -> InferenceLinear:
    fmt = coded.fmt.name
    entry = LayerEntry(fmt, BLOCK, fmt, BLOCK, "current", get_format(fmt).target, False)
    linear = inference_layer(
        head.in_features, head.out_features, bias=head.bias is not None, entry=entry, device="meta"
    ).train(head.training)
    linear.weight_codes, linear.weight_scale = coded.codes, coded.scale
    linear.input_scale = coded.scale.new_zeros(1, 1)
    if head.bias is not None:
        linear.bias = head.bias.detach()
    return linear


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


def _sqnr_db(weight: Tensor, coded: QTensor) -> float:
    """10 log10(sum of squares / sum of squared errors), over the whole matrix, in parts that fit beside it."""
    signal = noise = 0.0
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        x = weight[rows].float()
        part = QTensor(coded.codes[rows], coded.scale[rows], coded.fmt, coded.block)
        signal += float(x.square().sum(dtype=torch.float64))
        noise += float((x - part.dequantize()).square().sum(dtype=torch.float64))
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf
