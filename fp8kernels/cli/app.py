"""The commands about this machine and the demo, and the app that all commands belong to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from ..console import console
from .errors import mistakes

app = typer.Typer(
    help="PyTorch models that train and serve on 8-bit floats (HiF8, E4M3, E5M2).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.command()
def info() -> None:
    """Versions, the processor, and each verb's backends with the reason where one is absent."""
    from .. import info as page

    console().print(page.table(page.info()))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where the plot, the numbers and the model go")] = Path("runs/demo"),
    *,
    quick: Annotated[bool, typer.Option(help="seconds instead of minutes: a smaller model, fewer steps")] = False,
) -> None:
    """The main job on real input: real weights in 8 bits, a QAT run beside BF16, and serving what was trained."""
    from ..training.demo import run_demo

    run_demo(out, quick=quick)


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="what fp8kernels.export wrote")],
    prompt: Annotated[str, typer.Option(help="the text to go on from")],
    new_tokens: Annotated[int, typer.Option(help="tokens to add")] = 64,
    repeats: Annotated[int, typer.Option(help="more than 1: timed after a warm-up, the median counts")] = 1,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print the run as one JSON object")] = False,
) -> None:
    """Load an exported model with its 8-bit weights and go on from a prompt."""
    from ..serving import generate as run

    with mistakes():
        done = run(folder, prompt, new_tokens=new_tokens, repeats=repeats)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done)))
    else:
        typer.echo(f"{done.text}\n\n{done.tokens_per_second:.1f} tokens/s")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Run the benches of a source tree with pytest; further arguments go to pytest (-k gemm --fmt hif8)."""
    import subprocess
    import sys

    folder = Path(__file__).parent.parent.parent / "bench"
    if not folder.is_dir():
        raise typer.BadParameter(f"the benches are in the source tree, and {folder} is not there; clone the project")
    raise typer.Exit(subprocess.call([sys.executable, "-m", "pytest", str(folder), *context.args], cwd=folder.parent))
