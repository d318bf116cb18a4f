"""The page of runs: what the folders say stands in it, nothing is loaded from outside, and a browser lays it out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llm.runs_on_paper import write_run

from fp8kernels.reports import write_report
from fp8kernels.reports.page import page
from fp8kernels.reports.thin import COLUMNS, ROWS, thin, thin_grid
from fp8kernels.runs import Run

VOID = {"meta", "link", "br", "img", "hr", "input"}
LOADS = {"src", "href", "srcset", "data", "action", "poster", "background", "formaction"}  # attributes that may fetch
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&$\\frac{1}{0}$ _x \x01\ud800"


class Page(HTMLParser):
    """The elements of a page: nesting that is right, ids, texts by element, tables as lists of rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.tables: list[list[list[str]]] = []
        self.alts: list[dict[str, str | None]] = []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for key, value in attrs:
            if key == "id":
                self.ids[value or ""] += 1
            if key in LOADS or key == "xlink:href":
                self.fetched.append(value or "")
            if key.startswith("on"):
                self.handlers.append(key)
            self.fetched += re.findall(r"url\(([^)]*)\)", value or "")
        if tag == "svg":
            self.alts.append(dict(attrs))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data
        if any(tag in self.open for tag in ("td", "th")):
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> list[list[str]]:
        """The table whose first heads begin so."""
        return next(table for table in self.tables if ", ".join(table[0]).startswith(first))


def three(folder: Path) -> list[Run]:
    base = write_run(folder / "bf16", looks=4, recipe=None)
    hif8 = write_run(
        folder / "hif8", layers=9, looks=4, worse=0.02, evaluated=True, events=2, spike=40, seed=1,
        recipe="hif8-qat", baseline=str(folder / "bf16"), config={"learning_rate": 1e-5},
    )  # fmt: skip
    bare = write_run(folder / "bare", seed=2, worse=0.01)
    bare.finish("stopped", "the loss is NaN at step 61")
    return [base, hif8, bare]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs")
    out = write_report(three(folder), folder / "pages" / "report.html")
    return out.read_text(encoding="utf-8")


def test_the_page_is_whole_and_loads_nothing(text: str) -> None:
    found = Page(text)
    assert found.tags["svg"] == found.tags["figure"] == found.tags["figcaption"] > 8
    assert not found.tags["script"] and not found.handlers
    assert all(value.startswith(("#", "data:image/png")) for value in found.fetched), found.fetched
    assert not re.search(r"https?:|//[\w.]+/|@import|@font-face", re.sub(r"base64,[\w+/=\s]+", "", text))
    assert max(found.ids.values()) == 1, "ids must differ"
    inside = {value[1:] for value in found.fetched if value.startswith("#")}
    assert inside <= set(found.ids)
    assert found.texts["h2"] == [
        "Runs", "Loss", "Distance from the baseline", "Speed", "Layers: amax, scale, saturation", "Knowledge probe",
        "Evaluation", "Events",
    ]  # fmt: skip
    assert found.tags["h1"] == found.tags["main"] == found.tags["nav"] == 1
    assert all(alt["role"] == "img" and alt["aria-labelledby"] for alt in found.alts)
    assert all(len(caption) > 60 for caption in found.texts["figcaption"])


