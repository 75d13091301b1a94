"""A finished run as one page: did the pictures get better, or only the score?

    python -m trainer.report runs/world --compare runs/naive

Reads a run folder and writes `report.html` (self-contained: no script, no address outside) and the PNGs it shows.
"""

import argparse
import base64
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from jinja2 import Environment
from matplotlib.axes import Axes
from PIL import Image

Row = dict[str, Any]
BLUE, ORANGE, RED, GREY = "#0072b2", "#d55e00", "#b00020", "#6b7280"  # Okabe and Ito's palette: safe for colour-blind readers


class ReportError(Exception):
    """The folder is no run; the message says what is missing."""


@dataclass(frozen=True)
class Record:
    """What a run folder holds."""

    folder: Path
    config: dict[str, Any]
    versions: dict[str, Any]
    steps: list[Row]
    evals: list[Row]
    alarms: list[Row]
    done: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.folder.name))

    def best(self) -> Row:
        """The evaluation of the best checkpoint; the last one while a run goes on."""
        step = self.done.get("best_step")
        return next((row for row in self.evals if row["step"] == step), self.evals[-1])


def read(folder: Path) -> Record:
    """A run folder; ReportError when it has no evaluation to show. A last line that a crash cut short is left out."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ReportError(
            f"{folder} is no run folder: metrics.jsonl is missing; give the folder that verism-train wrote, e.g. runs/world"
        )
    rows: list[Row] = []
    for line in metrics.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    evals = [row for row in rows if row.get("kind") == "eval"]
    if not evals:
        raise ReportError(f"{folder} has no evaluation yet; a report needs at least the one before training")

    def side(name: str) -> dict[str, Any]:
        path = folder / name
        if not path.is_file():
            return {}
        loaded = yaml.safe_load(path.read_text())
        return loaded if isinstance(loaded, dict) else {}

    return Record(
        folder,
        side("config.yaml"),
        side("versions.json"),
        [row for row in rows if row.get("kind") == "step"],
        evals,
        [row for row in rows if row.get("kind") == "alarm"],
        side("done.json"),
    )


def number(row: Mapping[str, Any], key: str) -> float:
    """A metric as a float, NaN when it is missing or null."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


@dataclass(frozen=True)
class Change:
    """One line of the verdict: before, after, in words, and whether it is good (None: cannot be said)."""

    label: str
    before: float
    after: float
    words: str
    good: bool | None


def changes(record: Record) -> list[Change]:
    """Before against the best checkpoint, from the numbers alone."""
    first, best = record.evals[0], record.best()
    out = []
    rise = number(best, "reward/total_mean") - number(first, "reward/total_mean")
    error = math.hypot(number(best, "reward/total_sem"), number(first, "reward/total_sem"))
    errors = rise / error if error > 0 else math.nan
    if math.isfinite(rise):
        words = f"{rise:+.2f} standard deviations of the base policy's rewards" + (
            f", {errors:+.1f} standard errors" if math.isfinite(errors) else ""
        )
        good = errors >= 3 if math.isfinite(errors) else None
        out.append(Change("trained reward", number(first, "reward/total_mean"), number(best, "reward/total_mean"), words, good))
    for key, label, lower in (
        ("distance", "distance to photographs", True),
        ("kernel_distance", "kernel distance", True),
        ("class_hit", "class hit", False),
        ("heldout_cnn", "held-out CNN (log-odds)", False),
        ("heldout_spectrum", "held-out spectrum (log-odds)", False),
    ):
        a, b = number(first, key), number(best, key)
        if not (math.isfinite(a) and math.isfinite(b)):
            continue
        better = b <= a if lower else b >= a
        words = f"{(b - a) / a:+.0%}" if lower and a > 0 else f"{b - a:+.3g}"
        out.append(Change(label, a, b, words, better))
    return out


