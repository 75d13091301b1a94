"""A finished run as one page: did the pictures get better, or only the score?

    python -m trainer.report runs/world --compare runs/naive

Reads a run folder and writes `report.html` (self-contained: no script, no address outside) and `report_curves.png`.
"""

import argparse
import base64
import io
import json
import math
import sys
import warnings
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
from matplotlib.ticker import MaxNLocator
from PIL import Image

from trainer.language import report as language

Row = dict[str, Any]
ACCURACY = "adversary accuracy: "  # a panel of a detector's refits, which are told by steps and not by evaluations
CLEARLY = 1.05  # a distance that changed by less than 5 % is not called nearer or farther
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

    def hacked(self) -> bool:
        """The alarm rang, and the run ended with more reward and clearly farther from photographs than it started."""
        first, last = self.evals[0], self.evals[-1]
        farther = number(last, "distance") > CLEARLY * number(first, "distance")
        return bool(self.alarms) and farther and number(last, "reward/total_mean") > number(first, "reward/total_mean")

    def refitted(self) -> bool:
        """A detector learned along, so rewards of different evaluations are of different versions."""
        return any(
            number(row, key) > 0 for row in self.evals for key in row if key.startswith("adversary/") and key.endswith("/refits")
        )

    def judged(self) -> Row:
        """What `before` is held against: the best checkpoint, or, so that the damage is seen, the end of a hacked run."""
        return self.evals[-1] if self.hacked() else self.best()

    def judged_label(self) -> str:
        if self.hacked():
            return "where it ended"
        known = any(row["step"] == self.done.get("best_step") for row in self.evals)
        return "best checkpoint" if known else "last evaluation"


