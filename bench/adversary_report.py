"""What bench/adversary.py has trained, as tables, curves, pictures and an answer: read from the run folders alone, what is there."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from bench.adversary import ARMS, FASTER, KIND, NEIGHBOURS, ROOT, WAYS, looks, tiles
from bench.algorithms import lines
from bench.algorithms_report import PICTURES as USUAL
from bench.algorithms_report import at, common_steps, photographs, put, spread

START, END = "<!-- adversary: written by make bench-adversary -->", "<!-- end of adversary -->"
DOCUMENT, IMAGES = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images"
RESULT = ROOT / "bench" / "results" / "adversary.json"
COMPARED, TRANSFER = ("frozen", "realgen_v2", "adv_grpo"), ("transfer", "transfer_all")
SHOWN_PICTURES = 20
BY_STEP = ("seconds", "refit_seconds", "accuracy_before_refit")  # of a run
Run = dict[str, Any]
# (heading, key of an evaluation, digits)
SHOWN = (
    ("frozen detector", "reward/frozen/mean", 1),
    ("judge", "reward/judge/mean", 1),
    ("alignment", "reward/alignment/mean", 2),
    ("held-out CNN", "heldout_cnn", 1),
    ("held-out spectrum", "heldout_spectrum", 1),
    ("distance", "distance", 1),
    ("class hit", "class_hit", 2),
    ("accuracy", "accuracy", 2),
    ("AUC", "auc", 2),
)
PANELS = (
    ("trained reward of frozen and RealGen V2 (log-odds)", "trained", ("frozen", "realgen_v2")),
    ("trained reward of Adv-GRPO's head (margin)", "trained", ("adv_grpo",)),
    ("the frozen detector (log-odds)", "reward/frozen/mean", COMPARED),
    ("the judge (margin)", "reward/judge/mean", COMPARED),
    ("held-out CNN (log-odds)", "heldout_cnn", COMPARED),
    ("held-out spectrum (log-odds)", "heldout_spectrum", COMPARED),
    ("distance to photographs", "distance", COMPARED),
    ("class hit", "class_hit", COMPARED),
    ("accuracy of the trained detector, fresh pictures", "accuracy", COMPARED),
)


def read(out: Path) -> list[Run]:
    """Every run in `out` with an evaluation; what detectors told apart is beside it."""
    runs = []
    for folder in sorted(out.glob("*/*/seed*")):
        name, way = folder.parent.parent.name, folder.parent.name
        told = lines(folder)
        evaluations = [line for line in told if line["kind"] == "eval"]
        if not evaluations or name not in ARMS or way not in ARMS[name].ways:
            continue
        reward, seen = ARMS[name].reward, looks(folder)
        steps = [line for line in told if line["kind"] == "step"]
        for line in evaluations:
            line |= {key: value for key, value in seen.get(line["step"], {}).items() if key not in ("step", "reward")}
            line["trained"] = line.get(f"reward/{reward}/mean")
            refits = [step for step in steps if step["step"] <= line["step"] and f"adversary/{reward}/refits" in step]
            for key in ("refits", "kept_out"):
                line[key] = refits[-1][f"adversary/{reward}/{key}"] if refits else 0
            line["version"] = line.get(f"adversary/{reward}/version", line.get("version", 1))
        costs = folder / "costs.jsonl"
        fresh = {
            step["step"]: step[f"adversary/{reward}/accuracy_before"]
            for step in steps
            if f"adversary/{reward}/accuracy_before" in step
        }
        runs.append(
            {
                "arm": name,
                "way": way,
                "seed": int(folder.name.removeprefix("seed")),
                "folder": str(folder.relative_to(out)),
                "evaluations": evaluations,
                "pictures": (pictures := pictures_of(folder)),
                "seconds": {step["step"]: pictures / step["pictures/second"] for step in steps},
                "refit_seconds": {step["step"]: step["seconds/refit"] for step in steps if "seconds/refit" in step},
                "accuracy_before_refit": fresh,
                "costs": [json.loads(line) for line in costs.read_text().splitlines()] if costs.is_file() else [],
            }
        )
    return runs


def with_earlier(runs: Sequence[Run]) -> list[Run]:
    """Runs, and those of RESULT whose folders are gone: a fresh checkout goes on from what earlier ones measured."""
    earlier = json.loads(RESULT.read_text())["runs"] if RESULT.is_file() else []
    having = {run["folder"] for run in runs}
    for run in earlier:  # JSON has no integers as keys
        run |= {key: {int(step): value for step, value in run[key].items()} for key in BY_STEP}
    return sorted([*runs, *(run for run in earlier if run["folder"] not in having)], key=lambda run: run["folder"])


def pictures_of(folder: Path) -> int:
    """Of a step, by the run's own configuration."""
    path = folder / "config.yaml"
    if not path.is_file():
        return USUAL
    group = yaml.safe_load(path.read_text())["group"]
    return int(group["prompts"] * group["size"])


