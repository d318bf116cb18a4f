"""What `fp8kernels check` says of vLLM, against what vLLM's own loader did with the same folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from serving import vllm_cases

from fp8kernels.export import explain_servers, export


@pytest.mark.parametrize("case", vllm_cases.CASES, ids=lambda case: case.name)
def test_what_is_said_of_vllm_is_what_it_did(case: vllm_cases.Case, tmp_path: Path) -> None:
    vllm_cases.write(case, tmp_path)
    assert vllm_cases.misjudged(tmp_path, vllm_cases.outcomes()[case.name]) == []


def test_the_outcomes_hold_every_kind() -> None:
    found = vllm_cases.outcomes()
    refused = [name for name, outcome in found.items() if isinstance(outcome, str)]
    changed = [name for name, outcome in found.items() if isinstance(outcome, dict) and any(outcome.values())]
    assert set(found) == {case.name for case in vllm_cases.CASES}
    assert refused and changed and len(found) > len(refused) + len(changed)


def test_a_native_folder_whose_shards_are_not_read_alike_is_said_to_be_refused(e4m3_block: Any, tmp_path: Path) -> None:
    """Keys and values of 64 rows stay in high precision beside queries in blocks: the plug-ins refuse them as one."""
    export(e4m3_block, tmp_path / "model")
    said = {row.layer: row for row in explain_servers(tmp_path / "model")}
    mixed, whole = said["model.layers.0.self_attn.q_proj"], said["model.layers.0.mlp.gate_proj"]
    assert mixed.vllm.startswith("refused") and mixed.sglang.startswith("refused")
    assert whole.vllm.startswith("8-bit") and mixed.transformers == whole.transformers
