"""Checkpoints by which `fp8kernels check` is held against vLLM: what is written, and what vLLM then did.

The outcomes are in recorded/vllm-0.33.0-outcomes.json; peers/vllm_loader.py makes them with vLLM's own code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from serving import folders

from fp8kernels.export import explain_servers
from fp8kernels.models.llama import LlamaSize

OUTCOMES = Path(__file__).parent / "recorded" / "vllm-0.33.0-outcomes.json"
REFUSED, WRONG = "refused", "wrong"
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SIZES = {
    "even": folders.SIZE,
    "intermediate 320": LlamaSize(vocab=300, hidden=128, intermediate=320, layers=1, heads=2, context=64),
    "keys of 64": LlamaSize(vocab=300, hidden=256, intermediate=256, layers=1, heads=4, kv_heads=1, context=64),
    "hidden 192": LlamaSize(vocab=300, hidden=192, intermediate=384, layers=1, heads=2, context=64),
}


@dataclass(frozen=True)
class Case:
    """One folder. `small` divides every scale of weights by that."""

    layout: str
    size: str = "even"
    share: bool = True
    small: int = 1

    @property
    def name(self) -> str:
        return f"{self.layout}, {self.size}, {'shared' if self.share else 'apart'}, scales / {self.small}"


CASES = (
    *(Case(layout, share=share) for layout in folders.LAYOUTS for share in (True, False)),
    *(Case(layout, size) for layout in ("static", "dynamic", "block", "fp8", "fp8-block") for size in list(SIZES)[1:]),
    *(Case(layout, small=small) for layout in ("static", "dynamic", "fp8") for small in (16, 256)),
)


def write(case: Case, folder: Path) -> None:
    """The folder of a case; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    size, blocks = SIZES[case.size], "block" in case.layout
    ragged = blocks and case.size != "even"
    folders.write_folder(folder, "dynamic" if ragged else case.layout, share=case.share, size=size)
    tensors = folders.read(folder)
    for name in [name for name in tensors if name.endswith("weight_scale") and (ragged or case.small > 1)]:
        scale = tensors.pop(name)
        if ragged:  # codes of a row's scale under a grid's: other weights, as good as any
            rows, columns = tensors[name.removesuffix("_scale")].shape
            grid = torch.arange(1.0, 1 + -(-rows // 128) * -(-columns // 128)) * 2**-12  # all different
            key = "weight_scale_inv" if case.layout == "fp8-block" else "weight_scale"
            name = f"{name.rpartition('.')[0]}.{key}"
            scale = grid.reshape(-(-rows // 128), -1)
        tensors[name] = scale / case.small
    folders.save(folder, tensors)
    folders.edit_config(folder, folders.settings(case.layout))


def misjudged(folder: Path, outcome: dict[str, int] | str) -> list[str]:
    """Where `explain_servers` says something else of vLLM than it did.

    outcome  the reason of a refusal, or by layer of vLLM how many codes changed, -1 where numbers are wrong otherwise
    """
    said = {row.layer: row.vllm for row in explain_servers(folder)}
    refused = [name for name, text in said.items() if text.startswith(REFUSED)]
    if isinstance(outcome, str):
        return [] if refused else [f"vLLM refuses ({outcome}), and nothing says so"]
    found = [f"{name} is said to be {said[name]!r}; vLLM loads it" for name in refused]
    for name, changed in outcome.items():
        parent, _, last = name.rpartition(".")
        texts = {said.get(f"{parent}.{part}", "nothing") for part in PARTS.get(last, (last,))}
        wrong = any(text.startswith(WRONG) for text in texts)
        rounded = any("rounded again" in text and "nothing lost" not in text for text in texts)
        small = any("smallest codes" in text for text in texts)
        possible = {rounded} | ({True} if small else set())
        if wrong != (changed < 0) or (changed > 0) not in possible:
            found.append(f"{name} is said to be {' / '.join(sorted(texts))!r}; {changed} codes changed")
    return found


def outcomes() -> dict[str, dict[str, int] | str]:
    """What vLLM did with each case."""
    recorded: dict[str, dict[str, int] | str] = json.loads(OUTCOMES.read_text(encoding="utf-8"))
    return recorded
