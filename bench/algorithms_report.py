"""What bench/algorithms.py has trained, as tables, a plot and answers: read from the run folders alone, whatever is there of them."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.algorithms import ALGORITHMS, COMPARED, HACKED, PAIR, ROOT, best_settings, lines

START, END = "<!-- algorithms: written by make bench-algorithms -->", "<!-- end of algorithms -->"
DOCUMENT, PLOT = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images" / "algorithms.png"
RESULT = ROOT / "bench" / "results" / "algorithms.json"
PICTURES = 384  # a step of recipe `world`: 32 prompts x 12
Run = dict[str, Any]
# (heading, key of an evaluation, digits, +1 higher is better)
SHOWN = (
    ("trained reward", "reward/total", 2, 1),
    ("detector", "reward/detector/mean", 1, 1),
    ("held-out CNN", "heldout_cnn", 1, 1),
    ("held-out spectrum", "heldout_spectrum", 1, 1),
    ("distance", "distance", 1, -1),
    ("class hit", "class_hit", 2, 1),
)
HELD_OUT = ("heldout_cnn", "heldout_spectrum", "distance", "class_hit")  # never a reward, nor an auxiliary of GARDO's
BITS = ("bits a pixel", "reward/jpeg_size/mean", 2, -1)


def read(out: Path) -> list[Run]:
    """Every run in `out` with an evaluation."""
    runs = []
    for folder in sorted(out.glob("*/*/seed*")):
        evaluations = [line for line in lines(folder) if line["kind"] == "eval"]
        if not evaluations or folder.parent.name not in ALGORITHMS.get(folder.parent.parent.name, {}):
            continue
        took = {line["step"]: PICTURES / line["pictures/second"] for line in lines(folder) if line["kind"] == "step"}
        costs = folder / "costs.jsonl"
        told = [json.loads(line) for line in costs.read_text().splitlines()] if costs.is_file() else []
        runs.append(
            {
                "algorithm": folder.parent.parent.name,
                "setting": folder.parent.name,
                "seed": int(folder.name.removeprefix("seed")),
                "evaluations": evaluations,
                "seconds": took,
                "costs": told,
            }
        )
    return runs


def at(run: Run, step: int) -> Run | None:
    """The evaluation after `step`."""
    return next((line for line in run["evaluations"] if line["step"] == step), None)


def common_steps(groups: Iterable[Sequence[Run]], wanted: int) -> list[int]:
    """Where to compare: the last evaluation, `wanted` at most, that every group has a run of; before it the last with more seeds of each."""
    each = [[{line["step"] for line in run["evaluations"]} for run in group] for group in groups]
    known = sorted({step for group in each for steps in group for step in steps if 0 < step <= wanted}, reverse=True)
    out, most = [], 0
    for step in known:
        seeds = min((sum(step in steps for steps in group) for group in each), default=0)
        if seeds > most:
            out, most = [step, *out], seeds
    return out


def spread(numbers: Sequence[float | None], digits: int) -> str:
    """Mean, and the range where there are several."""
    known = [number for number in numbers if number is not None]
    if not known:
        return "-"
    mean, low, high = (f"{round(value, digits) + 0.0:.{digits}f}" for value in (statistics.fmean(known), min(known), max(known)))
    return mean if len(known) == 1 else f"{mean} ({low} to {high})"


def cost(run: Run, step: int) -> dict[str, float | None]:
    """Wall-clock seconds of the first `step` steps without evaluations, CPU seconds a picture and the most MB of the trainer's process."""
    seconds = [value for number, value in run["seconds"].items() if number <= step]
    trained = sum(each["to"] - each["from"] for each in run["costs"])
    cpu = sum(each["cpu_s"] for each in run["costs"])
    ends = [0, *(each["to"] for each in run["costs"])]
    whole = all(
        end == each["from"] for end, each in zip(ends, run["costs"], strict=False)
    )  # else an interrupted part is not on record
    return {
        "wall_s": sum(seconds) if len(seconds) >= step else None,
        "cpu_s_a_step": cpu / trained if trained and whole else None,
        "peak_mb": max((each["peak_mb"] for each in run["costs"]), default=None),
    }


