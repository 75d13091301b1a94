"""A rewriter and a painter on the small world: who should learn? `make bench-two-policies`, or `python -m bench two-policies`.

Recipe `dual_grpo_small` three times, with the same prompts, noise and number of pictures: both learn, the images alone (painted from what the
rewriter writes before training), the language alone. Rewards are compared with no rewriting and the painter as it is, in deviations of that,
paired over prompts. The cold start is made first where there is none. A run that was stopped goes on where it was.

    python -m bench two-policies                     20 steps of 144 pictures, seed 0
    python -m bench two-policies --quick             2 steps, to see that everything works
    python -m bench two-policies --report            only the table of what is there
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from bench import process
from bench.algorithms import COMMON, ROOT, finished, lines, rewards, steps_of, trained

OUT = ROOT / "runs" / "two_policies"
PAIRS = ROOT / "world" / "rewrites"
MODES = {"both": "both learn", "images": "images alone", "language": "language alone"}
WEIGHTS = {"detector": 0.35, "judge": 0.15, "alignment": 0.5}  # of the table's total, whatever each policy was paid for
MONITORS = ("distance", "class_hit", "heldout_cnn", "heldout_spectrum")


@contextmanager
def memory(of: Sequence[int], found: dict[str, float]) -> Iterator[None]:
    """`found["peak_mb"]`: the largest sum of resident sets of these processes, all that they started, and this one's children; each second."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(1.0):
            roots = [psutil.Process(pid) for pid in of if psutil.pid_exists(pid)] + psutil.Process().children()
            total = 0
            for one in {each.pid: each for root in roots for each in _tree(root)}.values():
                try:
                    total += one.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            found["peak_mb"] = max(found.get("peak_mb", 0.0), total / 2**20)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _tree(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cold_start(out: Path) -> Path:
    """The adapter of a cold start on the repository's pairs, made where it is not there."""
    folder = out / "cold"
    if not (folder / "policy").is_dir():
        command = [sys.executable, "-m", "trainer", "sft", str(PAIRS / "pairs_train.jsonl"), "--resume", "--run-dir", str(folder)]
        environment = {**os.environ, **process.ENVIRONMENT, "OMP_NUM_THREADS": str(os.cpu_count())}
        subprocess.run([*command, "--held-out", str(PAIRS / "pairs_eval.jsonl")], cwd=ROOT, env=environment, check=True)
    return folder / "policy"


def overrides(mode: str, url: str, cold: Path, chosen: argparse.Namespace) -> list[str]:
    """What verism-train is told beside the recipe's name."""
    urls = [f"rewards.{name}.url={url}" for name in WEIGHTS]
    plan = [f"steps={chosen.steps}", f"seed={chosen.seed}", f"eval.every={chosen.every}", f"eval.samples={chosen.samples}"]
    return [*urls, *COMMON, *plan, f"language.mode={mode}", f"language.policy.lora.start={cold}", f"name={mode}"]


def run(chosen: argparse.Namespace, out: Path) -> list[str]:
    """Train what is not done; the modes that failed."""
    left = [mode for mode in chosen.only.split(",") if not finished(out / mode, chosen.steps)]
    failed: list[str] = []
    if not left:
        return failed
    cold = chosen.cold.resolve() if chosen.cold else cold_start(out)
    with tempfile.TemporaryDirectory() as place, rewards(Path(place)) as (url, pid):
        for mode in left:
            print(f"{MODES[mode]}, from step {max(steps_of(out / mode), 0)} to {chosen.steps}", flush=True)
            seen: dict[str, float] = {}
            with memory([pid], seen):
                status = trained("dual_grpo_small", overrides(mode, url, cold, chosen), out / mode, chosen.threads)
            with (out / mode / "memory.jsonl").open("a") as file:
                file.write(json.dumps(seen) + "\n")
            if status == 130:
                raise KeyboardInterrupt
            if status:
                failed.append(mode)
    return failed


def row(folder: Path, step: int) -> dict[str, Any]:
    """An evaluation: gains over no rewriting and the painter as it is, with standard errors, and what was never a reward."""
    told = next(line for line in lines(folder) if line["kind"] == "eval" and line["step"] == step)
    none = json.loads((folder / "rewrites" / "before.json").read_text())["arms"]["none"]["values"]
    names = list(WEIGHTS)  # the recipe's order
    scale = {name: _std(values) for name, values in zip(names, none, strict=True)}
    gains = {name: (told[f"over_none/{name}"], told[f"over_none/{name}_sem"]) for name in names}
    total = sum(weight * gains[name][0] / scale[name] for name, weight in WEIGHTS.items())
    found = {
        "total": total,
        **gains,
        **{name: told[name] for name in MONITORS},
        **{f"none/{name}": told[f"none/{name}"] for name in MONITORS},
    }
    costs = [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()]
    peaks = [json.loads(line).get("peak_mb", 0.0) for line in (folder / "memory.jsonl").read_text().splitlines()]
    pictures = sum(cost["to"] - cost["from"] for cost in costs)
    return {**found, "cpu_s_step": sum(cost["cpu_s"] for cost in costs) / max(1, pictures), "peak_mb": max(peaks, default=0.0)}


def _std(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known)
    return float((sum((value - mean) ** 2 for value in known) / len(known)) ** 0.5) or 1.0


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """As Markdown."""
    names = [*WEIGHTS]
    head = ["", "total", *names, *MONITORS, "CPU s a step", "memory with the services"]
    out = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    if rows:
        first = next(iter(rows.values()))
        out.append(
            "| no rewriting, painter as it is | 0 |" + " 0 |" * len(names) + _cells([first[f"none/{m}"] for m in MONITORS]) + " | |"
        )
    for name, told in rows.items():
        gains = "".join(f" {told[one][0]:+.2f} ± {told[one][1]:.2f} |" for one in names)
        cost = f" {told['cpu_s_step']:.0f} | {told['peak_mb'] / 1024:.1f} GiB |"
        out.append(f"| {name} | {told['total']:+.2f} |{gains}" + _cells([told[m] for m in MONITORS]) + cost)
    return "\n".join(out)


def _cells(values: Sequence[float]) -> str:
    return "".join(f" {value:.3g} |" for value in values)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench two-policies", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT, help="run folders (default runs/two_policies)")
    parser.add_argument("--only", default=",".join(MODES), help="both, images, language, with commas; default all")
    parser.add_argument(
        "--cold", type=Path, help="folder of a cold start's adapter (default OUT/cold/policy, made where it is not there)"
    )
    parser.add_argument("--steps", type=int, default=20, help="of a run (default 20, of 144 pictures each)")
    parser.add_argument("--every", type=int, default=10, help="steps between evaluations (default 10)")
    parser.add_argument("--samples", type=int, default=320, help="pictures of an evaluation of 160 prompts (default 320)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the trainer (default: all cores)")
    parser.add_argument("--report", action="store_true", help="train nothing; print what is there")
    parser.add_argument("--quick", action="store_true", help="two steps, 16 pictures an evaluation, OUT-quick")
    chosen = parser.parse_args(arguments)
    if unknown := [mode for mode in chosen.only.split(",") if mode not in MODES]:
        parser.error(f"--only {unknown[0]!r} is none of {', '.join(MODES)}")
    if chosen.quick:
        chosen.steps, chosen.every, chosen.samples = 2, 2, 16
        chosen.out = chosen.out.with_name(chosen.out.name + "-quick")
    out: Path = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = [] if chosen.report else run(chosen, out)
    rows = {
        f"{MODES[mode]}, step {line['step']}": row(out / mode, line["step"])
        for mode in MODES
        if finished(out / mode, chosen.steps)
        for line in lines(out / mode)
        if line["kind"] == "eval" and line["step"] > 0
    }
    (out / "table.json").write_text(json.dumps({"steps": chosen.steps, "seed": chosen.seed, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    for mode in failed:
        print(f"{out / mode} failed; see said.log there", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