def grouped(runs: Sequence[Run], way: str, names: Sequence[str] = COMPARED) -> dict[str, list[Run]]:
    """Runs of a way by arm; arms without any are left out."""
    found = {name: [run for run in runs if run["arm"] == name and run["way"] == way] for name in names}
    return {name: group for name, group in found.items() if group}


def there(groups: Mapping[str, Sequence[Run]], step: int) -> dict[str, list[Run]]:
    """Those that have come to `step`."""
    found = {name: [run for run in group if at(run, step)] for name, group in groups.items()}
    return {name: group for name, group in found.items() if group}


def table(step: int, groups: Mapping[str, Sequence[Run]], real: Mapping[str, float]) -> list[str]:
    """Markdown: what photographs get, a row before training, and one for each arm after `step` steps."""
    heads = [
        "arm",
        "seeds",
        "trained reward",
        *(head for head, *_ in SHOWN),
        "least distance (after)",
        "version",
        "refits, kept out",
        "a step",
    ]
    rows = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    first = next((run for run in groups.get("frozen", next(iter(groups.values()), []))), None)
    for name, before in (("photographs", real), ("before", (at(first, 0) or {}) if first else {})):
        cells = [spread([before.get(key)], digits) for _, key, digits in SHOWN]
        rows.append("| " + " | ".join([name, "", "", *cells, "", "", "", ""]) + " |")
    for name, group in groups.items():
        told = [at(run, step) or {} for run in group]
        cells = [spread([line.get(key) for line in told], digits) for _, key, digits in SHOWN]
        least = [min((e for e in run["evaluations"] if 0 < e["step"] <= step), key=lambda e: e["distance"]) for run in group]
        where = ", ".join(str(e["step"]) for e in least)
        seconds = [statistics.median(v for n, v in run["seconds"].items() if n <= step) for run in group if run["seconds"]]
        tail = [
            f"{spread([e['distance'] for e in least], 1)} ({where})",
            ", ".join(str(line["version"]) for line in told),
            ", ".join(f"{line['refits']}+{line['kept_out']}" for line in told),
            f"{spread(seconds, 0)} s",
        ]
        seeds = ", ".join(str(run["seed"]) for run in group)
        trained = spread([line["trained"] for line in told], 1)
        rows.append("| " + " | ".join([f"**{ARMS[name].label}**", seeds, trained, *cells, *tail]) + " |")
    return rows


def moved(group: Sequence[Run], key: str, begin: int, end: int) -> tuple[float, float, int, int] | None:
    """Means over seeds at both steps, in how many of how many seeds it rose."""
    both = [(one.get(key), other.get(key)) for run in group if (one := at(run, begin)) and (other := at(run, end))]
    known = [(a, b) for a, b in both if a is not None and b is not None]
    if not known:
        return None
    before, after = (statistics.fmean(values) for values in zip(*known, strict=True))
    return before, after, sum(b > a for a, b in known), len(known)


