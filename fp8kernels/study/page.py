"""The study's page: method, claims with verdicts, a table an experiment, limits. Every number is made of the rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..export.atomic import write_file
from ..statistics import Interval, holm, minimal_detectable_drop
from . import claims, outcomes
from .figures import draw
from .outcomes import Outcome
from .rows import Study, read_study
from .run import MEASURED
from .settings import Settings

ROWS = "study/rows.jsonl"  # beside the page
TEMPLATE = Path(__file__).with_name("page.md")
APART = ("noise", "ranks", "spike")  # experiments without a row of the centre, which is not their neighbour
TITLES = {
    "noise": "BF16 against BF16",
    "algorithm": "1. The algorithm",
    "window": "2. The window",
    "target": "3. The target and the clamp",
    "warm-up": "4. Steps in BF16 first",
    "learning rate": "5. The learning rate, the labels and the weights' precision",
    "layers": "6. Which layers and tensors",
    "interval": "7. The update interval",
    "ranks": "8. Sharing amax among ranks",
    "spike": "An injected outlier",
}
REMARKS = {
    "noise": """The same BF16 run with its batch in 8 parts: sums are rounded in another order, nothing else. An
effect of this size is no effect of 8 bits.""",
    "window": """The last row is the published arrangement: an entry for each forward call, so that 64 entries at 8
calls a step are 8 optimizer steps.""",
    "target": "The target is that of inputs, weights and gradients alike.",
    "learning rate": """A BF16 run is compared with the plain BF16 run of its learning rate, whose labels are shifted
once; a HiF8 run with the BF16 run that shares its rate and its labels.""",
    "layers": "`gradients=False` leaves the gradient of a layer's output in BF16.",
    "ranks": """Two gloo processes share the batch and average gradients; `reduced=False` gives each rank scales of its
own, as published.""",
    "spike": """Small models that train briefly show no outliers of their own, so one is made. In step {spike} one
