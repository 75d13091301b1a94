"""Contestants that take steps in turn, for benchmarks of training: child processes, rounds, how they are summed up and stamped."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from bench import process

Rows = dict[str, list[dict[str, float]]]
console = Console(stderr=True)


class Contestant:
    """A child process that takes a step when asked: `python -m MODULE --child` with what it is told as JSON."""

    def __init__(self, name: str, module: str, told: Mapping[str, Any], log: Path) -> None:
        self.name, self.log = name, log
        own = {**os.environ, **process.ENVIRONMENT, "OMP_NUM_THREADS": str(told["threads"]), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", module, "--child", json.dumps(told)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": process.ROOT, "env": own}
        with log.open("w") as said:
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


def run(start: Callable[[str], Contestant], ways: Sequence[str], rounds: int, what: str) -> Rows:
    """A row for each round of each; who begins changes from round to round, and the first round only warms up."""
    with console.status(f"{what}: starting {', '.join(ways)}"):
        running = [start(way) for way in ways]
        for one in running:
            one.answer()
    rows: Rows = {one.name: [] for one in running}
    for number in track(range(rounds + 1), description=f"{what}: rounds (the first warms up)", console=console):
        turn = number % len(running)
        for one in running[turn:] + running[:turn]:
            row = one.step(number)
            if number:
                rows[one.name].append(row)
    return rows


def shown(values: Sequence[float], digits: int = 2) -> str:
    middle, low, high = (f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low}-{high})"


def spread(values: Sequence[float]) -> list[float]:
    """[least, median, most]."""
    return [min(values), statistics.median(values), max(values)]


class Stamp:
    """When, where, and how busy the machine was, from here to `told`."""

    def __init__(self) -> None:
        self.before, self.began = os.getloadavg()[0], time.monotonic()

    def told(self, **more: Any) -> dict[str, Any]:
        return {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "load_before": round(self.before, 2),
            "load_after": round(os.getloadavg()[0], 2),
            **more,
            "minutes": round((time.monotonic() - self.began) / 60, 1),
        }


def keep(name: str, told: Mapping[str, Any]) -> None:
    """bench/results/NAME.json, and a line about it; `told` has a stamp."""
    out = process.ROOT / "bench" / "results" / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n")
    load = f"load {told['load_before']} before, {told['load_after']} after"
    print(f"{told['minutes']} minutes; {load}; {out.relative_to(process.ROOT)}")
