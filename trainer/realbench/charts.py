"""Small charts as SVG text: coloured by CSS variables of the page, sized by their box, every word escaped."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from trainer.realbench.stats import Floats

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#6b7280")  # after Okabe and Ito
Row = tuple[str, dict[str, Any], str]  # a name, its figure, its colour


def colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _short(text: str, most: int) -> str:
    return escape(text if len(text) <= most else text[: most - 1] + "…")


def _ticks(least: float, most: float) -> list[float]:
    """Round numbers in the range, about five."""
    rough = (most - least) / 5
    power = 10 ** np.floor(np.log10(rough))
    step = float(power * min((m for m in (1, 2, 2.5, 5, 10) if m * power >= rough), default=10))
    return [round(i * step, 12) for i in range(int(np.ceil(least / step)), int(np.floor(most / step)) + 1)]


def _number(x: float) -> str:
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def dots(rows: Sequence[Row], *, low: float | None = None, high: float | None = None, mark: float | None = None) -> str:
    """A line for each row: its name, a dot, its interval as a bar, and the number."""
    known = [row for row in rows if row[1]["value"] is not None]
    if not known:
        return ""
    ends = [x for _, f, _ in known for x in (f["value"], f["low"], f["high"]) if x is not None] + (
        [mark] if mark is not None else []
    )
    least, most = (min(ends) if low is None else low), (max(ends) if high is None else high)
    if most - least < 1e-12:
        least, most = least - 0.5, most + 0.5
    if low is None:
        least -= 0.04 * (most - least)
    if high is None:
        most += 0.04 * (most - least)
    left, wide, step = 130, 320, 24
    tall = step * len(known) + 26

    def x(value: float) -> float:
        return left + wide * min(1.0, max(0.0, (value - least) / (most - least)))

    out = [f'<svg viewBox="0 0 540 {tall}" role="img">']
    for value in _ticks(least, most):
        place = x(value)
        out.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="2" y2="{tall - 18}"/>')
        out.append(f'<text class="tick" x="{place:.1f}" y="{tall - 4}" text-anchor="middle">{_number(value)}</text>')
    if mark is not None:
        out.append(f'<line class="mark" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="2" y2="{tall - 18}"/>')
    for i, (name, figure, ink) in enumerate(known):
        y = 14 + step * i
        out.append(f'<text class="name" x="{left - 10}" y="{y + 4}" text-anchor="end">{_short(name, 18)}</text>')
        if figure["low"] is not None:
            bar = f'x1="{x(figure["low"]):.1f}" x2="{x(figure["high"]):.1f}" y1="{y}" y2="{y}"'
            out.append(f'<line {bar} stroke="{ink}" stroke-width="5" stroke-opacity=".35"/>')
        out.append(f'<circle cx="{x(figure["value"]):.1f}" cy="{y}" r="4.5" fill="{ink}"/>')
        out.append(f'<text class="tick" x="{left + wide + 12}" y="{y + 4}">{_number(figure["value"])}</text>')
    return "".join([*out, "</svg>"])


def histogram(groups: Sequence[tuple[str, Floats, str]], unit: bool, bins: int = 24) -> str:
    """Shares of each group's pictures by score, as steps over one another."""
    groups = [group for group in groups if len(group[1])]
    if not groups:
        return ""
    every = np.concatenate([values for _, values, _ in groups])
    least, most = (0.0, 1.0) if unit else (float(every.min()), float(every.max()))
    if most - least < 1e-12:
        least, most = least - 0.5, most + 0.5
    edges = np.linspace(least, most, bins + 1)
    shares: list[Floats] = [np.histogram(values, edges)[0] / len(values) for _, values, _ in groups]
    top = max(float(share.max()) for share in shares)
    left, wide, tall = 36, 490, 150
    out = [f'<svg viewBox="0 0 540 {tall + 26}" role="img">']
    for level in (0.0, top / 2, top):
        y = 6 + tall * (1 - level / top)
        out.append(f'<line class="grid" x1="{left}" x2="{left + wide}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{level:.0%}</text>')
    for value in _ticks(least, most):
        place = left + wide * (value - least) / (most - least)
        out.append(f'<text class="tick" x="{place:.1f}" y="{tall + 22}" text-anchor="middle">{_number(value)}</text>')
    for (_, _, ink), share in zip(groups, shares, strict=True):
        points: list[tuple[float, float]] = [(left, 6.0 + tall)]
        for i, part in enumerate(share.tolist()):
            y = 6 + tall * (1 - float(part) / top)
            points += [(left + wide * i / bins, y), (left + wide * (i + 1) / bins, y)]
        points.append((left + wide, 6.0 + tall))
        drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        out.append(f'<polygon points="{drawn}" fill="{ink}" fill-opacity=".13" stroke="{ink}" stroke-width="1.6"/>')
    return "".join([*out, "</svg>"])


