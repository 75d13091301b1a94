"""Judging the judges: `verism-eval detectors`. Which detector tells photographs from generated pictures, and which pays for blur?

AUC, average precision and calibration on labelled folders; then the same pictures altered at rising strength: whether it still tells both
sides apart, and how far the score of a generated picture moves. What raises it is what a generator would learn from it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Shown

from shared.panel import Look, Panel
from trainer import checkpoint
from trainer.config import ConfigError
from trainer.honesty import Monitors
from trainer.realbench import ask, charts
from trainer.realbench.alter import WAYS, altered
from trainer.realbench.bench import Judged, Measure, judge, locked, said_by
from trainer.realbench.config import Bench, Contestant, found
from trainer.realbench.ledger import Ledger, Row, digest
from trainer.realbench.pictures import Entry, Picture, seen
from trainer.realbench.report import STYLE, environment
from trainer.realbench.results import counted, plain, save, strata
from trainer.realbench.screen import Screen, number
from trainer.realbench.stats import (
    Figure,
    Floats,
    Resamples,
    auc,
    average_precision,
    calibration_error,
    interval,
    reliability,
)

FEWEST = 10  # pictures of a side
PAYS = 0.02  # of a probability, or of the spread of scores: a rise below this is no reward worth hacking
PAGE = Path(__file__).with_name("detectors.html")
Table = dict[str, Any]
Kept = dict[tuple[str, str, float], dict[str, dict[str, float]]]  # by measure, way and strength: by contestant, by picture


def run(bench: Bench, real: Sequence[Path], generated: Sequence[Path], most: int, out: Path, console: Console) -> int:
    """The exit status: 0 done, 1 done as far as the services answered."""
    sides = {f"real {i + 1}": (path, "photographs") for i, path in enumerate(real)}
    sides |= {f"generated {i + 1}": (path, "generated") for i, path in enumerate(generated)}
    contestants = {name: Contestant.model_validate({"folder": path, "kind": kind}) for name, (path, kind) in sides.items()}
    bench = Bench.model_validate({**bench.model_dump(), "photographs": None, "contestants": contestants})
    if not bench.detectors and not bench.judges and bench.monitors is None:
        raise ConfigError("no detector to judge: name one under `detectors` of the bench")
    with locked(out):
        kept: Kept = {}
        screen = Screen()

        def also(told: Judged, panel: Panel | None, ledger: Ledger, away: ask.Away) -> None:
            for one in told.entries:
                chosen = _chosen(told, one, most)
                if panel is not None:
                    names = list(panel.infos)
                    with screen(f"{one.name}: altered pictures", len(chosen) * _ways() * len(names)) as tell:
                        _ask(told, panel, one, chosen, ledger, away, kept, tell)
                if bench.monitors is not None:
                    _monitors(found(bench.monitors), one, chosen, kept, screen)

        labels = {name: float(kind == "photographs") for name, (_, kind) in sides.items()}

        def check(told: Judged) -> None:
            for name, wanted in (("photographs", 1.0), ("generated pictures", 0.0)):
                count = sum(s.problem is None for one, own in told.looked.items() if labels[one] == wanted for s in own.values())
                if count < FEWEST:
                    raise ConfigError(f"{count} {name} are too few to judge a detector by: give {FEWEST} or more")

        told = judge(bench, out, screen, also, check)
        result = figures(told, labels, kept, {name: str(path) for name, (path, _) in sides.items()})
        checkpoint.write_json(out / "results.json", result)
        _csv(result, out / "detectors.csv")
        (out / "bench.yaml").write_text(yaml.safe_dump(bench.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
        page = write(result, out)
    console.print(shown(result), highlight=False)
    for row in result["detectors"]:
        console.print(f"{row['name']}: {row['words']}", markup=False, highlight=False, soft_wrap=True)
    for name, why in told.away.items():
        text = f"{name} stopped answering ({why}); the same command asks for what is missing"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n{page} (a page for a browser), results.json and detectors.csv beside it", highlight=False, soft_wrap=True)
    return 0 if told.complete else 1


def _ways() -> int:
    return sum(len(strengths) for _, strengths, _ in WAYS.values())


def _chosen(told: Judged, one: Entry, most: int) -> list[Picture]:
    """At most so many that can be read, at random but always the same."""
    readable = [p for p in one.pictures if told.looked[one.name][p.key].problem is None]
    order = np.random.default_rng(told.bench.seed).permutation(len(readable))[:most]
    return [readable[i] for i in sorted(order)]


def _each() -> Iterator[tuple[str, float]]:
    return ((way, strength) for way, (_, strengths, _) in WAYS.items() for strength in strengths)


def _ask(
    told: Judged, panel: Panel, one: Entry, chosen: Sequence[Picture], ledger: Ledger, away: ask.Away, kept: Kept, tell: ask.Tell
) -> None:
    """Altered pictures before every detector; a ledger's row of one is found by the sha256 of its file and how it was altered."""
    looked = told.looked[one.name]
    for way, strength in _each():
        for name, info in panel.infos.items():
            question = ask.question_of(name, info)

            def where(
                picture: Picture, question: str = question, way: str = way, strength: float = strength
            ) -> tuple[str, str, str]:
                return question, f"{looked[picture.key].sha}:{way}:{strength:g}", ""

            open_ = [] if name in away.why else [p for p in chosen if not ledger.settled(*where(p))]
            tell(len(chosen) - len(open_))
            looks = [_look(p, way, strength, looked[p.key].sha) for p in open_]
            for places, table in panel.told([name], looks):
                if table.versions.get(name, info.version) != info.version:
                    away.why[name] = ask.CHANGED
                    break
                scores = table.scores[0]
                rows: list[Row] = [
                    {**dict(zip(ask.FIELDS, where(open_[i]), strict=True)), **ask.told(score)}
                    for i, score in zip(places, scores, strict=True)
                ]
                ledger.add(rows)
                tell(len(rows))
                if all(row["retry"] for row in rows):
                    away.why[name] = str(rows[0]["error"])
                    break
            answers = {p.key: ledger.rows.get(where(p)) for p in chosen}
            given = {key: float(row["value"]) for key, row in answers.items() if row is not None and row["value"] is not None}
            kept.setdefault((name, way, strength), {})[one.name] = given


