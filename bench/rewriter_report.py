"""The parent of bench/rewriter.py: contestants, rounds, and what came out."""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import process, random_pipeline
from bench.rewriter import HERE, TOLERANCE, TRL, VLLM, work_of

ROOT = Path(__file__).resolve().parents[1]
PYTHON_OF_VLLM = ROOT / ".venv-vllm" / "bin" / "python"
Rows = dict[str, list[dict[str, float]]]

console = Console(stderr=True)


class Contestant:
    """A child process that takes a step when asked."""

    def __init__(self, told: Mapping[str, Any], place: Path) -> None:
        self.name, self.log = told["way"], place / f"{told['way'].replace(', ', '-')}.log"
        own = {**os.environ, **process.ENVIRONMENT, "OMP_NUM_THREADS": str(told["threads"]), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "bench.rewriter", "--child", json.dumps({**told, "log": str(place / "vllm.log")})]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": own}
        with self.log.open("w") as said:
            self.process = subprocess.Popen(command, stderr=said, **pipes)

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {self.log.read_text()[-3000:]}")
        told: dict[str, Any] = json.loads(line)
        return told

    def step(self, number: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        process.end([self.process], process.tree([self.process]), 20)


def left_out(ways: Sequence[str]) -> dict[str, str]:
    """Who cannot take part here, and why."""
    out = {}
    if VLLM in ways and not PYTHON_OF_VLLM.is_file():
        out[VLLM] = "no environment of vLLM's: `make vllm` builds it"
    if TRL in ways and importlib.util.find_spec("trl") is None:
        out[TRL] = "TRL is not installed: it is in the extra `dev`"
    return out


def measure(model: str, ways: Sequence[str], rounds: int, threads: int, place: Path) -> dict[str, Any]:
    """The model, how far Verism and TRL are apart, and a row for each round of each contestant."""
    texts = random_pipeline.prompts((rounds + 1) * work_of(model).prompts)
    told = {"model": model, "path": model, "folder": str(place / "model"), "threads": threads, "texts": texts, "steps": rounds + 1}
    made: list[Contestant] = []

    def start(way: str) -> Contestant:
        made.append(Contestant({**told, "way": way}, place))
        return made[-1]

    try:
        with console.status(f"{model}: weights, and do both compute the same?"):
            size = start("write").answer()
            told["path"] = size.pop("path")
            told["context"] = 16 * -(-(size["prompt_tokens"] + work_of(model).longest) // 16) + 64
            apart = start("agree").answer() if TRL in ways else {}
        if apart and not max(apart["loss"], apart["gradient"]) <= TOLERANCE:
            raise RuntimeError(f"TRL and Verism do not compute the same: {apart}")
        with console.status(f"{model}: starting {', '.join(ways)}"):
            running = [start(way) for way in ways]
            for one in running:
                one.answer()
        rows: Rows = {one.name: [] for one in running}
        for number in track(range(rounds + 1), description="rounds (the first warms up)", console=console):
            turn = number % len(running)
            for one in running[turn:] + running[:turn]:
                row = one.step(number)
                if number:
                    rows[one.name].append(row)
        return {"size": size, "apart": apart, "rows": rows}
    finally:
        for one in made:
            one.end()


def per_token(row: Mapping[str, float], key: str = "step") -> float:
    """Seconds."""
    return row[key] / max(row["tokens"], 1.0)


def ratios(rows: Rows, a: str, b: str, key: str = "step") -> list[float]:
    """a's time per token over b's, round by round."""
    return [per_token(x, key) / max(per_token(y, key), 1e-9) for x, y in zip(rows[a], rows[b], strict=True)]


def shown(values: Sequence[float], digits: int = 2) -> str:
    middle, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low}-{high})"


