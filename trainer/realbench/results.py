"""From what everyone said to figures: every one with its interval over prompts, and differences on the same draws."""

import csv
import io
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer import checkpoint
from trainer.realbench.bench import Judged, Measure
from trainer.realbench.config import PHOTOGRAPHS
from trainer.realbench.distance import measure as distances_of
from trainer.realbench.pictures import Entry
from trainer.realbench.stats import (
    ELO,
    NOTHING,
    Figure,
    Floats,
    Resamples,
    auc,
    bradley_terry,
    calibration_error,
    interval,
    reliability,
    spearman,
    weighted,
)

LEAST = 20  # photographs and generated pictures below which no detector is judged
_AUC = 2_000  # pictures of a side
Table = dict[str, Any]


@dataclass(frozen=True)
class Whole:
    """A figure of a contestant as a whole, with what it is in every resample: differences are taken draw by draw."""

    figure: Figure
    draws: Floats


@dataclass(frozen=True)
class Side:
    """A figure by contestant. `higher` is better, or neither is (None)."""

    name: str
    higher: bool | None
    of: dict[str, Whole]
    centred: bool = False


def plain(figure: Figure) -> Table:
    """As JSON: null where there is no number."""

    def number(x: float) -> float | None:
        return x if math.isfinite(x) else None

    return {"value": number(figure.value), "low": number(figure.low), "high": number(figure.high), "n": figure.n}


def strata(entries: Sequence[Entry]) -> dict[str, list[Hashable]]:
    """Prompts together; the pictures that stand for themselves by contestant."""
    out: dict[str, dict[Hashable, None]] = {"prompts": {}}
    for one in entries:
        for picture in one.pictures:
            out.setdefault("prompts" if picture.prompt is not None else f"/{one.name}", {})[picture.key] = None
    return {name: list(keys) for name, keys in out.items()}


def figures(told: Judged) -> Table:
    """Everything that is written as results.json, and shown."""
    bench = told.bench
    resamples = Resamples(strata(told.entries), bench.bootstrap.rounds, bench.seed, bench.bootstrap.level)
    distances, far = _distances(told, resamples)
    arena, won = _arena(told, resamples)
    out: Table = {
        "format": 1,
        "level": bench.bootstrap.level,
        "rounds": bench.bootstrap.rounds,
        "contestants": [_contestant(told, one) for one in told.entries],
        "measures": [
            {"name": m.name, "group": m.group, "unit": m.unit, "higher_is_better": m.higher, "learned_by": list(m.learned),
             "description": m.description}
            for m in told.measures
        ],
        "figures": _means(told, resamples) + distances,
        "differences": _differences(told, resamples) + _wholes(told, [*far, *won], resamples.level),
        "telling": _telling(told, resamples),
        "agreement": _agreement(told, resamples),
        "calibration": _calibration(told, resamples),
        "arena": arena,
        "features": told.space,
        "notes": told.notes + _notes(told),
        "away": told.away,
    }  # fmt: skip
    return out


def _contestant(told: Judged, one: Entry) -> Table:
    seen = told.looked[one.name]
    sizes = sorted({looked.size for looked in seen.values() if looked.size is not None})
    return {
        "name": one.name,
        "kind": told.kinds[one.name],
        "pictures": len(one.pictures),
        "missing": len(one.missing),
        "unreadable": sum(looked.problem is not None for looked in seen.values()),
        "prompted": one.prompted,
        "sizes": [f"{w}x{h}" for h, w in ([sizes[0], sizes[-1]] if len(sizes) > 1 else sizes)],
        "about": told.about.get(one.name, {}),
        "notes": list(one.notes),
    }


def _row(contestant: str, measure: str, what: str, figure: Figure, **more: Any) -> Table:
    return {"contestant": contestant, "measure": measure, "what": what, **plain(figure), **more}


