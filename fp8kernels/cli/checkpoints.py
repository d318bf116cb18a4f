"""fp8kernels export MODEL, fp8kernels check FOLDER."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from ..console import console
from .errors import mistakes

DOCUMENTS = 256  # of the given text; scales are settled long before


def export(
    model: Annotated[Path, typer.Argument(help="a run of `train llm`, or a folder with a causal language model")],
    out: Annotated[Path, typer.Option(help="the folder to write")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="native (the codes as they were trained, HiF8 too), compressed-tensors (static scales), "
            "compressed-tensors-dynamic, compressed-tensors-block, or fp8 (static)",
        ),
    ] = "native",
    recipe: Annotated[str | None, typer.Option(help="for a model that was not trained in 8 bits")] = None,
    text: Annotated[list[str] | None, typer.Option(help="text, JSONL or parquet to calibrate such a model on")] = None,
    dtype: Annotated[str, typer.Option(help="of what stays in high precision: bfloat16 or float32")] = "bfloat16",
) -> None:
    """Write a checkpoint with 8-bit weights that transformers, vLLM and SGLang load."""
    from ..integrations.exported import export_folder
    from ..training.llm.documents import read_documents

    with mistakes():
        import torch

        found = [document.text for document in islice(read_documents(text), DOCUMENTS)] if text else []
        if text and not any(found):
            raise ValueError(f"{', '.join(text)}: no text to calibrate on; give plain text or records with 'text'")
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype is {dtype!r}; it is bfloat16 or float32")
        report = export_folder(
            model, out, format=form, recipe=recipe, texts=[one for one in found if one], dtype=getattr(torch, dtype)
        )
    console().print(report.table())
    typer.echo(f"wrote {out}")


def check(
    folder: Annotated[Path, typer.Argument(help="a checkpoint: of fp8kernels.export, or made by others")],
    *,
    layers: Annotated[bool, typer.Option("--layers", help="a line for each layer, also where lines are equal")] = False,
) -> None:
    """Whether a checkpoint is whole (exit code 1: it is not), and what transformers, vLLM and SGLang do with it."""
    from ..export import check_report

    with mistakes():
        report = check_report(folder)
    if report.rows:
        console().print(report.table(layers=layers))
    for warning in report.warnings:
        typer.echo(f"warning: {warning}")
    for problem in report.problems:
        typer.echo(f"problem: {problem}", err=True)
    if report.problems:
        raise typer.Exit(1)
    typer.echo(f"{folder} is whole: {len(report.rows)} linear layers, no problem found")