def _look(picture: Picture, way: str, strength: float, sha: str) -> Look:
    return lambda: (altered(seen(picture), way, strength, sha), None)


def _monitors(folder: Path, one: Entry, chosen: Sequence[Picture], kept: Kept, screen: Screen) -> None:
    monitors = Monitors.load(folder)
    images = [(p.key, digest(p.key), seen(p)) for p in chosen]
    with screen(f"{one.name}: held-out detectors", _ways()) as tell:
        for way, strength in _each():
            changed = [(key, altered(image, way, strength, seed)) for key, seed, image in images]
            for name, said in said_by(monitors, changed).items():
                kept.setdefault((name, way, strength), {})[one.name] = said
            tell(1)


# what it adds up to


def figures(told: Judged, labels: Mapping[str, float], kept: Kept, folders: Mapping[str, str]) -> Table:
    """`labels`: 1 for photographs, of each contestant."""
    bench = told.bench
    resamples = Resamples(strata(told.entries), bench.bootstrap.rounds, bench.seed, bench.bootstrap.level)
    rows = [_detector(told, measure, labels, kept, resamples) for measure in told.measures]
    order = sorted((row for row in rows if row is not None), key=lambda row: -(row["auc"]["value"] or 0))
    return {"level": bench.bootstrap.level, "folders": dict(folders), "detectors": order, "away": told.away}


def _detector(told: Judged, measure: Measure, labels: Mapping[str, float], kept: Kept, resamples: Resamples) -> Table | None:
    sides = {
        label: [counted(told, measure, name, resamples) for name, own in labels.items() if own == label] for label in (1.0, 0.0)
    }
    (real, drawn), (fake, counts) = (
        (np.concatenate([v for v, _ in both]), np.concatenate([c for _, c in both], axis=1)) for both in sides.values()
    )
    if min(len(real), len(fake)) < FEWEST:
        return None
    n, level = min(len(real), len(fake)), resamples.level
    scores, truth = np.concatenate([real, fake]), np.repeat([1.0, 0.0], [len(real), len(fake)])
    both = np.concatenate([drawn, counts], axis=1)
    area, draws = auc(real, fake, (drawn, counts))
    precision = interval(float(average_precision(scores, truth)[0]), average_precision(scores, truth, both), n, level)
    row: Table = {
        "name": measure.name,
        "group": measure.group,
        "description": measure.description,
        "photographs": len(real),
        "generated": len(fake),
        "auc": plain(interval(area, draws, n, level)),
        "average_precision": plain(precision),
        "calibration_error": None,
        "bins": [],
    }
    if measure.unit:
        error = interval(
            float(calibration_error(scores, truth)[0]), calibration_error(scores, truth, both), len(scores), level, True
        )
        row["calibration_error"] = plain(error)
        row["bins"] = [{"p": a, "real": b, "n": count} for a, b, count in reliability(scores, truth)]
    spread = 1.0 if measure.unit else float(scores.std()) or 1.0
    row["altered"] = [
        _altered(told, measure, labels, kept[measure.name, way, strength], resamples, spread) | {"way": way, "strength": strength}
        for way, strength in _each()
        if (measure.name, way, strength) in kept
    ]
    row["rewards"] = sorted({one["way"] for one in row["altered"] if one["pays"]})
    row["words"] = words(row)
    return row