def _means(told: Judged, resamples: Resamples) -> list[Table]:
    out = []
    for measure in told.measures:
        for one in told.entries:
            mine = told.values[measure.name][one.name]
            wrong = told.errors.get((one.name, measure.name), Counter[str]())
            unparsed = wrong.get("unparsed", 0)
            if not mine and set(wrong) <= {"no prompt"}:
                continue
            missing = sum(wrong.values()) - unparsed + len(one.missing)
            keys, values = list(mine), np.array(list(mine.values()), dtype=np.float64)
            share = measure.group == "judge"
            more = {"missing": missing, "unparsed": unparsed, "errors": dict(wrong)}
            out.append(_row(one.name, measure.name, "mean", resamples.mean(keys, values, share), **more))
            if measure.unit and not share:
                above = (values > 0.5).astype(np.float64)
                out.append(_row(one.name, measure.name, "share above 0.5", resamples.mean(keys, above, True), **more))
    return out


def _distances(told: Judged, resamples: Resamples) -> tuple[list[Table], list[Side]]:
    if not told.features:
        return [], []
    theirs = told.features[PHOTOGRAPHS][1]
    out: list[Table] = []
    sides = {
        "frechet": Side("Fréchet distance", False, {}, centred=True),
        "kernel": Side("kernel distance", False, {}, centred=True),
        "diversity": Side("diversity", None, {}, centred=True),
    }
    for one in told.entries:
        if one.name == PHOTOGRAPHS:
            continue
        keys, mine = told.features[one.name]
        found = distances_of(keys, mine, theirs, resamples)
        for name, figure in found.figures.items():
            out.append(
                _row(one.name, "distance" if name != "diversity" else "diversity", name, figure, why=found.why.get(name, ""))
            )
            if figure.known:
                sides[name].of[one.name] = Whole(figure, found.draws[name])
    return out, list(sides.values())


def _differences(told: Judged, resamples: Resamples) -> list[Table]:
    """Of means and of shares above 0.5: over the prompts of both where they share any."""
    out = []
    for measure in told.measures:
        values = told.values[measure.name]
        parts = [(measure.name, values)]
        if measure.unit and measure.group != "judge":
            above = {name: {key: float(value > 0.5) for key, value in own.items()} for name, own in values.items()}
            parts.append((f"{measure.name}, share above 0.5", above))
        for label, known in parts:
            share = measure.group == "judge" or label != measure.name
            alone = {name: resamples.mean([*own], np.array([*own.values()]), share) for name, own in known.items()}
            for a, b in combinations([one.name for one in told.entries], 2):
                figure, paired = resamples.difference(known[b], known[a])  # type: ignore[arg-type]
                figure = _wide(figure, alone[b], alone[a])
                if figure.known:
                    out.append(_difference(a, b, label, figure, paired, measure.higher))
    return out


def _wholes(told: Judged, sides: Sequence[Side], level: float) -> list[Table]:
    """Of figures of whole contestants; `paired` where they share prompts, whose draws are the same."""
    out = []
    keys = {one.name: {picture.key for picture in one.pictures} for one in told.entries}
    for side in sides:
        for a, b in combinations([one.name for one in told.entries if one.name in side.of], 2):
            one, other = side.of[b], side.of[a]
            value, n = one.figure.value - other.figure.value, min(one.figure.n, other.figure.n)
            figure = _wide(interval(value, one.draws - other.draws, n, level, side.centred), one.figure, other.figure)
            out.append(_difference(a, b, side.name, figure, not keys[a].isdisjoint(keys[b]), side.higher))
    return out


def _wide(figure: Figure, one: Figure, other: Figure) -> Figure:
    """`one` less `other`: a difference without a width, as of shares of all or nothing, gets that of both sides (Newcombe 1998)."""
    if figure.low != figure.high:
        return figure
    below, above = (
        math.hypot(*edges)
        for edges in ((one.value - one.low, other.high - other.value), (one.high - one.value, other.value - other.low))
    )
    return Figure(figure.value, figure.value - below, figure.value + above, figure.n)


def _difference(a: str, b: str, measure: str, figure: Figure, paired: bool, higher: bool | None) -> Table:
    row = {"a": a, "b": b, "measure": measure, "what": "b - a", "paired": paired, "higher_is_better": higher}
    return {**row, **plain(figure)}