def calibration(measures: Sequence[tuple[str, Sequence[dict[str, Any]], str]]) -> str:
    """Mean P(real) against the share that is real, a line for each detector; the diagonal is honest. Areas of dots follow the pictures."""
    side, left = 300, 44
    out = [f'<svg viewBox="0 0 {side + left + 16} {side + 44}" role="img">']
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + side * value, 6 + side * (1 - value)
        out.append(f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{side + 6}"/>')
        out.append(f'<text class="tick" x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        out.append(f'<text class="tick" x="{x:.1f}" y="{side + 21}" text-anchor="middle">{value:g}</text>')
    out.append(f'<line class="mark" x1="{left}" y1="{side + 6}" x2="{left + side}" y2="6"/>')
    out.append(f'<text class="tick" x="{left + side / 2}" y="{side + 38}" text-anchor="middle">P(real) that it says</text>')
    for _, bins, ink in measures:
        total = sum(one["n"] for one in bins)
        points = [(left + side * one["p"], 6 + side * (1 - one["real"]), 2.5 + 9 * (one["n"] / total) ** 0.5) for one in bins]
        out.append(
            f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b, _ in points)}" fill="none" stroke="{ink}" stroke-width="1.6"/>'
        )
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{r:.1f}" fill="{ink}" fill-opacity=".6"/>' for a, b, r in points]
    return "".join([*out, "</svg>"])


def lines(
    ticks: Sequence[str],
    series: Sequence[tuple[str, Sequence[dict[str, Any] | None], str]],
    low: float | None,
    high: float | None,
    mark: float,
) -> str:
    """A line for each series over the ticks, with its interval as a band."""
    known = [f for _, figures, _ in series for f in figures if f is not None and f["value"] is not None]
    if not known:
        return ""
    ends = [x for f in known for x in (f["value"], f["low"], f["high"]) if x is not None] + [mark]
    least, most = (min(ends) if low is None else low), (max(ends) if high is None else high)
    pad = 0.06 * (most - least) or 0.5
    least, most = (least - pad if low is None else least), (most + pad if high is None else most)
    left, wide, tall = 46, 480, 170

    def x(i: int) -> float:
        return left + 16 + (wide - 32) * i / max(1, len(ticks) - 1)

    def y(value: float) -> float:
        return 6 + tall * (1 - (value - least) / (most - least))

    out = [f'<svg viewBox="0 0 540 {tall + 28}" role="img">']
    for value in _ticks(least, most):
        out.append(f'<line class="grid" x1="{left}" x2="{left + wide}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        out.append(f'<text class="tick" x="{left - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{_number(value)}</text>')
    for i, tick in enumerate(ticks):
        out.append(f'<text class="tick" x="{x(i):.1f}" y="{tall + 24}" text-anchor="middle">{escape(tick)}</text>')
    out.append(f'<line class="mark" x1="{left}" x2="{left + wide}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
    for _, figures, ink in series:
        there = [(i, f) for i, f in enumerate(figures) if f is not None and f["value"] is not None]
        banded = [(i, f) for i, f in there if f["low"] is not None]
        edge = [(i, f["low"]) for i, f in banded] + [(i, f["high"]) for i, f in reversed(banded)]
        out.append(f'<polygon points="{" ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in edge)}" fill="{ink}" fill-opacity=".15"/>')
        drawn = " ".join(f"{x(i):.1f},{y(f['value']):.1f}" for i, f in there)
        out.append(f'<polyline points="{drawn}" fill="none" stroke="{ink}" stroke-width="2"/>')
        out += [f'<circle cx="{x(i):.1f}" cy="{y(f["value"]):.1f}" r="3" fill="{ink}"/>' for i, f in there]
    return "".join([*out, "</svg>"])
