"""Every shape that a bench or a goal measures, with its origin; a goal names a set.

A product is out[M, N] = x[M, K] @ w[N, K].T. Hidden sizes are those of the models' published config.json files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """One linear layer: w is [n, k]."""

    name: str
    n: int
    k: int


@dataclass(frozen=True)
class Model:
    """The linear layers of one block of a model, and where its sizes come from."""

    name: str
    origin: str
    layers: tuple[Layer, ...]


def decoder(
    name: str, origin: str, hidden: int, inner: int, heads: int, groups: int, head: int = 128, *, ranks: int = 1
) -> Model:
    """A Llama-like block: q, k and v in one product, gate and up in one; `ranks` shares of tensor parallelism.

    heads, groups, head   query heads, key/value heads, and the length of one
    """
    qkv, width = (heads + 2 * groups) * head // ranks, heads * head // ranks
    return Model(name, origin, (
        Layer("qkv", qkv, hidden),
        Layer("attention out", hidden, width),
        Layer("gate and up", 2 * inner // ranks, hidden),
        Layer("down", hidden, inner // ranks),
    ))  # fmt: skip


def encoder(name: str, origin: str, hidden: int) -> Model:
    """A ViT block, with an MLP four times as wide."""
    return Model(name, origin, (
        Layer("qkv", 3 * hidden, hidden),
        Layer("attention out", hidden, hidden),
        Layer("fc1", 4 * hidden, hidden),
        Layer("fc2", hidden, 4 * hidden),
    ))  # fmt: skip


PANGU = decoder("openPangu-Embedded-1B", "config.json of the model", 1536, 6144, 12, 6)
LLAMA_8B = decoder("Llama-3-8B", "config.json of meta-llama/Meta-Llama-3-8B", 4096, 14336, 32, 8)
LLAMA_70B = decoder("Llama-3-70B, a rank of 8", "torchao benchmarks/float8/utils.py", 8192, 28672, 64, 8, ranks=8)
QWEN_8B = decoder("Qwen3-8B", "config.json of Qwen/Qwen3-8B", 4096, 12288, 32, 8)
DEEPSEEK = Model("DeepSeek-V3", "DeepGEMM's README, dense table", (
    Layer("q and kv, down", 2112, 7168),
    Layer("q, up", 24576, 1536),
    Layer("kv, up", 32768, 512),
    Layer("attention out", 7168, 16384),
    Layer("gate and up", 4096, 7168),
    Layer("down", 7168, 2048),
))  # fmt: skip
VIT_B = encoder("ViT-B", "arXiv 2606.00602, code ToniChopp/ASAP: 14 volumes", 768)
VIT_L = encoder("ViT-L", "ViT-L/16's widths on the volumes of ViT-B", 1024)
MODELS = (PANGU, LLAMA_8B, LLAMA_70B, QWEN_8B, DEEPSEEK, VIT_B, VIT_L)

TOKENS = (1024, 4096, 16384)  # of a training or prefill step
DECODE = (1, 16, 64)  # sequences that are decoded together
WIDE = 6144  # the least N for which a decode product is held to memory speed
# 14 volumes of 224 x 224 x 112 in patches of 16 x 16 x 8: 14 * 687 tokens see a quarter of the patches and the class
# token, 14 * 2745 all of them. Neither is a multiple of 16, and dw = dy.T @ x sums over them.
PATCHES = (14 * 687, 14 * 2745)


def forward(models: tuple[Model, ...], rows: tuple[int, ...]) -> Iterator[Shape]:
    """(M, N, K) of every layer of every model, each once."""
    found = {(m, layer.n, layer.k): None for model in models for layer in model.layers for m in rows}
    return iter(found)


def weight_gradients(model: Model, rows: tuple[int, ...]) -> Iterator[Shape]:
    """dw[n, k] = dy.T[n, M] @ x[M, k], summed over the rows."""
    found = {(layer.n, layer.k, m): None for layer in model.layers for m in rows}
    return iter(found)


# (M, N, K) of products
PRODUCTS: dict[str, tuple[Shape, ...]] = {
    "pangu": tuple(forward((PANGU,), TOKENS)),
    "llm": tuple(forward((PANGU, LLAMA_8B, LLAMA_70B, QWEN_8B), TOKENS)),
    "llm-4096": tuple(forward((PANGU, LLAMA_8B, LLAMA_70B, QWEN_8B), TOKENS[1:2])),
    "deepseek": tuple(forward((DEEPSEEK,), (64, 128, 4096))),
    "blocks": tuple(shape for shape in forward((DEEPSEEK,), (128, 4096)) if shape[1] % 128 == 0),
    "deepseek-peak": ((4096, 7168, 16384),),
    "vit": (*forward((VIT_B, VIT_L), PATCHES), *weight_gradients(VIT_B, PATCHES[:1])),
    "decode": tuple(shape for shape in forward((LLAMA_8B, DEEPSEEK), DECODE) if shape[1] >= WIDE),
    # what no tile divides; 30522 is BERT's vocabulary, a head over 14 * 512 tokens
    "odd": ((1000, 1000, 1000), (4095, 4097, 4099), (333, 1031, 767), (7168, 30522, 768), (2049, 513, 8191)),
    # "when is 8-bit faster than BF16?": from one row to a long prompt, from a small layer to a large one
    "when": tuple((m, n, k) for n, k in ((1024, 1024), (4096, 4096), (6144, 1536), (8192, 8192), (28672, 4096))
                  for m in (1, 16, 256, 1024, 4096, 16384)),
    "small": ((128, 256, 256),),
    "cube": ((2048, 2048, 2048),),
}  # fmt: skip

# [M, K] of tensors that become codes; in bf16, 64 MB and more
TENSORS: dict[str, tuple[Shape, ...]] = {
    # the inputs of the layers above at 16384 rows, and the volumes' (1 GB is the largest)
    "memory": (
        (16384, 4096),
        (16384, 8192),
        (16384, 14336),
        (32768, 1536),
        (38430, 1024),
        (38430, 3072),
        (8192, 65536),
    ),
    # rows that a norm stands before: hidden sizes of the models
    "rows": ((32768, 1536), (16384, 4096), (16384, 8192), (49152, 768), (38430, 1024)),
    # gate and up of the models' MLPs, each [M, K]
    "gates": ((16384, 6144), (8192, 14336), (8192, 12288), (16384, 3584)),
    "square": ((8192, 8192),),
    "small": ((512, 1024),),
}

SETS: dict[str, tuple[Shape, ...]] = {f"products/{name}": found for name, found in PRODUCTS.items()} | {
    f"tensors/{name}": found for name, found in TENSORS.items()
}


def named(name: str) -> tuple[Shape, ...]:
    """The shapes of a set, "products/llm".

    raises   ValueError naming the known sets
    """
    if name not in SETS:
        raise ValueError(f"no set of shapes is named {name!r}; there are {', '.join(SETS)}")
    return SETS[name]