def counted(
    told: Judged, measure: Measure, name: str, resamples: Resamples, most: int = _AUC
) -> tuple[Floats, NDArray[np.float32]]:
    """Values of one contestant, higher for more real (P(real) where they are probabilities), and how often each was drawn."""
    mine = list(told.values[measure.name][name].items())[:most]
    values = np.array([value for _, value in mine], dtype=np.float64)
    return (values if measure.higher else 1 - values if measure.unit else -values), resamples.of([key for key, _ in mine])


def _telling(told: Judged, resamples: Resamples) -> list[Table]:
    """Of each detector: how often it scores a photograph above a contestant's picture. Below a half it likes the contestant better."""
    out: list[Table] = []
    if PHOTOGRAPHS not in told.kinds or all(one.name != PHOTOGRAPHS for one in told.entries):
        return out
    for measure in told.measures:
        if not measure.realism:
            continue
        real, drawn = counted(told, measure, PHOTOGRAPHS, resamples)
        for one in told.entries:
            if one.name == PHOTOGRAPHS:
                continue
            fake, counts = counted(told, measure, one.name, resamples)
            if min(len(real), len(fake)) < LEAST:
                continue
            value, draws = auc(real, fake, (drawn, counts))
            figure = interval(value, draws, min(len(real), len(fake)), resamples.level)
            above = resamples.mean([*told.values[measure.name][one.name]][: len(fake)], (fake > 0.5).astype(np.float64), True)
            called = above if measure.unit else NOTHING
            row = {
                "measure": measure.name,
                "contestant": one.name,
                "verdict": "" if told.kinds[one.name] == PHOTOGRAPHS else verdict(figure, called),
            }
            out.append({**row, **plain(figure), "called_real": plain(called)})
    return out


def verdict(area: Figure, called: Figure) -> str:
    """In a word: `tells` them from photographs; `cannot tell`; `fooled`: prefers them to photographs, or calls more than half of them real."""
    if not math.isfinite(area.low):
        return ""
    if area.high < 0.5 or (called.known and called.low > 0.5):
        return "fooled"
    return "tells" if area.low > 0.5 else "cannot tell"


def _agreement(told: Judged, resamples: Resamples) -> list[Table]:
    """Rank correlation of every two that say how real, over all pictures that both scored (at most so many of each contestant)."""
    out = []
    for one, other in combinations([m for m in told.measures if m.realism], 2):
        x, y, counts = list[float](), list[float](), list[NDArray[np.float32]]()
        for entry in told.entries:
            a, b = (told.values[m.name][entry.name] for m in (one, other))
            keys = [key for key in a if key in b][:_AUC]
            x += [a[key] if one.higher else -a[key] for key in keys]
            y += [b[key] if other.higher else -b[key] for key in keys]
            counts.append(resamples.of(keys))
        if len(x) >= LEAST:
            value, draws = spearman(np.array(x), np.array(y), np.concatenate(counts, axis=1))
            out.append({"a": one.name, "b": other.name, **plain(interval(value, draws, len(x), resamples.level))})
    return out


def truth(told: Judged, measure: Measure, resamples: Resamples) -> tuple[Floats, Floats, NDArray[np.float32]]:
    """P(real) and the truth, 1 for photographs, over all but altered contestants; and how often each was drawn."""
    p, labels, counts = list[Floats](), list[Floats](), list[NDArray[np.float32]]()
    for one in told.entries:
        kind = told.kinds[one.name]
        if kind != "altered":
            values, drawn = counted(told, measure, one.name, resamples)
            p.append(values)
            labels.append(np.full(len(values), float(kind == PHOTOGRAPHS)))
            counts.append(drawn)
    return np.concatenate(p), np.concatenate(labels), np.concatenate(counts, axis=1)