def photographs(count: int = 1000) -> dict[str, float]:
    """What the monitors say of held-out photographs; without the distances, which are to the same ones."""
    from trainer.honesty import Monitors
    from world import photographs as known

    images, labels = known.load("test")
    told = Monitors.load(ROOT / "world" / "monitors").measure(images[:count], [int(label) for label in labels[:count]])
    return {key: told[key] for key in ("heldout_cnn", "heldout_spectrum", "class_hit")}


def compared(
    runs: Sequence[Run], names: Sequence[str], chosen: Mapping[str, str], wanted: int, beside: Sequence[str] = ()
) -> list[tuple[int, dict[str, list[Run]]]]:
    """Where to compare `names`, and each algorithm's runs at its setting that have come so far; `beside` where they have."""
    groups = {n: [r for r in runs if r["algorithm"] == n and r["setting"] == chosen[n]] for n in dict.fromkeys((*names, *beside))}
    steps = common_steps([group for n, group in groups.items() if group and n in names], wanted)
    there = [(step, {n: [r for r in group if at(r, step)] for n, group in groups.items()}) for step in steps]
    return [(step, {n: group for n, group in found.items() if group}) for step, found in there]


def table(
    step: int,
    groups: Mapping[str, Sequence[Run]],
    real: Mapping[str, float],
    extra: Sequence[tuple[str, str, int, int]] = (),
) -> list[str]:
    """Markdown: what photographs get, a row before training, and one for each algorithm after `step` steps."""
    columns = (*extra, *SHOWN)
    heads = ["algorithm", "seeds", *(head for head, *_ in columns), "least distance (after)", "wall-clock", "CPU", "peak memory"]
    rows = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    first = next((run for group in groups.values() for run in group), None)
    known: list[tuple[str, Mapping[str, Any]]] = [("photographs", real)]
    known += [("before", at(first, 0) or {})] if first is not None else []
    for name, before in known:
        cells = [spread([before.get(key)], digits) for _, key, digits, _ in columns]
        rows.append("| " + " | ".join([name, "", *cells, "", "", "", ""]) + " |")
    for name, group in groups.items():
        told = [at(run, step) or {} for run in group]
        cells = [spread([line.get(key) for line in told], digits) for _, key, digits, _ in columns]
        least = [min((e for e in run["evaluations"] if 0 < e["step"] <= step), key=lambda e: e["distance"]) for run in group]
        where = ", ".join(str(PICTURES * each["step"]) for each in least)
        costs = [cost(run, step) for run in group]
        minutes = spread([each["wall_s"] / 60 if each["wall_s"] is not None else None for each in costs], 1)
        cpu = spread([each["cpu_s_a_step"] for each in costs], 0)
        peak = spread([each["peak_mb"] for each in costs], 0)
        seeds = ", ".join(str(run["seed"]) for run in group)
        measured = [
            f"{value} {unit}" if value != "-" else value for value, unit in ((minutes, "min"), (cpu, "s a step"), (peak, "MB"))
        ]
        tail = [f"{spread([e['distance'] for e in least], 1)} ({where})", *measured]
        rows.append("| " + " | ".join([f"**{name}**", seeds, *cells, *tail]) + " |")
    return rows


def tried(runs: Sequence[Run], chosen: Mapping[str, str], wanted: int) -> list[str]:
    """Markdown: every setting of the grids at seed 0, each algorithm's after the last step that all of its settings have come to."""
    heads = ["algorithm", "changes to recipe `world`", "after", *(head for head, *_ in SHOWN), "kept"]
    rows = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for name, grid in ALGORITHMS.items():
        own = [run for run in runs if run["algorithm"] == name and run["seed"] == 0]
        step = max(common_steps([[run] for run in own], wanted), default=0)
        for run in own if len(own) > 1 and step else []:
            last = at(run, step) or {}
            cells = [spread([last.get(key)], digits) for _, key, digits, _ in SHOWN]
            changes = " ".join(f"`{c}`" for c in grid[run["setting"]] if not c.startswith("rewards=")) or "none"
            kept = "yes" if chosen.get(name) == run["setting"] else ""
            rows.append("| " + " | ".join([name, changes, f"{PICTURES * step}", *cells, kept]) + " |")
    return rows