def test_the_numbers_of_the_folders_stand_in_the_page(text: str, tmp_path: Path) -> None:
    found, runs = Page(text), three(tmp_path)
    losses = [[row["loss"] for row in run.rows("log")] for run in runs]
    for run, loss, row in zip(runs, losses, found.table("run, steps, first")[1:], strict=True):
        assert row[:3] == [run.path.name, "60", f"{loss[0]:.4f}"]
        assert row[3] == f"{np.mean(loss[-6:]):.4f}"
        assert row[4] == f"{[r['validation_loss'] for r in run.rows('log') if 'validation_loss' in r][-1]:.4f}"
    errors = 100 * np.abs(np.array(losses[1]) - losses[0]) / np.abs(losses[0])
    row = found.table("run, against")[1]
    assert row[:4] == ["hif8", "bf16", "60", f"{errors.mean():.3f} %"]
    low, high = (float(part) for part in row[4].removesuffix(" %").split(" to "))
    assert low < errors.mean() < high
    assert row[5] == f"{errors.max():.3f} % at step {errors.argmax() + 1}"
    worst = found.table("layer, tensor")[1]
    assert worst[:2] == ["model.layers.0.mlp.gate_proj", "weight"]
    assert 15 < float(worst[3]) < 18 and worst[4:6] == ["31.000%", "0.000%"]
    probe = found.table("run, items")[2]
    last = runs[1].rows("probe")[-1]
    assert probe[1] == "100" and probe[3] == f"{last['accuracy']:.1%} at step 60"
    assert probe[4] == f"{100 * last['drop']:+.2f} points"
    task, bits = found.table("task, metric")[1:]
    assert task[:5] == ["arc_easy", "acc_norm", "400", "43.21%", "42.11%"]
    assert task[5:8] == ["+1.10 points", "-0.20 to +2.40 points", "+2.55%"]
    assert task[8:] == ["0.11", "0.22", "1.90 points"]
    assert bits[3:7] == ["1.1000", "1.1250", "+0.0250", "+0.0200 to +0.0300"]
    header = found.table("run, status")
    assert header[3][1:3] == ["stopped", "the loss is NaN at step 61"]
    assert header[2][3:5] == ["hif8-qat", "12.3 M"]
    assert found.table("step, kind")[1] == ["1", "saturation", "event number 0"]


def test_what_a_run_does_not_have_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "alone", steps=3, every=5)
    found = Page(page([run]))
    said = " ".join(found.texts["p"])
    for sentence in (
        "No layers were measured",
        "No run was asked a knowledge probe",
        "No run was evaluated",
        "alone is compared with no run: it names no baseline",
        "alone: nothing happened",
    ):
        assert sentence in said
    empty = Run.create(tmp_path / "empty")
    said = " ".join(Page(page([empty])).texts["p"])
    assert "no run has a finite number" in said and "No run noted its tokens per second" in said


def test_a_baseline_is_not_compared_with_the_run_that_names_it(tmp_path: Path) -> None:
    base, hif8, bare = three(tmp_path)
    found = Page(page([hif8, base, bare]))
    rows = found.table("run, against, steps")[1:]
    assert [row[:2] for row in rows] == [["hif8", "bf16"], ["bare", "hif8"]]
    assert "bf16 is compared with no run: it names no baseline" in " ".join(found.texts["p"])


def test_a_half_written_run_is_drawn_as_far_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "cut", layers=2, looks=2, baseline=str(tmp_path / "gone"))
    run.append("layers", {"step": None, "layer": None, "role": "input"}, {"step": 70, "layer": "x", "role": "what"})
    run.append("log", {"step": 61, "loss": None}, {"step": 62, "loss": "many", "tokens_per_second": True})
    with run.file("layers").open("a", encoding="utf-8") as file:
        file.write('{"step": 61, "layer": "model.la')
    found = Page(page([Run.open(run.path)]))
    assert "its baseline cannot be read" in " ".join(found.texts["p"])
    assert found.table("run, steps, first")[1][1] == "60"


def test_what_stands_in_files_is_text_and_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "x", looks=1, name=HOSTILE, recipe=HOSTILE, config={HOSTILE: HOSTILE}, reason=HOSTILE)
    run.append("events", {"step": 1, "kind": HOSTILE.replace("\ud800", ""), "text": HOSTILE.replace("\ud800", "")})
    layer = {
        "role": "input",
        "amax": 1.0,
        "scale": 1.0,
        "target": 1.0,
        "past_target": 0.1,
        "stale": 1.0,
        "sqnr_db": 3.0,
    }
    run.append("layers", *({"step": 5, "layer": f"{HOSTILE[:-1]} {n}"} | layer for n in range(3)))
    (run.path / "eval.json").write_text(json.dumps({"tasks": {HOSTILE: {"metric": HOSTILE}}, "against": HOSTILE}))
    text = page([run, run])
    found = Page(text)
    assert not found.tags["script"] and not found.tags["img"] and not found.handlers
    assert "<script>alert(1)" in found.texts["h1"][0]  # as text
    assert any("$\\frac{1}{0}$ _x" in t for t in found.texts["text"]), "names of layers stand in figures as text"
    assert not re.search("[\x00-\x08\ud800-\udfff]", text)
    assert max(found.ids.values()) == 1
    text.encode("utf-8")


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", layers=3, looks=1)]
    assert page(runs) == page(runs)


