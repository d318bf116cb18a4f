"""SGLang's whole engine on a CPU: answers from an exported folder, takes streamed weights while it runs, answers anew.

    python tests/serving/peers/sglang_engine.py

with an interpreter that has SGLang 0.5.23 and fp8kernels. A tiny HiF8 model is trained and exported, SGLang finds the
plug-in through its entry point, and its greedy tokens must be those of fp8kernels.serving on the same folder. Then the
training goes on, `fp8kernels.export.stream` goes through the engine's update_weights_from_tensor, and the tokens must
be those of a fresh export. One thing stands in for what a machine without a GPU lacks: the rotation of positions, which
SGLang imports from vllm._custom_ops off a GPU, written here in torch. Attention is SGLang's "torch_native".
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

TOKENS = 12
PROMPTS = ("def add(a", "class Sum:\n", "return")
ROTATION = """
import torch


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox, *rest):
    cos, sin = (half[:, None].float() for half in cos_sin_cache[positions.flatten()].chunk(2, dim=-1))
    for x in (query, key):
        heads = x.view(positions.numel(), -1, head_size)
        part = heads[..., : 2 * cos.shape[-1]].float()
        a, b = part.chunk(2, dim=-1) if is_neox else (part[..., ::2], part[..., 1::2])
        turned = a * cos - b * sin, b * cos + a * sin
        joined = torch.cat(turned, -1) if is_neox else torch.stack(turned, -1).flatten(-2)
        heads[..., : 2 * cos.shape[-1]] = joined.to(heads.dtype)
"""


def stand_in(folder: Path) -> None:
    """The rotation, importable in this process and in those that SGLang starts."""
    package = folder / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "_custom_ops.py").write_text(ROTATION)
    sys.path.insert(0, str(folder))  # processes that are spawned get the path of this one


def ours(folder: Path) -> list[list[int]]:
    """New tokens for every prompt by fp8kernels.serving, greedily."""
    import torch

    from fp8kernels.serving import load, load_tokenizer

    model, tokenizer = load(folder), load_tokenizer(folder)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = model.generate(ids, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def theirs(engine: Any) -> list[list[int]]:
    """The same by SGLang."""
    settings = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True, "min_new_tokens": TOKENS}
    return [engine.generate(prompt, settings)["output_ids"] for prompt in PROMPTS]


def main() -> int:
    """Print what was compared; 1 where tokens differ."""
    import sglang
    from serving import common

    from fp8kernels.export import export
    from fp8kernels.export.stream import pairs, stream
    from fp8kernels.training.step import adamw, train_step
    from fp8kernels.training.tokens import random_batches, token_stream

    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stand_in(folder / "path")
        model = common.trained("hif8-qat", steps=30)
        export(model, folder / "old", tokenizer=common.tokenizer())
        engine = sglang.Engine(
            model_path=str(folder / "old"),
            device="cpu",
            dtype="bfloat16",
            attention_backend="torch_native",
            sampling_backend="pytorch",
            grammar_backend="none",
            disable_cuda_graph=True,
            disable_overlap_schedule=True,
            max_total_tokens=512,
            log_level="error",
        )
        try:
            before = theirs(engine)
            wrong += report("as loaded", before, ours(folder / "old"))
            later = copy.deepcopy(model).train()
            optimizer, batches = (
                adamw(later, 3e-3),
                random_batches(token_stream(common.tokenizer(), common.TEXT), 4, 32, seed=1),
            )
            for _ in range(30):
                train_step(later, optimizer, next(batches))
            later.eval()
            export(later, folder / "new", tokenizer=common.tokenizer())
            tensors = list(pairs(stream(later, format="native")))
            for answer in (
                engine.begin_weight_update(),
                engine.update_weights_from_tensor(tensors),
                engine.end_weight_update(),
            ):
                print(f"update of {len(tensors)} tensors: {answer}")
            after = theirs(engine)
            wrong += report("as streamed", after, ours(folder / "new"))
            if after == before:
                print("the training changed no token: this says nothing of the update")
                wrong += 1
        finally:
            engine.shutdown()
    print(f"sglang {sglang.__version__}; stood in for: vllm._custom_ops.rotary_embedding")
    return 1 if wrong else 0


def report(what: str, found: list[list[int]], expected: list[list[int]]) -> int:
    """One line; how many prompts have other tokens."""
    differ = sum(a != b for a, b in zip(found, expected, strict=True))
    print(f"{what}: {len(found) - differ} of {len(found)} prompts with the same {TOKENS} tokens as fp8kernels.serving")
    return differ


if __name__ == "__main__":
    sys.exit(main())