def rises(step: int, groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """Whether the trained reward rose, by algorithm and seed."""
    out = []
    for name, group in groups.items():
        gained = [(at(run, step) or {}).get("reward/total") for run in group]
        up = sum(value is not None and value > 0 for value in gained)
        values = ", ".join("-" if value is None else f"{value:+.2f}" for value in gained)
        out.append(f"- {name}: the trained reward rose in {up} of {len(group)} runs ({values} standard deviations of the start)")
    return out


def verdict(step: int, groups: Mapping[str, Sequence[Run]], real: Mapping[str, float]) -> list[str]:
    """GARDO against plain, measure by measure, by the means over seeds that both have."""
    if not set(PAIR) <= set(groups):
        return ["- not measured: one of the pair has no run"]
    plain, gardo = ({run["seed"]: at(run, step) or {} for run in groups[name]} for name in PAIR)
    seeds = sorted(plain.keys() & gardo.keys())
    if not seeds or not step:
        return ["- not measured: the pair has no seed and step in common"]
    better, out = 0, []
    signs: dict[str, tuple[str, int]] = {key: (head, sign) for head, key, _, sign in (*SHOWN, BITS)}
    for key in HELD_OUT:
        head, sign = signs[key]
        a, b = (statistics.fmean(one[seed][key] for seed in seeds) for one in (plain, gardo))
        good, note = sign * (b - a) > 0, ""
        better += good
        if key.startswith("heldout") and max(a, b) > real[key]:
            note = f"; but photographs get {real[key]:.2f}: above that it is fooled, and says nothing"
        out.append(f"- {head}: {b:.2f} with GARDO, {a:.2f} without: {'better' if good else 'not better'}{note}")
    a, b = (statistics.fmean(one[seed][BITS[1]] for seed in seeds) for one in (plain, gardo))
    out.append(f"- the reward itself, bits a pixel (fewer is more reward): {b:.2f} with GARDO, {a:.2f} without")
    if b > a:
        out.append(
            "- GARDO has gained less reward by then, so this does not compare at equal reward: plain may do as well stopped early"
        )
    whole = (
        "The held-out measures are better with it"
        if better == len(HELD_OUT)
        else "The held-out measures are not all better with it"
    )
    return [f"{whole} ({better} of {len(HELD_OUT)}; seeds {', '.join(map(str, seeds))}):", "", *out]


def section(runs: Sequence[Run], chosen: Mapping[str, str], wanted: int, real: Mapping[str, float]) -> str:
    """All of it for docs/benchmarks.md."""
    first = next((run["evaluations"][0] for run in runs), None)
    samples = first["n"] if first else 0
    loads = [each["load"] for run in runs for each in run["costs"]]
    steps = f"{PICTURES} pictures a step; evaluations of {samples} pictures along the ODE"
    load = f"; load of the machine {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    text = [
        "## Algorithms (`make bench-algorithms`)",
        "",
        f"{datetime.now(UTC).date()}, {os.cpu_count()} cores{load}; {steps}. The small world, recipe `world` with the changes named below.",
        "Trained reward: standard deviations of the start. Mean over seeds, with the range. Wall-clock is of the training steps alone, CPU",
        "with evaluations, both without the service; on a machine that does other work read the CPU.",
        "",
        "### GRPO, Guard and NFT, each at its best setting",
        "",
    ]
    nothing = ["No evaluation in common yet.", ""]
    for step, groups in (three := compared(runs, COMPARED, chosen, wanted)):
        text += [f"After {PICTURES * step} pictures:", "", *table(step, groups, real), "", *rises(step, groups), ""]
    if short := unfinished(three, wanted):
        text += [short, ""]
    text += [
        *([] if three else nothing),
        "![distance against pictures](images/algorithms.png)",
        "",
        "### GARDO against plain on `jpeg_size`",
        "",
        "Flat pictures have few bits a pixel, so the reward can be hacked. Detector and alignment have weight 0; GARDO's gate asks them.",
        "`jpeg-kl` holds every sample with the weight that GARDO has for the few.",
        "",
    ]
    for step, groups in (hacked := compared(runs, PAIR, chosen, wanted, HACKED)):
        told = [*table(step, groups, real, (BITS,)), "", *verdict(step, groups, real), ""]
        text += [f"After {PICTURES * step} pictures:", "", *told]
    text += [
        *([] if hacked else nothing),
        "### What was tried",
        "",
        "Seed 0. Of guard and nft the one with the least distance is kept; GARDO's weight of the KL is set by hand, since the least distance",
        "would choose a policy that learns nothing.",
        "",
        *tried(runs, chosen, wanted),
    ]
    return "\n".join(text)