def test_bad_input(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps=2)
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "x.html")
    with pytest.raises(ValueError, match="is a folder"):
        write_report([run], tmp_path)
    (tmp_path / "a" / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval\.json cannot be read"):
        write_report([run], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_thinning_keeps_what_is_worst() -> None:
    steps = np.arange(1.0, 20_001)
    values = np.sin(steps / 700)
    values[12_345] = 9.0
    values[7] = np.nan
    t = thin(steps, values)
    assert t.steps.size <= 500 and t.steps[-1] == 20_000
    assert t.high.max() == 9.0 and np.nanmean(values) == pytest.approx(t.mean.mean(), abs=0.01)
    short = thin(steps[:10], values[:10])
    assert short.every == 1 and short.steps.size == 9
    grid = np.full((1000, 2000), np.nan)
    grid[567, 1234], grid[568, 1235] = 5.0, 1.0
    for worst, expected in (("highest", 5.0), ("lowest", 1.0)):
        small, ends = thin_grid(grid, np.arange(2000.0), worst=worst)
        assert small.shape[0] <= ROWS and small.shape[1] <= COLUMNS and ends[-1] == 1999
        assert expected in small[np.isfinite(small)]


@pytest.mark.slow
def test_a_long_run_of_many_layers_stays_small(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", steps=20_000, layers=100, every=100, looks=20, worse=0.01)
    text = page([run])
    assert len(text.encode()) < 5_000_000
    assert Page(text).tags["svg"] > 6


FRAME = """<!DOCTYPE html><html><head><meta charset="utf-8"></head><body>
<iframe id="frame" style="width: WIDTHpx; height: 900px; border: 0" srcdoc="PAGE"></iframe>
<script>
window.addEventListener("load", () => {
  const frame = document.getElementById("frame"), page = frame.contentDocument, room = frame.contentWindow.innerWidth;
  const boxes = (where) => [...page.querySelectorAll(where)].map(e => [e, e.getBoundingClientRect()]);
  const beyond = boxes("body *").filter(([e, box]) => !e.closest(".scroll, .plot, pre") && box.right > room + 1);
  document.body.setAttribute("data-seen", JSON.stringify({
    room, wide: page.documentElement.scrollWidth, beyond: beyond.map(([e, box]) => e.tagName + "." + e.className),
    figures: boxes("figure svg").map(([e, box]) => [box.width, box.height]),
    text: Math.min(...boxes("figure svg text").map(([e, box]) => box.height))}));
});
</script></body></html>"""


@pytest.mark.parametrize("width", [400, 1280])
def test_a_browser_lays_it_out(text: str, tmp_path: Path, width: int) -> None:
    file, framed = tmp_path / "report.html", tmp_path / "framed.html"
    file.write_text(text, encoding="utf-8")
    said = browser(file, tmp_path / "first").stderr
    assert "CONSOLE" not in said, said
    # a window has at least 500 pixels, a frame has what it is given
    framed.write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", html.escape(text)), encoding="utf-8")
    shown = browser(framed, tmp_path / "second")
    (seen,) = re.findall(r'data-seen="([^"]*)"', shown.stdout)
    measured: dict[str, Any] = json.loads(html.unescape(seen))
    assert measured["room"] == width
    assert measured["wide"] <= width, measured
    assert not measured["beyond"], measured
    assert len(measured["figures"]) == text.count("<figure")
    assert all(w > 200 and h > 80 for w, h in measured["figures"]), measured["figures"]
    assert measured["text"] > 7, "text in figures can be read"


def test_the_browser_would_tell_of_an_error(tmp_path: Path) -> None:
    file = tmp_path / "wrong.html"
    file.write_text("<script>nothing.here()</script>", encoding="utf-8")
    assert "CONSOLE" in browser(file, tmp_path / "profile").stderr


def browser(file: Path, profile: Path) -> subprocess.CompletedProcess[str]:
    """What headless Chromium makes of a file: the document on stdout, what it logs on stderr."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium")
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={profile}", "--window-size=1400,1000", "--dump-dom",
    ]  # fmt: skip
    return subprocess.run([program, *options, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
