"""What the demo leaves behind: one table, one picture, and the same numbers as JSON."""

from __future__ import annotations

import json
import platform
import re
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ...export.atomic import write_file
from ...telemetry import LayerReport
from .sentences import SentenceResult
from .serve import ServingResult
from .size import DemoSize
from .train import TrainingResult

MEBI = 2**20


def table(
    sentences: list[SentenceResult], training: TrainingResult, serving: list[ServingResult], size: DemoSize
) -> Table:
    """The three parts as one table."""
    out = Table(title="fp8kernels demo", title_justify="left", show_header=False, pad_edge=False)
    for column in range(5):
        out.add_column(justify="left" if column == 0 else "right", overflow="fold")
    _sentence_rows(out, sentences, size)
    _training_rows(out, training)
    _serving_rows(out, serving)
    return out


def results(
    sentences: list[SentenceResult], training: TrainingResult, serving: list[ServingResult], size: DemoSize
) -> dict[str, Any]:
    """All numbers of the table, and the curves and per-layer rows behind them, ready for JSON."""
    errors = ("error_mean", "error_max", "error_bias")
    losses = ("validation_start", "validation_plain", "validation_qat")
    scalars = ("parameters", "training_tokens", *errors, *losses, "time_ratio", "plain_milliseconds")
    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "size": asdict(size),
        "sentences": [asdict(result) for result in sentences],
        "training": {
            **{name: getattr(training, name) for name in scalars},
            "pretrain_loss": training.pretrain_loss,
            "curves": asdict(training.curves),
            "layers": [asdict(row) for row in training.layers],
        },
        "serving": [asdict(result) for result in serving],
    }