def summary(rows: Rows) -> dict[str, Any]:
    """Medians, with ratios as [least, median, most]."""
    out: dict[str, Any] = {}
    for name, told in rows.items():
        out[name] = {
            "seconds_per_step": statistics.median(row["step"] for row in told),
            "tokens_per_step": statistics.median(row["tokens"] for row in told),
            "rollout_tokens_per_second": statistics.median(1 / per_token(row, "sample") for row in told),
            "step_ms_per_token": statistics.median(1000 * per_token(row) for row in told),
            "training_ms_per_token": statistics.median(1000 * per_token(row, "train") for row in told),
            "sync_seconds": statistics.median(row["sync"] for row in told),
            "cpu_seconds_per_step": statistics.median(row["cpu"] for row in told),
            "peak_mb": max(row["peak"] for row in told),
        }
        if TRL in rows:
            for key, what in (("step", "a_step"), ("sample", "rollouts"), ("train", "training"), ("cpu", "cpu")):
                got = ratios(rows, TRL, name, key)
                out[name][f"{what}_times_trls_speed"] = [min(got), statistics.median(got), max(got)]
    return out


def run(model: str, ways: Sequence[str], rounds: int, threads: int, quick: bool) -> int:
    """Measure, print tables, write bench/results/rewriter.json (rewriter-quick.json)."""
    before, began, absent = os.getloadavg()[0], time.monotonic(), left_out(ways)
    for way, reason in absent.items():
        print(f"{way} is left out: {reason}", file=sys.stderr)
    taking = [way for way in ways if way not in absent]
    with tempfile.TemporaryDirectory() as place:
        result = measure(model, taking, rounds, threads, Path(place))
    told = summary(result["rows"])
    show(model, result, told)
    stamp = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": round(before, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", *(["trl"] if TRL in taking else []))},
        "left_out": absent,
        "rounds": rounds,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    out = ROOT / "bench" / "results" / ("rewriter-quick.json" if quick else "rewriter.json")
    out.parent.mkdir(exist_ok=True)
    body = {**stamp, "model": model, "work": vars(work_of(model)), **result, "summary": told}
    out.write_text(json.dumps(body, indent=1) + "\n")
    print(f"{stamp['minutes']} minutes; load {stamp['load_before']} before, {stamp['load_after']} after; {out.relative_to(ROOT)}")
    return 0


def show(model: str, result: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Contestants, and what was wanted."""
    out, rows, work, size = Console(width=150), result["rows"], work_of(model), result["size"]
    sizes = f"{size['parameters'] / 1e6:.1f}M, LoRA of {size['adapter'] / 1e6:.2f}M"
    step = f"{work.prompts} prompts of {size['prompt_tokens']} tokens, {work.group} rewrites each, {work.longest} tokens at most"
    title = f"{model}: {sizes}; {step}"
    table = Table("way", "s a step", "tokens", "rollout tokens/s", "training ms/token", "sync s", "CPU s", "peak MB", title=title)
    for name, row in told.items():
        table.add_row(
            name,
            shown([r["step"] for r in rows[name]]),
            f"{row['tokens_per_step']:.0f}",
            shown([1 / per_token(r, "sample") for r in rows[name]], 1),
            shown([1000 * per_token(r, "train") for r in rows[name]]),
            f"{row['sync_seconds']:.2f}",
            f"{row['cpu_seconds_per_step']:.1f}",
            f"{row['peak_mb']:.0f}",
        )
    out.print(table)
    if TRL not in rows:
        return
    faster = Table("per token, times TRL's speed", "a whole step", "rollouts", "training", "a step in CPU time")
    for name in (way for way in rows if way != TRL):
        faster.add_row(name, *(shown(ratios(rows, TRL, name, key)) for key in ("step", "sample", "train", "cpu")))
    out.print(faster)
    apart, speed = result["apart"], statistics.median(ratios(rows, TRL, HERE))
    wanted = Table("wanted", "seen", "")
    wanted.add_row("a step not slower than TRL's", f"{speed:.2f} times its speed", "yes" if speed >= 1 else "NO")
    worst = max(apart["loss"], apart["gradient"])
    wanted.add_row(f"loss and gradient agree to {TOLERANCE:g}", f"{worst:.0e} at ratios up to 1 +- {apart['ratio_dev']:.2f}", "yes")
    out.print(wanted)