def verdict(record: Record) -> str:
    """The finding in one sentence."""
    found = {change.label: change for change in changes(record)}
    reward, distance, hit = (found.get(k) for k in ("trained reward", "distance to photographs", "class hit"))
    last, first = record.evals[-1], record.evals[0]
    hacked = number(last, "distance") > 1.05 * number(first, "distance")
    if record.alarms and hacked:
        return (
            f"The reward was hacked: by step {last['step']} it had risen while the distance to photographs went from "
            f"{number(first, 'distance'):.1f} to {number(last, 'distance'):.1f}. The alarm said so."
        )
    if distance is None:
        return "Nothing independent was measured (no monitors), so whether the pictures got better cannot be said."
    nearer = distance.good and distance.after < distance.before
    if nearer and (hit is None or hit.good) and reward is not None and reward.good:
        return (
            f"The pictures got better: at step {record.best()['step']} they are {-(distance.after / distance.before - 1):.0%} nearer "
            f"to photographs ({distance.before:.1f} to {distance.after:.1f}), the class hit did not fall, and the reward rose."
        )
    if nearer:
        return (
            f"The pictures came nearer to photographs ({distance.words}), but not everything that counts improved: see the table."
        )
    return "The pictures did not get better by what was never a reward."


# ---------------------------------------------------------------- plots