def write_results(found: dict[str, Any], path: Path) -> None:
    """The results as JSON; whole or not at all."""
    write_file(path, lambda staged: staged.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8"))


def plot(training: TrainingResult, path: Path) -> None:
    """Both losses above, the absolute percentage error below, as a PNG; whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    begin = len(training.pretrain_loss)
    steps = range(begin, begin + len(training.curves.plain_loss))
    errors = [abs(error) for error in training.curves.error_percent()]
    figure, (losses, difference) = pyplot.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), constrained_layout=True
    )
    losses.plot(range(begin), training.pretrain_loss, color="0.6", label="BF16 pre-training")
    losses.plot(steps, training.curves.plain_loss, color="C0", label="BF16, continued")
    losses.plot(steps, training.curves.other_loss, color="C1", linestyle="--", label="HiF8 QAT, delayed scaling")
    losses.set_ylabel("training loss (nats per token)")
    losses.legend()
    difference.plot(steps, errors, color="C1", linewidth=1)
    difference.axhline(training.error_mean, color="0.4", linestyle=":", label=f"mean {training.error_mean:.3f} %")
    difference.set_ylabel("absolute error\nof the loss (%)")
    difference.set_xlabel("optimizer step")
    difference.set_ylim(bottom=0)
    difference.legend()
    for panel in (losses, difference):
        panel.grid(alpha=0.3)
    losses.set_title(
        f"Llama, {training.parameters / 1e6:.1f} M parameters, on Python's standard library;\n"
        f"HiF8 W8A8 beside BF16 from step {begin}"
    )
    try:
        write_file(path, lambda staged: figure.savefig(staged, dpi=120))
    finally:
        pyplot.close(figure)


def _sentence_rows(out: Table, sentences: list[SentenceResult], size: DemoSize) -> None:
    out.add_row(
        f"[bold]1. all-MiniLM-L6-v2, {size.sentences} sentences[/]", *(f"[bold]{r.precision}[/]" for r in sentences)
    )
    out.add_row("cosine to fp32 embeddings, mean", *(f"{r.cosine_mean:.5f}" for r in sentences))
    out.add_row("cosine to fp32 embeddings, lowest", *(f"{r.cosine_min:.5f}" for r in sentences))
    out.add_row("nearest neighbour as in fp32", *(f"{r.nearest:.1%}" for r in sentences))
    out.add_row("ten nearest as in fp32", *(f"{r.nearest_ten:.1%}" for r in sentences))
    out.add_row("linear weights with scales, MiB", *(_mebi(r.bytes_linear) for r in sentences))
    out.add_row("embeddings, norms, biases, MiB", *(_mebi(r.bytes_rest) for r in sentences))
    out.add_row(f"[dim]static scales from {size.calibration} other sentences, one per tensor[/]", end_section=True)


def _training_rows(out: Table, training: TrainingResult) -> None:
    count = f"{training.parameters / 1e6:.1f} M parameters"
    head = ("BF16", "HiF8 QAT", "HiF8 against BF16")
    out.add_row(f"[bold]2. Llama, {count}, trained[/]", *(f"[bold]{name}[/]" for name in head))
    plain, qat = training.curves.plain_loss[-1], training.curves.other_loss[-1]
    out.add_row("training loss, last step", f"{plain:.4f}", f"{qat:.4f}", f"{100 * (qat - plain) / plain:+.3f} %")
    plain, qat = training.validation_plain, training.validation_qat
    out.add_row("loss on held-out files", f"{plain:.4f}", f"{qat:.4f}", f"{100 * (qat - plain) / plain:+.3f} %")
    out.add_row("the same before the runs part", f"{training.validation_start:.4f}")
    out.add_row("absolute error of the loss, mean", "", "", f"{training.error_mean:.3f} %")
    out.add_row("absolute error of the loss, largest", "", "", f"{training.error_max:.3f} %")
    out.add_row("signed error of the loss, mean", "", "", f"{training.error_bias:+.3f} %")
    milliseconds = training.plain_milliseconds
    out.add_row("optimizer step, median", f"{milliseconds:.0f} ms", "", f"{training.time_ratio:.2f} x")
    out.add_row(
        "[italic]layers, worst of their kind[/]",
        *(f"[italic]{name}[/]" for name in ("input sat.", "input SQNR", "weight sat.", "weight SQNR")),
    )
    kinds = _kinds(training.layers)
    for index, (kind, cells) in enumerate(kinds.items()):
        out.add_row(kind, *cells, end_section=index == len(kinds) - 1)


def _kinds(rows: list[LayerReport]) -> dict[str, list[str]]:
    """Layers that differ only in a number share a line: most saturated, lowest SQNR, of inputs and of weights."""
    by_kind: dict[str, dict[str, list[LayerReport]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_kind[re.sub(r"\d+", "*", row.layer).removeprefix("model.")][row.role].append(row)
    out = {}
    for kind, roles in by_kind.items():
        cells = []
        for role in ("input", "weight"):
            measured = [row.sqnr_db for row in roles[role] if row.sqnr_db is not None]
            cells.append(f"{max(row.saturated for row in roles[role]):.2%}")
            cells.append(f"{min(measured):.1f} dB" if measured else "")
        out[f"{kind} ({len(roles['input'])})"] = cells
    return out


def _serving_rows(out: Table, serving: list[ServingResult]) -> None:
    plain, coded = serving
    out.add_row(
        "[bold]3. The same Llama served[/]", "[bold]BF16[/]", "[bold]HiF8 W8A8[/]", "[bold]HiF8 against BF16[/]"
    )
    speed = coded.tokens_per_second / plain.tokens_per_second
    out.add_row(
        "tokens/s, batch 1", f"{plain.tokens_per_second:.1f}", f"{coded.tokens_per_second:.1f}", f"{speed:.2f} x"
    )
    size = coded.weight_bytes / plain.weight_bytes
    out.add_row("weights on disk, MiB", _mebi(plain.weight_bytes), _mebi(coded.weight_bytes), f"{size:.2f} x")
    size = coded.model_bytes / plain.model_bytes
    out.add_row("weights in memory, MiB", _mebi(plain.model_bytes), _mebi(coded.model_bytes), f"{size:.2f} x")


def _mebi(count: int) -> str:
    return f"{count / MEBI:.2f}"
