"""How large the demo is: one value for the real run, one for the test of the run."""

from __future__ import annotations

from dataclasses import dataclass

from ...models.llama import LlamaSize


@dataclass(frozen=True)
class DemoSize:
    """All the numbers of the demo that cost time.

    sentences         compared; as many as `calibration` others set the scales
    text_bytes        of the standard library's sources that are read, training and held-out files together
    batch, sequence   of one training step, in tokens: batch * sequence
    pretrain_steps    in BF16, before the two runs part
    paired_steps      of the QAT run and of the BF16 run beside it
    learning_rate     the peak; it warms up, then falls along a cosine over both phases
    """

    sentences: int
    calibration: int
    llama: LlamaSize
    text_bytes: int
    batch: int
    sequence: int
    pretrain_steps: int
    paired_steps: int
    validation_batches: int
    new_tokens: int
    repeats: int
    learning_rate: float = 1e-3


FULL = DemoSize(
    sentences=300,
    calibration=64,
    llama=LlamaSize(vocab=2048, hidden=384, intermediate=1024, layers=4, heads=6, context=256),
    text_bytes=3_000_000,
    batch=8,
    sequence=128,
    pretrain_steps=110,
    paired_steps=90,
    validation_batches=8,
    new_tokens=96,
    repeats=5,
)

QUICK = DemoSize(
    sentences=24,
    calibration=8,
    llama=LlamaSize(vocab=512, hidden=64, intermediate=128, layers=2, heads=2, context=128),
    text_bytes=300_000,
    batch=4,
    sequence=64,
    pretrain_steps=12,
    paired_steps=8,
    validation_batches=2,
    new_tokens=12,
    repeats=2,
)