def _altered(
    told: Judged,
    measure: Measure,
    labels: Mapping[str, float],
    values: Mapping[str, Mapping[str, float]],
    resamples: Resamples,
    spread: float,
) -> Table:
    """AUC with both sides altered, and by how much the generated ones' scores move, in spreads of the scores."""
    sign = 1.0 if measure.higher else -1.0
    sides: dict[float, list[tuple[list[str], Floats, Floats]]] = {1.0: [], 0.0: []}
    for name, label in labels.items():
        clean = told.values[measure.name][name]
        keys = [key for key in values.get(name, {}) if key in clean]
        after, before = (
            np.array([sign * source[key] for key in keys], dtype=np.float64) for source in (values.get(name, {}), clean)
        )
        sides[label].append((keys, after, after - before))
    owners = {label: [key for own, *_ in parts for key in own] for label, parts in sides.items()}
    scores = {label: np.concatenate([a for _, a, _ in parts]) for label, parts in sides.items()}
    moved = np.concatenate([m for *_, m in sides[0.0]]) / spread
    if not len(scores[1.0]) or not len(scores[0.0]):
        nothing = plain(Figure(float("nan"), float("nan"), float("nan"), 0))
        return {"auc": nothing, "moved": nothing, "higher": nothing, "pays": False}
    area, draws = auc(scores[1.0], scores[0.0], (resamples.of(owners[1.0]), resamples.of(owners[0.0])))
    shift = resamples.mean(owners[0.0], moved)
    rises = resamples.mean(owners[0.0], (moved > 0).astype(np.float64), share=True)
    return {
        "auc": plain(interval(area, draws, min(map(len, owners.values())), resamples.level)),
        "moved": plain(shift),
        "higher": plain(rises),
        "pays": bool(shift.low > PAYS),
    }


def words(row: Table) -> str:
    """What to do with it as a reward."""
    area = row["auc"]["low"] if row["auc"]["low"] is not None else row["auc"]["value"]
    if row["auc"]["high"] is not None and row["auc"]["high"] < 0.5:
        return "scores generated pictures above photographs: no reward for these"
    if area <= 0.5:
        return "does not tell these pictures from photographs: no reward for them"
    if row["rewards"]:
        return f"pays for {', '.join(row['rewards'])}: a generator trained on it alone will learn that"
    apart = f"tells them apart{' well' if area >= 0.9 else ''}"
    measured = {(one["way"], one["strength"]) for one in row["altered"] if one["moved"]["value"] is not None}
    if not measured:
        return f"{apart}; alterations not measured"
    weak = sorted({one["way"] for one in row["altered"] if one["auc"]["high"] is not None and one["auc"]["high"] < 0.6})
    lost = f", but is blind once both sides are altered by {', '.join(weak)}" if weak else ""
    open_ = sorted({way for way, strength in _each() if (way, strength) not in measured})
    return f"{apart}, and none of the alterations pays{lost}" + (f"; not measured in full: {', '.join(open_)}" if open_ else "")


def shown(result: Table) -> Shown:
    table = Shown("detector", "AUC", "average precision", "calibration error", "pays for", title=f"{result['level']:.0%} intervals")
    for row in result["detectors"]:
        error = number(row["calibration_error"]) if row["calibration_error"] else "no probability"
        measured = any(one["moved"]["value"] is not None for one in row["altered"])
        pays = ", ".join(row["rewards"]) or ("-" if measured else "not measured")
        table.add_row(escape(row["name"]), number(row["auc"]), number(row["average_precision"]), error, pays)
    return table


def _csv(result: Table, path: Path) -> None:
    rows: list[list[Any]] = [["detector", "figure", "altered by", "strength", "value", "low", "high", "n"]]
    parts = ("value", "low", "high", "n")
    for one in result["detectors"]:
        for name in ("auc", "average_precision", "calibration_error"):
            if one[name] is not None:
                rows.append([one["name"], name, None, None, *(one[name][part] for part in parts)])
        for change in one["altered"]:
            for name in ("auc", "moved", "higher"):
                rows.append([one["name"], name, change["way"], change["strength"], *(change[name][part] for part in parts)])
    save(path, rows)


def write(result: Table, out: Path) -> Path:
    """`report.html` in `out`."""
    ink = {row["name"]: charts.colour(i) for i, row in enumerate(result["detectors"])}
    plots = []
    for way, (_, strengths, unit) in WAYS.items():
        for name, label, low, high, mark in (
            ("auc", "AUC, both sides altered", 0.0, 1.0, 0.5),
            ("moved", "how far scores of generated pictures move", None, None, 0.0),
        ):
            lines = []
            for row in result["detectors"]:
                by_strength = {c["strength"]: c[name] for c in row["altered"] if c["way"] == way}
                lines.append((row["name"], [by_strength.get(s) for s in strengths], ink[row["name"]]))
            plots.append((f"{way} ({unit}): {label}", charts.lines([f"{s:g}" for s in strengths], lines, low, high, mark)))
    made: Environment = environment()
    bins = [(row["name"], row["bins"], ink[row["name"]]) for row in result["detectors"] if row["bins"]]
    page = made.from_string(PAGE.read_text()).render(
        style=STYLE.read_text(),
        result=result,
        ink=ink,
        plots=[p for p in plots if p[1]],
        calibration=charts.calibration(bins) if bins else "",
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8", errors="replace")
    return path