def read(folder: Path) -> Record:
    """A run folder; ReportError when it has no evaluation to show. A last line that a crash cut short is left out."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ReportError(
            f"{folder} is no run folder: metrics.jsonl is missing; give the folder that verism-train wrote, e.g. runs/world"
        )
    rows: list[Row] = []
    lines = metrics.read_text(errors="replace").splitlines()
    for place, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if place < len(lines):
                raise ReportError(f"{metrics}, line {place} is not JSON: remove that line") from error
            break
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    evals = [row for row in rows if row.get("kind") == "eval"]
    if not evals:
        raise ReportError(f"{folder} has no evaluation yet; a report needs at least the one before training")

    def side(name: str) -> dict[str, Any]:
        path = folder / name
        if not path.is_file():
            return {}
        try:
            loaded = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ReportError(f"{path} cannot be read: {error}; mend it, or remove it to have the report without it") from error
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
    """Before against the best checkpoint (the end of a hacked run), from the numbers alone.

    The standard error is that of a difference of two independent means; both evaluations use the same prompts and noise, so it
    is rather too large than too small.
    """
    first, best = record.evals[0], record.judged()
    out = []
    rise = number(best, "reward/total_mean") - number(first, "reward/total_mean")
    error = math.hypot(number(best, "reward/total_sem"), number(first, "reward/total_sem"))
    errors = rise / error if error > 0 else math.nan
    if math.isfinite(rise):
        words = f"{rise:+.2f} standard deviations of the base policy's rewards" + (
            f", {errors:+.1f} standard errors" if math.isfinite(errors) else ""
        )
        good = (None if abs(errors) < 3 else errors > 0) if math.isfinite(errors) else None
        if record.refitted():
            words, good = f"{words}, by several versions of a detector: no measure of progress", None
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
        better = None if b == a else b < a if lower else b > a
        words = f"{(b - a) / a:+.0%}" if lower and a > 0 else f"{b - a:+.3g}"
        out.append(Change(label, a, b, words, better))
    return out


def verdict(record: Record) -> str:
    """The finding in a sentence or two."""
    if not record.hacked():
        rang = f" The alarm rang at step {record.alarms[0]['step']}." if record.alarms else ""
        return _finding(record) + rang
    last, first, best = record.evals[-1], record.evals[0], record.best()
    text = (
        f"The reward was hacked: by step {last['step']} it had risen by "
        f"{number(last, 'reward/total_mean') - number(first, 'reward/total_mean'):.2f} while the distance to photographs went "
        f"from {number(first, 'distance'):.1f} to {number(last, 'distance'):.1f}. The alarm said so."
    )
    if CLEARLY * number(best, "distance") < number(first, "distance"):
        text += f" Before that, at step {best['step']}, the distance was down to {number(best, 'distance'):.1f}; that checkpoint is kept."
    return text


def _finding(record: Record) -> str:
    """Whether the best checkpoint is better than the start."""
    found = {change.label: change for change in changes(record)}
    reward, distance, hit = (found.get(k) for k in ("trained reward", "distance to photographs", "class hit"))
    if distance is None:
        return "Nothing independent was measured (no monitors), so whether the pictures got better cannot be said."
    nearer = distance.after * CLEARLY < distance.before
    if nearer and (hit is None or hit.good is not False) and reward is not None and (reward.good or record.refitted()):
        held = "the class hit did not fall" if hit is not None else "the class hit was not measured"
        rose = f"the reward rose by {reward.after - reward.before:.2f} ({reward.words.rsplit(', ', 1)[-1]})"
        if record.refitted():
            rose = "what the reward did cannot be told, since a detector learned along"
        return (
            f"The pictures got better: at step {record.best()['step']} they are {1 - distance.after / distance.before:.0%} nearer "
            f"to photographs ({distance.before:.1f} to {distance.after:.1f}), {held}, and {rose}.{_held_out(found)}"
        )
    if nearer:
        return (
            f"The pictures came nearer to photographs ({distance.words}), but not everything that counts improved: see the table."
        )
    return "The pictures did not get clearly better by what was never a reward."


def _held_out(found: Mapping[str, Change]) -> str:
    """What the held-out detectors say, as a sentence of its own."""
    held = [change for label, change in found.items() if label.startswith("held-out")]
    if not held:
        return ""
    up = sum(change.good is True for change in held)
    return f" Of {len(held)} held-out detector{'s' * (len(held) > 1)}, {up} believe{'s' * (up == 1)} them more."


# ---------------------------------------------------------------- plots


def _style(axis: Axes, title: str, direction: str) -> None:
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=15)
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
            "alarm ", (alarm["step"], 1.01), xycoords=("data", "axes fraction"), color=RED, fontsize=8, ha="center", va="bottom"
        )


def _detector(axis: Axes, record: Record, name: str, colour: str, label: str) -> None:
    """Accuracy that a detector came to by each refit, on a stalk from where it stood before."""
    key = f"adversary/{name}/"
    rows = [(row["step"], number(row, f"{key}accuracy_before"), number(row, f"{key}accuracy")) for row in record.steps]
    refits = [row for row in rows if math.isfinite(row[2])]
    if not refits:
        return
    x, before, after = zip(*refits, strict=True)
    axis.vlines(x, before, after, color=colour, alpha=0.4, linewidth=1.2)
    axis.plot(x, after, "o-", color=colour, label=label, linewidth=1.6, markersize=4)
    axis.axhline(0.5, color=GREY, linestyle=":", linewidth=0.8)
    axis.set_ylim(top=1.04)


def _versions(axis: Axes, records: Sequence[Record], name: str) -> None:
    """The version that scored after each step, dashed, on an axis at the right."""
    right = axis.twinx()
    for record, colour in zip(records, (BLUE, ORANGE, GREY), strict=False):
        seen = [(row["step"], number(row, f"adversary/{name}/version")) for row in record.steps]
        if seen := [(step, version) for step, version in seen if math.isfinite(version)]:
            right.step(*zip(*seen, strict=True), where="post", color=colour, linestyle="--", linewidth=1, alpha=0.7)
    right.set_ylabel("version (dashed)", fontsize=8.5, color=GREY)
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    right.tick_params(labelsize=8.5)
    right.spines[["top", "left", "bottom"]].set_visible(False)


def _plain(text: str) -> str:
    """A name from a configuration as matplotlib shall draw it: no formula, and never hidden from the legend."""
    shown = "".join(c if c.isprintable() else " " for c in text)[:60].replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _has(records: Sequence[Record], key: str) -> bool:
    if key.startswith(ACCURACY):
        key = f"adversary/{key.removeprefix(ACCURACY)}/accuracy"
        return any(math.isfinite(number(row, key)) for record in records for row in record.steps)
    return any(math.isfinite(number(row, key)) for record in records for row in record.evals)


Panel = tuple[str, str, str, str | None]  # key, title, direction, key of the standard error


def panels(records: Sequence[Record]) -> list[Panel]:
    """The curves for which any of the runs has a number."""
    known: list[Panel] = [
        ("reward/total_mean", "Trained reward", "higher is what was asked for ↑", "reward/total_sem"),
        ("distance", "Distance to photographs", "lower is better ↓", None),
        ("class_hit", "Class hit", "higher is better ↑", None),
        ("heldout_cnn", "Held-out CNN, log-odds of “photograph”", "higher is better ↑", None),
        ("heldout_spectrum", "Held-out spectrum, log-odds", "higher is better ↑", None),
    ]
    rewards = records[0].config.get("rewards")
    for name in rewards if isinstance(rewards, Mapping) else ():
        known.append((f"reward/{name}/mean", f"Reward: {_plain(str(name))}", "as its service gave it", f"reward/{name}/sem"))
    adversary = records[0].config.get("adversary")
    for name in adversary if isinstance(adversary, Mapping) else ():
        shown = _plain(str(name))
        known.append((f"{ACCURACY}{name}", f"{shown}: photographs told from samples", "accuracy, held out", None))
        known.append((f"adversary/{name}/gap", f"{shown}: references above samples", "below 0: samples look more real", None))
    return [panel for panel in known if _has(records, panel[0])]


def curves(records: Sequence[Record], chosen: Sequence[Panel], columns: int = 2) -> bytes:
    """Evaluation curves of the run (blue) and of what it is compared with (orange, then grey) as PNG bytes."""
    rows = max(1, -(-len(chosen) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 2.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    for axis, (key, title, direction, error) in zip(axes.flat, chosen, strict=False):
        for record, colour in zip(records, (BLUE, ORANGE, GREY), strict=False):
            if key.startswith(ACCURACY):
                _detector(axis, record, key.removeprefix(ACCURACY), colour, _plain(record.name))
            else:
                _curve(axis, record, key, colour, _plain(record.name), error)
        if key.startswith(ACCURACY):
            _versions(axis, records, key.removeprefix(ACCURACY))
        _style(axis, title, direction)
        if len(records) > 1 and axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False, loc="lower left" if key.startswith(ACCURACY) else "best")
    return _png(figure)


def training(record: Record) -> list[tuple[str, bytes]]:
    """Title and PNG bytes of each: KL, share of clipped samples, ratio, gradient norm, seconds of a step. Only what was logged."""
    x = [row["step"] for row in record.steps]
    out = []
    for key, title, words in (
        ("kl", "KL to the base policy", "higher: farther from the start"),
        ("clipfrac", "Clipped samples", "share of samples"),
        ("ratio_dev", "Ratio, largest |r − 1|", "against the policy that sampled"),
        ("grad_norm", "Gradient norm", "before clipping"),
    ):
        y = [number(row, key) for row in record.steps]
        if not any(map(math.isfinite, y)):
            continue
        figure, axis = plt.subplots(figsize=(5, 2.5), layout="constrained")
        axis.plot(x, y, color=BLUE, linewidth=1.2, marker="." if len(x) < 3 else None)
        _style(axis, title, words)
        out.append((title, _png(figure)))
    parts = [
        ("seconds/sample", "sampling", BLUE),
        ("seconds/decode", "decoding", "#56b4e9"),
        ("seconds/encode", "text encoding", GREY),
        ("seconds/wait", "waiting for rewards", ORANGE),
        ("seconds/train", "training", "#009e73"),
        ("seconds/refit", "refitting", "#cc79a7"),
    ]
    values = [[0.0 if not math.isfinite(v := number(row, key)) else v for row in record.steps] for key, _, _ in parts]
    if any(map(any, values)):
        figure, axis = plt.subplots(figsize=(5, 2.5), layout="constrained")
        axis.stackplot(x, *values, labels=[label for _, label, _ in parts], colors=[c for _, _, c in parts], alpha=0.85)
        axis.set_ylim(0, 1.35 * max(map(sum, zip(*values, strict=True))))
        axis.legend(fontsize=7.5, frameon=False, ncols=3, loc="upper left")
        _style(axis, "Seconds per step", "lower is better ↓")
        out.append(("Seconds per step", _png(figure)))
    return out


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a run may be named in any script
        figure.savefig(buffer, dpi=130, format="png")
    plt.close(figure)
    return buffer.getvalue()


# ---------------------------------------------------------------- the page


def grid_of(record: Record, step: int) -> bytes | None:
    """The grid of an evaluation, checked to be a PNG, or None."""
    for pattern in (f"step_{step:05d}.png", f"step_{step:06d}.png"):
        path = record.folder / "grids" / pattern
        if path.is_file():
            return _picture(path)
    return None


def _picture(path: Path) -> bytes | None:
    """The bytes of a PNG file, or None where it is missing or is none."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, SyntaxError, ValueError):
        return None
    return path.read_bytes()


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
        "language": language.section(record.folder, record.config, record.judged()),
        "changes": [
            {
                "label": c.label,
                "before": f"{round(c.before, 9) + 0.0:.3g}",
                "after": f"{round(c.after, 9) + 0.0:.3g}",
                "words": c.words,
                "good": {True: "good", False: "bad", None: ""}[c.good],
            }
            for c in changes(record)
        ],
        "judged": f"{record.judged_label()}, step {record.judged()['step']}",
        "best": best["step"],
        "running": not record.done,
        "unscored": _unscored(record),
        "steps": len(record.steps),
        "alarms": [
            {"step": a["step"], "reason": a.get("reason", "no reason was written"), "best": a.get("best_step")}
            for a in record.alarms
        ],
        "grids": shown,
        "config": yaml.safe_dump(record.config, sort_keys=False),
    }


