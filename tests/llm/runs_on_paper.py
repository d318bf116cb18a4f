"""Run folders written by hand, for what reads them: losses, layers, probe and events of any size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fp8kernels.runs import Run

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def write_run(
    folder: Path,
    *,
    steps: int = 60,
    layers: int = 0,
    every: int = 10,
    looks: int = 0,
    worse: float = 0.0,
    evaluated: bool = False,
    events: int = 0,
    spike: int | None = None,
    seed: int = 0,
    **info: Any,
) -> Run:
    """A run as training leaves it; the same arguments give the same rows.

    layers  of the model, measured every `every` steps; 0 for a run in high precision
    looks   of the probe after the start; worse: how much the loss and the probe lose, as a fraction
    spike   a step from which the amax of one weight is 16 times its scale's
    """
    draw = np.random.default_rng(seed)
    run = Run.create(folder, **({"steps": steps, "parameters": 12_345_678} | info))
    noise = np.random.default_rng(99).normal(size=steps)  # the batches are those of every run
    for step in range(1, steps + 1):
        loss = 2.0 + 3.0 * math.exp(-4 * step / steps) + 0.05 * noise[step - 1]
        loss *= 1 + worse * step / steps + (0.002 * draw.normal() if worse else 0)
        row = {"step": step, "loss": loss, "tokens": 4096, "tokens_per_second": 20_000 + 500 * draw.normal()}
        if step % max(1, steps // 5) == 0:
            row["validation_loss"] = loss + 0.1
        run.append("log", row)
    rows = []
    for step in range(every, steps + 1, every):
        for n in range(layers):
            name = f"model.layers.{n // len(LINEARS)}.{LINEARS[n % len(LINEARS)]}"
            for role, target in (("input", 15.0), ("weight", 15.0), ("grad", 224.0)):
                amax = (1 + 0.2 * n) * math.exp(0.1 * draw.normal())
                hit = spike is not None and step >= spike and role == "weight" and n == layers // 2
                scale = amax * math.exp(-0.02 * abs(draw.normal())) / target / (16 if hit else 1)
                rows.append(
                    {
                        "step": step,
                        "layer": name,
                        "role": role,
                        "amax": amax,
                        "scale": scale,
                        "target": target,
                        "past_target": 0.31 if hit else 1e-5 * abs(draw.normal()),
                        "past_maximum": 0.0,
                        "bits_lost": 1.2 if hit else 1.0,
                        "stale": amax / scale / target,
                        "sqnr_db": 22.0 if hit else 31.5 + 0.2 * draw.normal(),
                    }
                )
    run.append("layers", *rows)
    start = draw.random(100) < 0.8
    for look in range(looks + 1 if looks else 0):
        now = start & (draw.random(100) > worse * look / looks)
        row = {"step": look * steps // looks, "answers": now.astype(int).tolist(), "accuracy": float(now.mean())}
        if look:
            drop = float(start.mean() - now.mean())
            row |= {"drop": drop, "low": drop - 0.03, "high": drop + 0.04, "p_value": 0.021}
        run.append("probe", row)
    run.append("events", *({"step": n + 1, "kind": "saturation", "text": f"event number {n}"} for n in range(events)))
    if evaluated:
        task = {"metric": "acc_norm", "unit": "accuracy", "items": 400, "first": 0.4321, "second": 0.4211,
                "drop": 0.011, "relative_drop": 0.0255, "low": -0.002, "high": 0.024, "p_value": 0.11,
                "p_holm": 0.22, "detectable_drop": 0.019}  # fmt: skip
        bits = {"metric": "bits_per_byte", "unit": "bits per byte", "items": 50, "first": 1.1, "second": 1.125,
                "drop": 0.025, "relative_drop": 0.0227, "low": 0.02, "high": 0.03}  # fmt: skip
        found = {"model": {"path": "a"}, "against": {"path": "bf16", "precision": "bfloat16"}, "paired": True,
                 "tasks": {"arc_easy": task, "text": bits}, "warnings": ["only the first 400 were asked"]}  # fmt: skip
        (folder / "eval.json").write_text(json.dumps(found), encoding="utf-8")
    run.finish("done")
    return run
