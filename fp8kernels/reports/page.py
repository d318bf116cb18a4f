"""The page: sections in order, one file, nothing loaded from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..export.atomic import write_file
from ..runs import Run
from .contents import contents
from .curves import distances, losses_of, speeds
from .html import Markup, escape, join, tag
from .knowledge import evaluations, probes
from .layers import layers_of
from .overview import happenings, runs_of
from .svg import Plots

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # a browser is to fetch nothing either


def write_report(runs: Sequence[Run], out: Path | str) -> Path:
    """Write one HTML page about runs; it loads nothing, so it can be kept and sent as it is.

    runs     the first one is what the others are compared with, where they name no baseline of their own
    out      the file; folders above it are made, and a file that is there is replaced, whole or not at all
    returns  the file
    raises   ValueError without runs, if `out` is a folder, or if a run's rows cannot be read; ImportError naming the
             extra if matplotlib is missing

    What a run does not have is said in a sentence. Long curves are thinned, always in the same way: a page of the same
    runs is the same to the byte.
    """
    out = Path(out)
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give the page a name, such as {out / 'report.html'}")
    text = page(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, lambda staged: staged.write_text(text, encoding="utf-8"))
    return out


def page(runs: Sequence[Run]) -> str:
    """The text of the page."""
    items, plots = contents(runs), Plots()
    sections = (
        ("runs", "Runs", runs_of(items)),
        ("loss", "Loss", losses_of(items, plots)),
        ("baseline", "Distance from the baseline", distances(items, plots)),
        ("speed", "Speed", speeds(items, plots)),
        ("layers", "Layers: amax, scale, saturation", layers_of(items, plots)),
        ("probe", "Knowledge probe", probes(items, plots)),
        ("evaluation", "Evaluation", evaluations(items)),
        ("events", "Events", happenings(items)),
    )
    title = items[0].label if len(items) == 1 else f"{len(items)} runs: " + ", ".join(item.label for item in items)
    contents_list = tag("ol", *(tag("li", tag("a", name, href=f"#{key}")) for key, name, _ in sections))
    body = [
        tag("header", tag("h1", title), tag("p", "Training in 8-bit floats, by fp8kernels.", class_="lead")),
        tag("nav", contents_list, aria_label="Contents"),
        tag("main", *(_section(key, name, content) for key, name, content in sections)),
        tag("footer", "Everything here was read from the runs' folders; this file loads nothing."),
    ]
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n{join(body)}\n</body>\n</html>\n"
    )


def _section(key: str, name: str, content: Markup) -> Markup:
    return tag("section", tag("h2", name, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")


def _style() -> str:
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
