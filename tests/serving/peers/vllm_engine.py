"""Generate with vLLM's engine from a native folder, without a GPU, and hold its tokens against fp8kernels.serving.

    VLLM_TARGET_DEVICE=cpu python tests/serving/peers/vllm_engine.py FOLDER

with an interpreter that has vLLM 0.33 and fp8kernels; FOLDER was exported with a tokenizer and dtype=torch.float32, so
that both sides compute alike. vLLM finds the plug-in through its entry point; its scheduler, paged cache of keys and
values, model class, layers and sampling run as they are, four prompts at once. What stands in for vLLM's own compiled
part, which its wheels for GPUs do not have for a CPU, is written here in torch: storing keys and values in their pages,
attention over pages, slots of tokens, and the largest logit. Nothing is timed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the stand-ins are of this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

PROMPTS = ("def add(a", "class Sum:", "return a + b\n", "def total(self):\n    return self.value\n")
NEW_TOKENS, CONTEXT = 24, 64


def stand_in() -> None:
    """What vLLM's wheel for GPUs lacks on a CPU."""
    from vllm import _custom_ops as ops

    ops.cpu_attn_get_scheduler_metadata = lambda **named: torch.zeros(1, dtype=torch.int32)
    ops.cpu_attn_reshape_and_cache = _store
    ops.cpu_attention_with_kv_cache = _attend
    torch.ops._C.init_cpu_memory_env = lambda nodes: None
    torch.ops._C.compute_slot_mapping_kernel_impl = _slots
    torch.ops._C.greedy_argmax = lambda logits: logits.argmax(-1)


def _store(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, *rest: Any, **named: Any
) -> None:
    """key, value [tokens, heads, width] into caches [pages, heads, page, width]."""
    page = key_cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            key_cache[slot // page, :, slot % page] = key[token]
            value_cache[slot // page, :, slot % page] = value[token]


def _attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    output: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    causal: bool,  # noqa: FBT001  vLLM's own order
    alibi_slopes: Tensor | None,
    sliding_window: Any,
    block_table: Tensor,
    softcap: float,
    *rest: Any,
    **named: Any,
) -> None:
    """query [tokens, heads, width] of requests one after another, each against the pages of its row of the table."""
    page = key_cache.shape[2]
    for request, length in enumerate(seq_lens.tolist()):
        start, stop = query_start_loc[request : request + 2].tolist()
        pages = block_table[request, : -(-length // page)].long()
        k, v = (cache[pages].transpose(0, 1).flatten(1, 2)[:, :length] for cache in (key_cache, value_cache))
        q = query[start:stop].transpose(0, 1)
        mask = torch.ones(stop - start, length, dtype=torch.bool).tril(length - (stop - start))
        shared = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        output[start:stop] = found.transpose(0, 1).reshape(output[start:stop].shape)


def _slots(query_start_loc: Tensor, positions: Tensor, table: Tensor, slots: Tensor, page: int) -> None:
    for request in range(len(query_start_loc) - 1):
        for token in range(int(query_start_loc[request]), int(query_start_loc[request + 1])):
            position = int(positions[token])
            slots[token] = int(table[request, position // page]) * page + position % page


def main(folder: str) -> int:
    """Print each prompt's tokens; 1 if vLLM's are not those of fp8kernels.serving."""
    import vllm

    from fp8kernels.serving import load, load_tokenizer

    stand_in()
    ids = [load_tokenizer(folder)(prompt)["input_ids"] for prompt in PROMPTS]
    engine = vllm.LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_seqs=len(PROMPTS),
        compilation_config={"custom_ops": ["none"]},  # norms and rotary embedding by vLLM's own torch code
    )
    settings = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": each} for each in ids], settings, use_tqdm=False)
    model, different = load(Path(folder)), 0
    print(f"vllm {vllm.__version__}, {engine.llm_engine.model_config.quantization}, {len(ids)} prompts at once")
    for prompt, each, output in zip(PROMPTS, ids, outputs, strict=True):
        tokens = torch.tensor([each])
        expected = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )[0, len(each) :].tolist()
        found = list(output.outputs[0].token_ids)
        different += found != expected
        print(f"{prompt!r}: {'equal' if found == expected else f'{found} is not {expected}'}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