def unfinished(found: Sequence[tuple[int, Mapping[str, Sequence[Run]]]], wanted: int) -> str:
    """What is missing of `wanted` steps and three seeds, in words; nothing where nothing is."""
    last, groups = found[-1] if found else (0, {})
    fewest = min((len(group) for group in groups.values()), default=0)
    if last >= wanted and fewest >= 3:
        return ""
    return f"Not the whole: {last} of {wanted} steps, {fewest} of 3 seeds. `make bench-algorithms` goes on from here."


def plot(runs: Sequence[Run], chosen: Mapping[str, str], path: Path) -> None:
    """Distance against pictures for each algorithm: mean and range over seeds; GARDO's pair beside it, with its reward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    panels: list[tuple[Sequence[str], str, str]] = [
        (COMPARED, "distance", "distance to photographs"),
        (HACKED, "distance", "jpeg_size: distance to photographs"),
        (HACKED, BITS[1], "jpeg_size: bits a pixel, the reward"),
    ]
    for axis, (names, key, title) in zip(axes, panels, strict=True):
        for number, name in enumerate(names):
            own = [r for r in runs if r["algorithm"] == name and r["setting"] == chosen[name]]
            if not own:
                continue
            steps = sorted(set.intersection(*({line["step"] for line in run["evaluations"]} for run in own)))
            values = [[line[key] for run in own for line in run["evaluations"] if line["step"] == step] for step in steps]
            x = [PICTURES * step for step in steps]
            seeds = len({run["seed"] for run in own})
            label = f"{name} ({seeds} seed{'s' * (seeds != 1)})"
            axis.plot(x, [statistics.fmean(v) for v in values], marker="o", markersize=3, color=f"C{number}", label=label)
            axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=f"C{number}", linewidth=0)
        axis.set_title(title)
        axis.set_xlabel("pictures")
        axis.set_ylim(bottom=0)
        if axis.lines:
            axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def put(text: str, path: Path, start: str = START, end: str = END) -> None:
    """Replace what stands between the markers, or add it at the end."""
    block, old = f"{start}\n{text}\n{end}", path.read_text()
    if start in old and end in old:
        path.write_text(old[: old.index(start)] + block + old[old.index(end) + len(end) :])
    else:
        path.write_text(f"{old.rstrip()}\n\n{block}\n")


def write(out: Path, wanted: int, quick: bool, say: Callable[[str], None] = print) -> None:
    """Tables and plots of what is in `out`; into the documentation unless it was but a look."""
    runs, chosen = read(out), best_settings(out)
    if not runs:
        say(f"nothing has been evaluated in {out} yet")
        return
    real = photographs()
    text = section(runs, chosen, wanted, real)
    stamp = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.machine(), "cores": os.cpu_count()}
    result = {
        **stamp,
        "pictures_a_step": PICTURES,
        "chosen": dict(chosen),
        "photographs": real,
        "algorithms": ALGORITHMS,
        "runs": runs,
    }
    target = out / "algorithms.json" if quick else RESULT
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    plot(runs, chosen, out / "algorithms.png" if quick else PLOT)
    if not quick:
        put(text, DOCUMENT)
    say(text)