def _unscored(record: Record) -> list[tuple[str, str]]:
    """What was not scored, counted: in training by reason, in evaluations, masked samples, skipped steps."""

    def total(rows: Sequence[Row], key: str) -> int:
        return sum(int(v) for row in rows if math.isfinite(v := number(row, key)))

    reasons: dict[str, int] = {}
    for row in record.steps:
        for kind, count in (row.get("failures") or {}).items():
            reasons[str(kind)] = reasons.get(str(kind), 0) + int(count)
    out = [
        ("scores that failed in training", str(total(record.steps, "failed_scores"))),
        ("samples left out of the loss", str(total(record.steps, "masked_samples"))),
        ("training steps without any score", str(total(record.steps, "skipped"))),
        ("groups without a difference to learn from", str(total(record.steps, "zero_std_groups"))),
        ("scores that failed in evaluations", str(total(record.evals, "failed_scores"))),
    ]
    return out + [(f"failures: {kind}", str(count)) for kind, count in sorted(reasons.items())]


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
    chosen = panels(records)
    (records[0].folder / "report_curves.png").write_bytes(curves(records, chosen))
    photographs = _picture(records[0].folder / "grids" / "photographs.png")
    page = (
        Environment(autoescape=True, trim_blocks=True)
        .from_string(PAGE.read_text())
        .render(
            runs=[_section(record) for record in records],
            curves=[(panel[1], _uri(curves(records, [panel], columns=1))) for panel in chosen],
            training=[(title, _uri(data)) for title, data in training(records[0])],
            photographs=_uri(photographs) if photographs is not None else None,
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