neuron of the middle MLP is multiplied by 32 and its reader divided by 32, which leaves the function as it is and raises
the amax of a weight and of an activation; afterwards both are as before. The BF16 run has the same outlier. The
published study has no such experiment.""",
}


def write_page(made: Study, folder: Path) -> Path:
    """STUDY.md and study/*.svg in the folder; returns the page's path."""
    text = page_text(made, draw(made, folder / "study"))
    page = folder / "STUDY.md"
    write_file(page, lambda staged: staged.write_text(text, encoding="utf-8"))
    return page


def redraw(folder: Path) -> Path:
    """The page of a folder, again from its rows.

    raises   FileNotFoundError or ValueError where there are none
    """
    return write_page(read_study(folder / ROWS), folder)


def page_text(made: Study, figures: Iterable[str]) -> str:
    """The page in Markdown; figures are names of files in study/."""
    centre = Settings(**made.grid["centre"])
    judged = claims.judge(made, centre)
    words = numbers(made, centre) | {
        "claims_table": claims_table(judged),
        "verdicts": ", ".join(f"{sum(one.verdict == word for one in judged)} {word}" for word in claims.VERDICTS),
        "figures": "\n\n".join(f"![{name.removesuffix('.svg').replace('-', ' ')}](study/{name})" for name in figures),
        "experiments": "\n\n".join(experiments(made, centre)),
        "forgetting_table": forgetting_table(made),
    }
    return TEMPLATE.read_text(encoding="utf-8").format(**words)


def numbers(made: Study, centre: Settings) -> dict[str, Any]:
    """What the template's sentences name, from the grid, the base's row and the runs'."""
    grid, base, train = made.grid, made.base, made.grid["train"]
    rows = [(settings, row) for settings, by_seed in made.runs.items() for row in by_seed.values()]
    run_minutes = sum(row["seconds"]["cpu"] * settings.ranks for settings, row in rows) / 60
    base_minutes = base["seconds"]["cpu"] / 60
    found = outcomes.outcome(made, centre)
    differing = 0.0 if found is None else found.differing
    noise = outcomes.outcome(made, Settings(precision="bf16", micro_batches=8, learning_rate=centre.learning_rate))
    floor = "" if noise is None else f" Of an APE, {noise.ape.mean:.3f} % lie between two BF16 runs already."
    items = len(base["exam"])
    return {
        "parameters": base["parameters"] / 1e6,
        "layers": grid["model"]["layers"],
        "hidden": grid["model"]["hidden"],
        "base_steps": grid["base"]["steps"],
        "people": grid["world"]["people"],
        "items": items,
        "untrained": outcomes.right(base["exam_before"]).mean(),
        "base_exam": outcomes.right(base["exam"]).mean(),
        "base_cloze": outcomes.right(base["cloze"]).mean(),
        "steps": train["steps"],
        "batch": train["batch"],
        "sequence": train["sequence"],
        "tokens": train["steps"] * train["batch"] * train["sequence"],
        "centre": centre,
        "settings": len(made.runs),
        "seeds": made.seeds(),
        "runs": len(rows),
        "run_minutes": run_minutes,
        "base_minutes": base_minutes,
        "minutes": (run_minutes + base_minutes) / grid["workers"],
        "workers": grid["workers"],
        "level": 1 - claims.FAMILY / len(claims.CLAIMS),
        "claims": len(claims.CLAIMS),
        "block": outcomes.BLOCK,
        "measured": MEASURED,
        "differing": differing,
        "detectable": _detectable(items, differing),
        "floor": floor,
        **{key: grid["made"][key] for key in ("processor", "cores", "torch", "transformers")},
    }


def _detectable(items: int, differing: float) -> str:
    """The smallest drop that one run finds with 80 % power, in words."""
    drop = minimal_detectable_drop(items, differing=differing) if differing else math.inf
    return f"more than {differing:.1%} (more answers would have to differ)" if math.isinf(drop) else f"{drop:.2%}"


def claims_table(judged: list[claims.Judged]) -> str:
    """Claim, published numbers, ours, verdict."""
    lines = ["| claim | they report | measured here | interval | claimed | verdict |", "|---|---|---|---|---|---|"]
    for one in judged:
        claim = one.claim
        bound = f"{'<' if claim.below else '>'} {claim.bound:g}"
        found = "did not run" if one.found is None else _interval(one.found, 3)
        lines.append(f"| {claim.text} | {claim.reported} | {claim.effect} | {found} | {bound} | **{one.verdict}** |")
    return "\n".join(lines)


def experiments(made: Study, centre: Settings) -> list[str]:
    """A heading, a remark and a table for each experiment of the grid, in the order of the titles."""
    tables: dict[str, list[Outcome]] = {}
    names = [name for name in TITLES if name in made.grid["experiments"]]
    for name in [*names, *(name for name in made.grid["experiments"] if name not in TITLES)]:
        asked = [outcomes.outcome(made, Settings(**variant)) for variant in made.grid["experiments"][name]]
        tables[name] = [one for one in asked if one is not None]
    middle = outcomes.outcome(made, centre)
    found = [one for table in tables.values() for one in table] + ([] if middle is None else [middle])
    rows = list({one.settings: one for one in found}.values())
    adjusted = holm([one.p_value for one in rows]) if rows else []
    p_values = {one.settings: p for one, p in zip(rows, adjusted, strict=True)}
    parts = []
    for name, table in tables.items():
        parts.append(f"### {TITLES.get(name, name)}")
        if name in REMARKS:
            parts.append(REMARKS[name].format(spike=made.grid["train"]["spike_step"]))
        first = [middle] if middle is not None and name not in APART else []
        parts.append(_table(made, [*first, *table], p_values, centre))
    return parts


def _table(made: Study, table: list[Outcome], p_values: dict[Settings, float], centre: Settings) -> str:
    lines = [
        "| run | APE, % | highest | bias, % | held-out loss, 1/1000 | exam, points | p | stale | worst | SQNR, dB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in table:
        cells = [
            "centre" if one.settings == centre else f"`{one.settings.name()}`",
            _interval(one.ape, 3),
            f"{one.highest:.2f}",
            _interval(one.bias, 3),
            _interval(outcomes.scaled(one.held_out, 1000), 1),
            _interval(one.exam, 2),
            f"{p_values[one.settings]:.2g}",
            *_tensors(made, one.settings),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def forgetting_table(made: Study) -> str:
    """BF16 and HiF8 by learning rate, labels and the weights' precision."""
    chosen = [
        one
        for one in made.runs
        if one == Settings(one.precision, learning_rate=one.learning_rate, labels=one.labels, master=one.master)
    ]
    chosen.sort(key=lambda one: (one.labels, not one.master, one.learning_rate, one.precision))
    lines = [
        "| precision | learning rate | labels | weights | exam | gone, points | learnt of the text, nats |",
        "|---|---|---|---|---|---|---|",
    ]
    for settings in chosen:
        rows = list(made.runs[settings].values())
        gone, learnt = outcomes.forgotten(made, settings), outcomes.learnt(made, settings)
        accuracy = sum(outcomes.right(row["exam"]).mean() for row in rows) / len(rows)
        assert gone is not None and learnt is not None
        weights = "fp32" if settings.master else "BF16"
        lines.append(
            f"| {settings.precision} | {settings.learning_rate:g} | {settings.labels} | {weights} | {accuracy:.1%} | "
            f"{_interval(gone, 2)} | {_interval(learnt, 3)} |"
        )
    return "\n".join(lines)


def _tensors(made: Study, settings: Settings) -> tuple[str, str, str]:
    """(stale, worst, SQNR) of a setting, over seeds; empty for BF16."""
    rows: list[dict[str, Any]] = [row["tensors"] for row in made.runs[settings].values() if row["tensors"]]
    if not rows:
        return "", "", ""
    roles = [role for role in ("input", "weight", "grad") if role in rows[0]]
    stale = sum(row[role]["stale"] for row in rows for role in roles) / len(rows) / len(roles)
    worst = max(row[role]["worst"] for row in rows for role in roles)
    noise = " ".join(f"{sum(row[role]['sqnr_db'] for row in rows) / len(rows):.1f}" for role in roles)
    return f"{stale:.0%}", f"{worst:.2f}", noise


def _interval(one: Interval, digits: int) -> str:
    return f"{one.mean:.{digits}f} [{one.low:.{digits}f}, {one.high:.{digits}f}]"