def _calibration(told: Judged, resamples: Resamples) -> list[Table]:
    out = []
    for measure in told.measures:
        if not measure.unit:
            continue
        p, labels, counts = truth(told, measure, resamples)
        if min(labels.sum(), len(labels) - labels.sum()) < LEAST:
            continue
        value = float(calibration_error(p, labels)[0])
        figure = interval(value, calibration_error(p, labels, counts), len(p), resamples.level, centred=True)
        bins = [{"p": a, "real": b, "n": n} for a, b, n in reliability(p, labels)]
        out.append({"measure": measure.name, "bins": bins, **plain(figure)})
    return out


def _arena(told: Judged, resamples: Resamples) -> tuple[Table, list[Side]]:
    """Win rates of every two, ratings with photographs (else the first) at 0, and how often what is shown first is preferred."""
    if not told.arena:
        return {}, []
    names = [one.name for one in told.entries]
    place = {name: i for i, name in enumerate(names)}
    origin, level = names[0], resamples.level
    rates: list[Table] = []
    wins, drawn = np.zeros((len(names), len(names))), np.zeros((len(resamples.counts_RK), len(names), len(names)))
    rated = Side("arena, rating", True, {})
    against = Side(f"arena, wins against {origin}", True, {})
    known = [row for row in told.arena if row["value"] is not None]
    counts = resamples.met([row["keys"] for row in known])
    met = {name: {row["keys"][i] for row in known for side, i in (("a", 0), ("b", -1)) if row[side] == name} for name in names}
    for a, b in combinations(names, 2):
        rows = [row for row in told.arena if (row["a"], row["b"]) == (a, b)]
        chosen = [i for i, row in enumerate(known) if (row["a"], row["b"]) == (a, b)]
        values = np.array([known[i]["value"] for i in chosen], dtype=np.float64)
        figure = NOTHING
        if chosen:
            keys = [known[i]["keys"] for i in chosen]
            own = resamples.met(keys)
            figure = resamples.average(own, values, min(len({key[i] for key in keys}) for i in (0, -1)), share=True)
            if a == origin:
                against.of[b] = Whole(
                    Figure(1 - figure.value, 1 - figure.high, 1 - figure.low, figure.n), 1 - weighted(own, values)
                )
            weights, (i, j) = counts[:, chosen].astype(np.float64), (place[a], place[b])
            wins[i, j], wins[j, i] = values.sum(), (1 - values).sum()
            drawn[:, i, j], drawn[:, j, i] = weights @ values, weights @ (1 - values)
        unparsed = sum(row["error"] == "unparsed" for row in rows)
        count = {name: int((values == score).sum()) for name, score in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))}
        rates.append(
            {"a": a, "b": b, **count, "missing": len(rows) - len(chosen) - unparsed, "unparsed": unparsed, **plain(figure)}
        )
    theta, draws = bradley_terry(wins), bradley_terry(drawn)
    ratings = []
    for i, name in enumerate(names):
        above = ELO * (draws[:, i] - draws[:, 0])
        if name == origin:
            figure = Figure(0.0, 0.0, 0.0, len(met[name])) if met[name] else NOTHING
        else:
            figure = interval(ELO * float(theta[i] - theta[0]), above, len(met[name]), level)
        if figure.known:
            rated.of[name] = Whole(figure, above)
        ratings.append({"contestant": name, **plain(figure)})
    shown = [i for i, row in enumerate(known) if row["forward"] is not None]
    first = NOTHING
    if shown:
        leaning = np.array([(known[i]["forward"] + 1 - known[i]["backward"]) / 2 for i in shown])
        first = resamples.average(counts[:, shown], leaning, len(shown), share=True)
    table = {"judge": told.arbiter, "origin": origin, "rates": rates, "ratings": ratings}
    return {**table, "shown_first": plain(first)["value"], "shown_first_interval": plain(first)}, [rated, against]