def verdict(step: int, groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """The papers' sentence, by the second half of the run: with a frozen detector the distance stops improving or worsens while the reward
    rises; with refits it goes on improving. And who is ahead at the end, by seeds that both have."""
    if "frozen" not in groups or len(groups) < 2:
        return ["- not measured: it takes the frozen detector and one that is refitted"]
    known = sorted(
        set.intersection(
            *({e["step"] for run in group for e in run["evaluations"] if e["step"] < step} for group in groups.values())
        )
    )
    if not known:
        return ["- not measured: no evaluation before the last in common"]
    half = min(known, key=lambda n: (abs(n - step / 2), n))
    out, falls, rises = [], dict[str, bool](), dict[str, bool]()
    for name, group in groups.items():
        distance, reward = moved(group, "distance", half, step), moved(group, "trained", half, step)
        if distance is None or reward is None:
            return [f"- not measured: {ARMS[name].label} has no seed with both evaluations"]
        falls[name], rises[name] = distance[1] < distance[0], reward[1] > reward[0]
        note = "" if name == "frozen" else " (of different versions, so they do not compare)"
        out.append(
            f"- {ARMS[name].label}: distance {distance[0]:.1f} -> {distance[1]:.1f}, it fell in {distance[3] - distance[2]} of {distance[3]}; "
            f"trained reward {reward[0]:.1f} -> {reward[1]:.1f}, it rose in {reward[2]} of {reward[3]}{note}"
        )
    frozen = rises["frozen"] and not falls["frozen"]
    one = (
        "holds"
        if frozen
        else "does not hold: " + ("its distance went on falling" if falls["frozen"] else "its reward did not rise")
    )
    text = [f"From step {half} to {step}, means over seeds. For the frozen detector the claim {one}."]
    for name in groups:
        if name != "frozen":
            text.append(
                f"For {ARMS[name].label} it {'holds' if falls[name] else 'does not hold: the distance did not go on falling'}."
            )
    return [" ".join(text), "", *out, *ahead(step, groups)]


def ahead(step: int, groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """Refitted against frozen after `step` steps, seed by seed."""
    out = []
    frozen = {run["seed"]: at(run, step) or {} for run in groups["frozen"]}
    for name, group in groups.items():
        own = {run["seed"]: at(run, step) or {} for run in group}
        seeds = sorted(frozen.keys() & own.keys()) if name != "frozen" else []
        if not seeds:
            continue
        closer = sum(own[seed]["distance"] < frozen[seed]["distance"] for seed in seeds)
        hits = sum(own[seed]["class_hit"] > frozen[seed]["class_hit"] for seed in seeds)
        out.append(
            f"- {ARMS[name].label} against frozen after {group[0]['pictures'] * step} pictures: smaller distance in "
            f"{closer} of {len(seeds)} seeds, higher class hit in {hits} of {len(seeds)}"
        )
    return out


def transfer(runs: Sequence[Run], wanted: int) -> list[str]:
    """Markdown: the share of one class before and after, by the independent classifier, beside the head whose references have all five."""
    groups = grouped(runs, "alone", TRANSFER)
    steps = common_steps(groups.values(), wanted) if groups else []
    if not steps:
        return ["No evaluation yet."]
    heads = ["references", "seeds", "after", f"called {KIND}", "class hit", "distance", "accuracy", "version"]
    rows = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for name, group in groups.items():
        for step in (0, steps[-1]):
            told = [line for run in group if (line := at(run, step)) and "classes" in line]
            if not told:
                continue
            shares = spread([line["classes"][KIND] for line in told], 2)
            cells = [
                spread([line.get(key) for line in told], digits)
                for key, digits in (("class_hit", 2), ("distance", 1), ("accuracy", 2))
            ]
            seeds = ", ".join(str(run["seed"]) for run in group if at(run, step))
            label = f"{KIND}s" if name == "transfer" else "all five"
            rows.append(
                "| "
                + " | ".join(
                    [label, seeds, str(group[0]["pictures"] * step), shares, *cells, ", ".join(str(e["version"]) for e in told)]
                )
                + " |"
            )
    return rows


def section(runs: Sequence[Run], wanted: int, real: Mapping[str, float]) -> str:
    """All of it for docs/benchmarks.md."""
    samples = runs[0]["evaluations"][0]["n"]
    loads = [each["load"] for run in runs for each in run["costs"]]
    load = f"; load of the machine {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    text = [
        "## Detectors that learn along (`make bench-adversary`)",
        "",
        f"{datetime.now(UTC).date()}, {os.cpu_count()} cores{load}; {runs[0]['pictures']} pictures a step, evaluations of {samples}.",
        "The small world, policy and settings of recipe `world` at a slower pace (`PACE`); refits as recipes `realgen_v2_small`,",
        "`adv_grpo_dino_small` and `examples/serve/adversary.yaml` have them. Alone: the detector is all that is trained on, no KL. With",
        "alignment and KL: half the weight is alignment's, `kl.weight` 0.003. Mean over seeds, with the range. The judge is nobody's reward.",
        "Accuracy and AUC: how well the detector that was trained on, in the version served then, tells fresh pictures from photographs",
        "that no refit has seen. Trained rewards of different versions do not compare.",
        "",
    ]
    for way, label in WAYS.items():
        text += [f"### {label[0].upper()}{label[1:]}", ""]
        groups = grouped(runs, way)
        steps = common_steps(groups.values(), wanted) if groups else []
        for step in steps:
            found = there(groups, step)
            text += [
                f"After {runs[0]['pictures'] * step} pictures (step {step}):",
                "",
                *table(step, found, real),
                "",
                *verdict(step, found),
                "",
            ]
        if not steps:
            text += ["No evaluation in common yet.", ""]
        missing = [ARMS[name].label for name in COMPARED if name not in groups]
        seeds = min((len(there({name: group}, wanted).get(name, [])) for name, group in groups.items()), default=0)
        if missing or seeds < 3:
            what = f"no run of {', '.join(missing)}" if missing else f"{seeds} of 3 seeds at step {wanted}"
            text += [f"Not the whole: {what}. `make bench-adversary` goes on from here.", ""]
    text += [
        "![curves](images/adversary.png)",
        "",
        "Evaluation pictures of one seed, the same prompts and noises in each row:",
        "",
        "![pictures](images/adversary-pictures.png)",
        "",
        f"### References of one class: {KIND}s",
        "",
        f"Trained on prompts of five classes ({', '.join(NEIGHBOURS)}) at {FASTER[0]}, with {KIND}s alone as the head's references, or with",
        "photographs of all five. Evaluated on all ten classes; classes as the monitors' classifier sees them.",
        "",
        *transfer(runs, wanted),
    ]
    return "\n".join(text)


def plot(runs: Sequence[Run], path: Path) -> None:
    """A panel for each measure against pictures: arms by colour, ways by line, mean and range over seeds; the last version beside its end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 3, figsize=(15, 12))
    for axis, (title, key, names) in zip(axes.flat, PANELS, strict=True):
        for way in WAYS:
            for name, group in grouped(runs, way, names).items():
                having = [[line["step"] for line in run["evaluations"] if line.get(key) is not None] for run in group]
                steps = sorted(set.intersection(*map(set, having)))
                if not steps:
                    continue
                values = [[(at(run, step) or {})[key] for run in group] for step in steps]
                x, colour, style = (
                    [group[0]["pictures"] * step for step in steps],
                    f"C{COMPARED.index(name)}",
                    "-" if way == "alone" else "--",
                )
                means = [statistics.fmean(v) for v in values]
                axis.plot(
                    x, means, style, marker="o", markersize=3, color=colour, label=f"{ARMS[name].label}, {way} ({len(group)})"
                )
                axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=0.15, color=colour, linewidth=0)
                if key == "trained" and name != "frozen":
                    versions = sorted({(at(run, steps[-1]) or {})["version"] for run in group})
                    axis.annotate("v" + "/".join(map(str, versions)), (x[-1], means[-1]), fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("pictures")
        if key == "distance":
            axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def show(runs: Sequence[Run], out: Path, path: Path, wanted: int) -> None:
    """Rows of pictures: photographs, before, and each arm at its last evaluation up to `wanted`, of its first seed."""
    import matplotlib
    import numpy as np

    from world import photographs as known

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [("photographs", known.load("test")[0][:SHOWN_PICTURES])]
    for way in WAYS:
        for group in grouped(runs, way, (*COMPARED, *TRANSFER)).values():
            having = [run for run in group if (out / run["folder"] / "grids").is_dir()]
            if not having:
                continue
            run = min(having, key=lambda one: one["seed"])
            for step in (*([0] if len(rows) == 1 else []), max(e["step"] for e in run["evaluations"] if e["step"] <= wanted)):
                grid = out / run["folder"] / "grids" / f"step_{step:05d}.png"
                label = f"{ARMS[run['arm']].label}, {run['way']}, step {step}" if step else "before"
                if grid.is_file():
                    rows.append((label, tiles(grid, min(SHOWN_PICTURES, (at(run, step) or {})["n"]))))
    figure, axes = plt.subplots(len(rows), 1, figsize=(12, 0.95 * len(rows)), squeeze=False)
    for axis, (label, images) in zip(axes[:, 0], rows, strict=True):
        axis.imshow(np.concatenate(list(images), 1), interpolation="nearest")
        axis.set_title(label, fontsize=8, loc="left", pad=2)
        axis.axis("off")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(out: Path, wanted: int, document: bool, say: Callable[[str], None] = print) -> None:
    """Tables and plots of what is in `out`; into the documentation unless it was but a look."""
    runs = with_earlier(read(out)) if document else read(out)
    if not runs:
        say(f"nothing has been evaluated in {out} yet")
        return
    real = photographs()
    text = section(runs, wanted, real)
    stamp = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.machine(), "cores": os.cpu_count()}
    result = {**stamp, "photographs": real, "runs": runs}
    target, images = (RESULT, IMAGES) if document else (out / "adversary.json", out)
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    plot(runs, images / "adversary.png")
    show(runs, out, images / "adversary-pictures.png", wanted)
    if document:
        put(text, DOCUMENT, START, END)
    else:
        (out / "adversary.md").write_text(text + "\n")
    say(text)
