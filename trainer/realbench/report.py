"""The bench as one page that needs nothing else: no address outside, one small script that sorts. Names and prompts are only text in it."""

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from shared.schema import Problem
from trainer.realbench import charts
from trainer.realbench.bench import Judged
from trainer.realbench.config import PHOTOGRAPHS
from trainer.realbench.pictures import Entry, pixels

SIDE, ENDS = 112, 8  # pixels of a thumbnail; pictures that each score brings from either end
PAGE = Path(__file__).with_name("report.html")
STYLE = Path(__file__).with_name("page.css")  # of both pages
Table = dict[str, Any]


def write(told: Judged, found: Table, out: Path) -> Path:
    """`report.html` in `out`."""
    names = [one["name"] for one in found["contestants"]]
    ink = {name: charts.colour(i) for i, name in enumerate(names)}
    page = environment().from_string(PAGE.read_text()).render(
        title=" against ".join(name for name in names if name != PHOTOGRAPHS) or PHOTOGRAPHS,
        style=STYLE.read_text(),
        found=found,
        names=names,
        ink=ink,
        rows=_rows(found, names),
        dots=_dots(found, ink),
        rates={(row["a"], row["b"]): row for row in found["arena"].get("rates", [])},
        ratings=_ratings(found, ink),
        fooled=_fooled(found),
        agreement={(row["a"], row["b"]): row for row in found["agreement"]},
        judges=[m["name"] for m in found["measures"] if m["group"] != "reward"],
        histograms=_histograms(told, ink),
        reliability=_reliability(found),
        grids=[_grid(told, one) for one in told.entries],
        measures=[m for m in found["measures"] if told.values.get(m["name"])],
        changes=found.get("changes", []),
        notes=found["notes"] + [f"{c['name']}: {note}" for c in found["contestants"] for note in c["about"].get("notes", [])],
    )  # fmt: skip
    path = out / "report.html"
    beside = out / ".report.html.building"
    beside.write_text(page, encoding="utf-8", errors="replace")
    beside.replace(path)
    return path


def environment() -> Environment:
    """Everything is escaped; `f` shows a figure, `n` a number."""
    made = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"n": short, "f": span}
    return made


def short(value: float | None, digits: int = 3) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return (
        f"{value:.0f}" if abs(value) >= 100 else f"{value:.{digits}g}" if abs(value) >= 1 or value == 0 else f"{value:.{digits}f}"
    )


def span(row: Table | None) -> str:
    """Its interval."""
    if row is None or row.get("low") is None:
        return ""
    return f"{short(row['low'])} to {short(row['high'])}"


def _rows(found: Table, names: list[str]) -> list[Table]:
    """A row of the main table for each figure, with a cell for each contestant."""
    told = {m["name"]: m for m in found["measures"]}
    rows: dict[tuple[str, str], dict[str, Table]] = {}
    for figure in found["figures"]:
        rows.setdefault((figure["measure"], figure["what"]), {})[figure["contestant"]] = figure
    lower = ("frechet", "kernel")
    labels = {"frechet": "Fréchet distance", "kernel": "kernel distance", "diversity": "diversity, photographs = 1"}
    out = []
    for (measure, what), cells in rows.items():
        about = told.get(measure)
        out.append(
            {
                "label": labels.get(what) or (f"{measure}, {what}" if what != "mean" else measure),
                "better": "lower"
                if what in lower or (about and not about["higher_is_better"])
                else ""
                if what == "diversity"
                else "higher",
                "group": about["group"] if about else "distance",
                "learned": about["learned_by"] if about else [],
                "cells": [cells.get(name) for name in names],
            }
        )
    ratings = {row["contestant"]: row for row in found["arena"].get("ratings", [])}
    if ratings:
        rated = [ratings.get(name) for name in names]
        out.insert(0, {"label": "arena rating", "better": "higher", "group": "arena", "learned": [], "cells": rated})
    return out


def _dots(found: Table, ink: dict[str, str]) -> list[tuple[str, str]]:
    """A chart of means for each measure, and of each distance."""
    out = []
    for measure in found["measures"]:
        rows = [
            (f["contestant"], f, ink[f["contestant"]])
            for f in found["figures"]
            if (f["measure"], f["what"]) == (measure["name"], "mean")
        ]
        span_ = {"low": 0.0, "high": 1.0} if measure["unit"] else {}
        out.append((f"{measure['name']}, mean", charts.dots(rows, **span_)))
    for what, label in (
        ("frechet", "Fréchet distance to the photographs (lower is closer)"),
        ("kernel", "Kernel distance (lower is closer)"),
    ):
        rows = [(f["contestant"], f, ink[f["contestant"]]) for f in found["figures"] if f["what"] == what]
        out.append((label, charts.dots(rows, mark=0.0)))
    return [(label, chart) for label, chart in out if chart]


def _ratings(found: Table, ink: dict[str, str]) -> str:
    return charts.dots([(row["contestant"], row, ink[row["contestant"]]) for row in found["arena"].get("ratings", [])], mark=0.0)


def _fooled(found: Table) -> Table:
    """{measure: {contestant: row}} of who tells whom from photographs."""
    out: Table = {}
    for row in found["telling"]:
        out.setdefault(row["measure"], {})[row["contestant"]] = row
    return out


def _histograms(told: Judged, ink: dict[str, str]) -> list[tuple[str, str]]:
    out = []
    for measure in told.measures:
        groups = [
            (one.name, np.array(list(told.values[measure.name][one.name].values()), dtype=np.float64), ink[one.name])
            for one in told.entries
        ]
        if chart := charts.histogram(groups, measure.unit):
            out.append((measure.name, chart))
    return out


def _reliability(found: Table) -> tuple[str, list[tuple[str, str, Table]]]:
    rows = [(row["measure"], row["bins"], charts.colour(i)) for i, row in enumerate(found["calibration"])]
    legend = [(row["measure"], charts.colour(i), row) for i, row in enumerate(found["calibration"])]
    return (charts.calibration(rows) if rows else "", legend)


def _grid(told: Judged, one: Entry) -> Table:
    """The pictures that any score has at either end, with all their scores: the page sorts them."""
    measures = [m for m in told.measures if told.values[m.name][one.name]]
    wanted: dict[str, None] = {}
    for measure in measures:
        mine = told.values[measure.name][one.name]
        order = sorted(mine, key=lambda key: (mine[key], key), reverse=measure.higher)
        wanted |= dict.fromkeys([*order[:ENDS], *order[-ENDS:]])
    by_key = {picture.key: picture for picture in one.pictures}
    shown = []
    for key in wanted:
        picture = by_key[key]
        image = pixels(picture.path)
        if isinstance(image, Problem):
            continue
        text = picture.prompt.text if picture.prompt is not None else ""
        scores = {m.name: told.values[m.name][one.name].get(key) for m in measures}
        shown.append({"uri": _thumbnail(image), "name": picture.path.name, "prompt": text, "scores": scores})
    return {"name": one.name, "pictures": shown}


def _thumbnail(image: Any) -> str:
    """As a data URL: PNG as it is where it is small, else WebP of SIDE pixels."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    if max(picture.size) <= SIDE:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
        picture.save(buffer, "WEBP", quality=85)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