def _style(axis: Axes, title: str, direction: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axis.set_xlabel("training step", fontsize=9)
    axis.set_ylabel(direction, fontsize=8.5, color=GREY)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.tick_params(labelsize=8.5)


def _curve(axis: Axes, record: Record, key: str, colour: str, label: str, error: str | None = None) -> None:
    points = [(row["step"], number(row, key), number(row, error) if error else math.nan) for row in record.evals]
    points = [point for point in points if math.isfinite(point[1])]
    if not points:
        return
    x, y, e = zip(*points, strict=True)
    axis.plot(x, y, "o-", color=colour, label=label, linewidth=1.8, markersize=4)
    if all(math.isfinite(v) for v in e):
        axis.fill_between(
            x, [a - b for a, b in zip(y, e, strict=True)], [a + b for a, b in zip(y, e, strict=True)], color=colour, alpha=0.15
        )
    for alarm in record.alarms:
        axis.axvline(alarm["step"], color=RED, linestyle=":", linewidth=1.4)
        axis.annotate(
            "alarm",
            (alarm["step"], 1),
            xycoords=("data", "axes fraction"),
            color=RED,
            fontsize=8,
            ha="right",
            va="top",
            rotation=90,
        )


def _has(records: Sequence[Record], key: str) -> bool:
    return any(math.isfinite(number(row, key)) for record in records for row in record.evals)


def curves(records: Sequence[Record]) -> bytes:
    """The evaluation curves of the run (blue) and of what it is compared with (orange) as PNG bytes."""
    panels = [
        ("reward/total_mean", "Trained reward", "higher is what was asked for ↑", "reward/total_sem"),
        ("distance", "Distance to photographs", "lower is better ↓", None),
        ("class_hit", "Class hit", "higher is better ↑", None),
        ("heldout_cnn", "Held-out CNN, log-odds of “photograph”", "higher is better ↑", None),
        ("heldout_spectrum", "Held-out spectrum, log-odds", "higher is better ↑", None),
    ]
    for name in records[0].config.get("rewards", {}):
        panels.append((f"reward/{name}/mean", f"Reward: {name}", "as its service gave it", f"reward/{name}/sem"))
    panels = [panel for panel in panels if _has(records, panel[0])]
    rows = max(1, -(-len(panels) // 2))
    figure, axes = plt.subplots(rows, 2, figsize=(10, 2.7 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (key, title, direction, error) in zip(axes.flat, panels, strict=False):
        for record, colour in zip(records, (BLUE, ORANGE, GREY), strict=False):
            _curve(axis, record, key, colour, record.name, error)
        _style(axis, title, direction)
        if len(records) > 1:
            axis.legend(fontsize=8, frameon=False)
    return _png(figure)


def training(record: Record) -> bytes | None:
    """KL, gradient norm, clipped share and the seconds of a step, as PNG bytes; None without steps."""
    if not record.steps:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(10, 2.5), layout="constrained")
    x = [row["step"] for row in record.steps]
    for axis, key, title in ((axes[0], "kl", "KL to the base policy"), (axes[1], "grad_norm", "Gradient norm")):
        axis.plot(x, [number(row, key) for row in record.steps], color=BLUE, linewidth=1.2)
        _style(axis, title, "")
    parts = [
        ("seconds/sample", "sampling", BLUE),
        ("seconds/wait", "waiting for rewards", ORANGE),
        ("seconds/train", "training", "#009e73"),
    ]
    values = [[0.0 if math.isnan(v := number(row, key)) else v for row in record.steps] for key, _, _ in parts]
    axes[2].stackplot(x, *values, labels=[label for _, label, _ in parts], colors=[c for _, _, c in parts], alpha=0.85)
    axes[2].legend(fontsize=7.5, frameon=False)
    _style(axes[2], "Seconds per step", "")
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    plt.close(figure)
    return buffer.getvalue()


# ---------------------------------------------------------------- the page


def grid_of(record: Record, step: int) -> bytes | None:
    """The grid of an evaluation, checked to be a PNG, or None."""
    for pattern in (f"step_{step:05d}.png", f"step_{step:06d}.png"):
        path = record.folder / "grids" / pattern
        if path.is_file():
            with Image.open(path, formats=["PNG"]) as picture:
                picture.verify()
            return path.read_bytes()
    return None


def _uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _section(record: Record) -> dict[str, Any]:
    first, best = record.evals[0], record.best()
    last = record.evals[-1]
    grids = [("before", first["step"])]
    if best["step"] != first["step"]:
        grids.append(("after (best checkpoint)", best["step"]))
    if last["step"] not in {step for _, step in grids}:
        grids.append(("where it ended", last["step"]))
    shown = [
        {"label": label, "step": step, "uri": _uri(data)} for label, step in grids if (data := grid_of(record, step)) is not None
    ]
    return {
        "name": record.name,
        "description": record.config.get("description", ""),
        "verdict": verdict(record),
        "changes": [
            {
                "label": c.label,
                "before": f"{c.before:.3g}",
                "after": f"{c.after:.3g}",
                "words": c.words,
                "good": {True: "good", False: "bad", None: ""}[c.good],
            }
            for c in changes(record)
        ],
        "best": best["step"],
        "steps": len(record.steps),
        "alarms": [{"step": a["step"], "reason": a["reason"], "best": a.get("best_step")} for a in record.alarms],
        "grids": shown,
        "failed": sum(int(number(row, "failed_scores")) for row in record.steps if math.isfinite(number(row, "failed_scores"))),
        "masked": sum(int(number(row, "masked_samples")) for row in record.steps if math.isfinite(number(row, "masked_samples"))),
        "config": yaml.safe_dump(record.config, sort_keys=False),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            out += _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", []):
            out.append((f"{prefix}{key}", str(value)))
    return out


PAGE = Path(__file__).with_suffix(".html")


def write_report(run_dir: Path, compare: Sequence[Path] = ()) -> Path:
    """Write `report.html` and `report_curves.png` into the run's folder and return the page's path."""
    records = [read(Path(folder)) for folder in (run_dir, *compare)]
    drawn = curves(records)
    (records[0].folder / "report_curves.png").write_bytes(drawn)
    below = training(records[0])
    photographs = records[0].folder / "grids" / "photographs.png"
    page = (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(PAGE.read_text())
        .render(
            runs=[_section(record) for record in records],
            curves=_uri(drawn),
            training=_uri(below) if below is not None else None,
            photographs=_uri(photographs.read_bytes()) if photographs.is_file() else None,
            versions=_flat(records[0].versions),
        )
    )
    out = records[0].folder / "report.html"
    out.write_text(page)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.report", description="Write a run's report: one HTML file.")
    parser.add_argument("run", type=Path, help="the folder that verism-train wrote, e.g. runs/world")
    parser.add_argument(
        "--compare", type=Path, action="append", default=[], help="another run to show beside it; may be given again"
    )
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.run, arguments.compare))
    except ReportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