def _notes(told: Judged) -> list[str]:
    """What a reader has to know before a number."""
    out = [f"{one.name}: {note}" for one in told.entries for note in one.notes]
    out += [f"{one.name}: {len(one.missing)} of the prompts have no picture" for one in told.entries if one.missing]
    for one in told.entries:
        bad = sum(looked.problem is not None for looked in told.looked[one.name].values())
        sizes = {looked.size for looked in told.looked[one.name].values() if looked.size is not None}
        if bad:
            out.append(f"{one.name}: {bad} files cannot be read as pictures, and are left out")
        if len(sizes) > 1:
            low, high = min(sizes), max(sizes)
            out.append(
                f"{one.name}: pictures of {len(sizes)} sizes, {low[1]}x{low[0]} to {high[1]}x{high[0]}; "
                "detectors may see size instead of realism"
            )
    whole = {name: {s.size for s in seen.values() if s.size is not None} for name, seen in told.looked.items()}
    if len({frozenset(sizes) for sizes in whole.values()}) > 1 and all(len(sizes) == 1 for sizes in whole.values()):
        out.append("contestants have pictures of different sizes: detectors may see size instead of realism")
    prompted = {one.prompted for one in told.entries}
    if len(prompted) > 1:
        out.append(
            "some contestants have pictures of the prompts and others have not: those are compared as sets, not prompt by prompt"
        )
    for (name, measure), (outside, count) in told.outside.items():
        if outside > 0.2 * count:
            out.append(
                f"{name}: {measure} says of {outside / count:.0%} of the pictures that they are not of the kind it was fitted on; "
                "its numbers mean little for them. Serve a detector for such pictures "
                "(docs/rewards-detectors.md), and name it under detectors of a bench"
            )
    for name, why in told.away.items():
        out.append(f"{name} stopped answering ({why}); the same command asks for what is missing, and nothing twice")
    return out


def write(told: Judged, found: Table, out: Path) -> None:
    """results.json, figures.csv, pictures.csv."""
    checkpoint.write_json(out / "results.json", found)
    rows: list[list[Any]] = [["contestant", "measure", "figure", "value", "low", "high", "n", "missing", "unparsed"]]
    for f in found["figures"]:
        rows.append(
            [f[k] for k in ("contestant", "measure", "what", "value", "low", "high", "n")] + [f.get("missing"), f.get("unparsed")]
        )
    for f in found["differences"]:
        rows.append(
            [f"{f['b']} - {f['a']}", f["measure"], "difference", *(f[k] for k in ("value", "low", "high", "n")), None, None]
        )
    for f in found["telling"]:
        rows.append(
            [f["contestant"], f["measure"], "AUC against photographs", *(f[k] for k in ("value", "low", "high", "n")), None, None]
        )
    for f in found["arena"].get("rates", []):
        row = [f"{f['a']} against {f['b']}", "arena", "win rate", *(f[k] for k in ("value", "low", "high", "n"))]
        rows.append([*row, f["missing"], f["unparsed"]])
    if first := found["arena"].get("shown_first_interval"):
        rows.append(["", "arena", "shown first preferred", *(first[k] for k in ("value", "low", "high", "n")), None, None])
    for f in found["arena"].get("ratings", []):
        rows.append([f["contestant"], "arena", "rating", *(f[k] for k in ("value", "low", "high", "n")), None, None])
    save(out / "figures.csv", rows)
    names = [m.name for m in told.measures]
    rows = [["contestant", "picture", "file", "prompt", *names]]
    for one in told.entries:
        for p in one.pictures:
            scores = [told.values[name][one.name].get(p.key) for name in names]
            rows.append([one.name, p.key, p.path.name, p.prompt.text if p.prompt is not None else None, *scores])
    save(out / "pictures.csv", rows)


def save(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """CSV, whole or not at all. What a spreadsheet would take for a formula gets a quote before it."""

    def cell(value: Any) -> Any:
        if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
            return "'" + value
        return "" if value is None else value

    text = io.StringIO(newline="")
    csv.writer(text).writerows([[cell(value) for value in row] for row in rows])
    beside = path.with_name(f".{path.name}.building")
    beside.write_text(text.getvalue(), encoding="utf-8", newline="", errors="replace")
    beside.replace(path)
