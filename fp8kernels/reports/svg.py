"""Figures by matplotlib as SVG that stands in a page: no outside names, ids of its own, the page's colours and font."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from .html import Markup, clean, tag

SERIES = 7  # colours of the page (page.css): --c0 … --c6, tellable apart without seeing colours
INK, MUTED, GRID = "#0a0c00", "#0a0c01", "#0a0c02"  # stand-ins that become the page's colours, in light and in dark
STAND_INS = {INK: "--ink", MUTED: "--muted", GRID: "--grid"}
STAND_INS |= {f"#0a0b{n:02x}": f"--c{n}" for n in range(SERIES)}
DASHES = ("-", "--", ":", "-.")  # beyond the colours
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fp8kernels",
    "text.parse_math": False,
    "text.usetex": False,
    "axes.unicode_minus": True,
    "axes.formatter.use_mathtext": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.labelsize": 10.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "image.interpolation": "none",
    "path.simplify": True,
}


def colour(n: int) -> str:
    """The stand-in of the page's n-th colour."""
    return f"#0a0b{n % SERIES:02x}"


def dash(n: int) -> str:
    """The line style of the n-th series: another one once the colours begin again."""
    return DASHES[n // SERIES % len(DASHES)]


class Plots:
    """Makes the figures of one page, numbered, so that their ids differ."""

    def __init__(self) -> None:
        self.count = 0

    @contextlib.contextmanager
    def draw(self, width: float, height: float) -> Iterator[Any]:
        """A new matplotlib figure of that many inches, with the page's style in force.

        raises   ImportError naming the extra, where matplotlib is missing
        """
        try:
            import matplotlib
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                f"a report needs matplotlib: pip install 'fp8kernels[eval]' or 'matplotlib' ({error})"
            ) from None
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            yield Figure(figsize=(width, height), layout="constrained")

    def figure(self, drawn: Any, title: str, alt: str, caption: str, *, wide: bool = False) -> Markup:
        """A figure element: plot, what it shows in words for who cannot see it, and a caption.

        Call it within `draw`, so that the style holds.
        """
        self.count += 1
        image = svg(drawn, f"f{self.count}", title, alt)
        plot = tag("div", image, class_="plot", tabindex="0", role="group", aria_label=f"{title}, scrollable")
        text = tag("figcaption", tag("strong", f"Figure {self.count}. {title}. "), caption)
        return tag("figure", plot, text, class_="wide" if wide else None)


def svg(drawn: Any, prefix: str, title: str, alt: str) -> Markup:
    """A matplotlib figure as an <svg> element that refers to nothing outside of itself."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has more fonts
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("}metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            key.rpartition("}")[2]: _own(value, prefix, key.rpartition("}")[2]) for key, value in element.items()
        }
    width = root.attrib.pop("width", "")
    root.attrib.pop("height", None)
    root.attrib.pop("version", None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{prefix}-title {prefix}-desc"}
    root.attrib["style"] = f"--width: {float(width.removesuffix('pt')) * 4 / 3:.0f}px"
    for name, text in (("desc", alt), ("title", title)):
        element = ElementTree.Element(name, {"id": f"{prefix}-{name}"})
        element.text = clean(text)  # a tree escapes by itself
        root.insert(0, element)
    for style in root.iter("style"):
        style.text = _own(style.text or "", prefix, "style").replace("*{", f"#{prefix} *{{")
    root.attrib["id"] = prefix
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _own(value: str, prefix: str, key: str) -> str:
    """An attribute with this figure's ids, the page's colours and its font."""
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    value = value.replace("url(#", f"url(#{prefix}-")
    for stand_in, name in STAND_INS.items():
        value = value.replace(stand_in, f"var({name})")
    return re.sub(r"(font(?:-family)?: ?[^;'\"]*)['\"]DejaVu Sans['\"][^;]*", r"\1var(--font)", value)
