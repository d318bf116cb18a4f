"""fp8kernels serve MODEL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import mistakes


def serve(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="a folder of fp8kernels.export, of another tool, or in high precision")],
    host: Annotated[str, typer.Option(help="where to listen; 0.0.0.0 for everyone who can reach this machine")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes any free one")] = 8000,
    name: Annotated[list[str] | None, typer.Option("--served-model-name", help="further names of the model")] = None,
    engine: Annotated[str, typer.Option(help="auto, transformers (in this process), or vllm")] = "auto",
    head: Annotated[str | None, typer.Option(help="hif8 or e4m3: the head in 8 bits too")] = None,
    kv_cache: Annotated[str | None, typer.Option(help="hif8 or e4m3: keys and values in 8 bits")] = None,
    waiting: Annotated[int, typer.Option(help="requests that wait; one more is refused with 503")] = 32,
    grace: Annotated[int, typer.Option(help="seconds that requests have to end after SIGTERM")] = 30,
) -> None:
    """Serve a checkpoint over OpenAI's HTTP interface; words after `--` go to `vllm serve`."""
    with mistakes():
        from ..serving.server import Settings
        from ..serving.server import serve as run

        settings = Settings(
            host=host,
            port=port,
            names=tuple(name or ()),
            engine=engine,
            head=head,
            kv_cache=kv_cache,
            waiting=waiting,
            grace_seconds=grace,
            extra=tuple(context.args),
        )
        code = run(model, settings)
    raise typer.Exit(code)
