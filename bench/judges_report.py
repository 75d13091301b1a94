"""The parent of bench/judges.py: starts the contestants, measures round by round, and says what came out."""

import asyncio
import contextlib
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import judges, process
from bench.judges import GROUP, HERE, LOOP, OFFLINE, PROMPT, TASKS, VLLM
from services.engines.options import VllmOptions
from shared.client import RewardClient

ROOT = Path(__file__).resolve().parents[1]
START_S = 600.0

console = Console(stderr=True)


@dataclass
class Contestant:
    """A process and what it started. `url` of a service; the others answer lines."""

    name: str
    process: subprocess.Popen[Any]
    url: str | None = None
    log: Path | None = None

    def tree(self) -> list[psutil.Process]:
        return process.tree([self.process])

    def cpu(self) -> float:
        return process.cpu_seconds(self.tree())

    def send(self, number: signal.Signals) -> None:
        process.send(self.tree(), number)

    def ask(self, task: str, file: Path, pictures: list[NDArray[np.uint8]]) -> tuple[float, float, list[list[float]] | list[float]]:
        """Seconds, CPU seconds of this process, and the answers: log-probabilities of a child, values of a service."""
        if self.url is not None:
            return asyncio.run(_over_http(self.url, task, pictures))
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"task": task, "pictures": str(file)}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {self.log.read_text()[-2000:] if self.log else ''}")
        told = json.loads(line)
        return told["seconds"], 0.0, told["answers"]

    def end(self) -> None:
        process.end([self.process], self.tree(), 20)


async def _over_http(url: str, task: str, pictures: list[NDArray[np.uint8]]) -> tuple[float, float, list[float]]:
    name = TASKS[task]
    async with RewardClient({name: url}, timeout_s=600) as client:
        prompts, groups = [PROMPT] * len(pictures), ["g"] * len(pictures)
        began, cpu = time.perf_counter(), time.process_time()
        if task == "tournament":
            rates = await client.compare(pictures, groups, prompts)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            assert rates.mask_B.all(), rates.failures
            return seconds, cpu, [pair.value or 0.0 for pair in rates.groups["g"].pairs]
        table = await client.score(pictures, prompts, groups)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        assert table.mask_RB.all(), table.failures
        return seconds, cpu, table.values_RB[0].tolist()


def value(task: str, answers: list[list[float]]) -> list[float]:
    """What the rewards make of log-probabilities: for the check that all contestants said the same."""
    if task == "prompt's log-probability":
        return [statistics.fmean(row) for row in answers]
    rows = np.array(answers)
    if task == "first token":
        real, fake = rows[:, :2].mean(1), rows[:, 2:].mean(1)
        return list(1 / (1 + np.exp(fake - real)))
    return []  # the labels of a tournament have further spellings, which its reward adds up


def service(folder: Path, engine: str, dtype: str, place: Path) -> Contestant:
    own: dict[str, Any] = {"folder": str(folder), "dtype": dtype, "floor": 0, "cache_items": 0, "batch_cap": GROUP, "batch": GROUP}
    if engine == "vllm":
        environment = {k: v for k, v in judges.vllm_environment().items() if k.startswith("VLLM_CPU_OMP") or k.startswith("OMP")}
        settings = {"eager": True, "max_num_seqs": judges.SEQUENCES, "environment": environment}
        own |= {"engine": "vllm", "context": judges.CONTEXT, "vllm": settings, "batch_cap": 1024}
    rewards: dict[str, Any] = {name: {"use": name, **own} for name in TASKS.values()}
    if engine == "transformers":
        sleep = {"use": "bench.models:Sleep", "base_ms": 400.0, "per_image_ms": 0.0, "batch_cap": GROUP, "cache_items": 0}
        detector = {"use": "detector", "folder": "world/detector", "batch_cap": GROUP, "cache_items": 0}
        rewards |= {"detector": detector, "sleep": sleep, "other_sleep": sleep}
    config = place / f"{engine}.json"
    config.write_text(json.dumps({"threads": 1, "device": "cpu", "rewards": rewards}))
    port = process.free_port()
    return Contestant(
        HERE if engine == "transformers" else VLLM, process.start(config, port, subprocess.DEVNULL), f"http://127.0.0.1:{port}"
    )


def worker(kind: str, folder: Path, dtype: str, place: Path) -> Contestant:
    python = str(VllmOptions().python) if kind == OFFLINE else sys.executable
    command = [python, "-m", "bench.judges", "--child", kind, str(folder), dtype]
    environment = {**os.environ, **process.ENVIRONMENT}
    log = place / f"{kind}.log"
    with log.open("w") as said:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "stderr": said}
        return Contestant(kind, subprocess.Popen(command, cwd=ROOT, env=environment, **pipes), log=log)


@contextlib.contextmanager
def contestants(folder: Path, dtype: str, without: Sequence[str]) -> Iterator[list[Contestant]]:
    """All that were asked for, started together and ready."""
    with tempfile.TemporaryDirectory() as place:
        names = [name for name in (LOOP, HERE, VLLM, OFFLINE) if name not in without]
        if not VllmOptions().python.is_file() and {VLLM, OFFLINE} & set(names):
            console.print("no .venv-vllm: `make vllm` builds it; measured without vLLM")
            names = [name for name in names if name not in (VLLM, OFFLINE)]
        made = []
        try:
            for name in names:
                engine = {HERE: "transformers", VLLM: "vllm"}.get(name)
                made.append(service(folder, engine, dtype, Path(place)) if engine else worker(name, folder, dtype, Path(place)))
            with console.status("starting; vLLM takes a minute"):
                for one in made:
                    if one.url is not None:
                        process.wait(one.url, one.process, START_S)
                    elif one.process.stdout is None or not one.process.stdout.readline():
                        raise RuntimeError(f"{one.name} did not start: {one.log.read_text()[-2000:] if one.log else ''}")
            yield made
        finally:
            for one in made:
                one.end()


def pictures(side: int, number: int) -> list[NDArray[np.uint8]]:
    """Photographs, enlarged where `side` says so; every `number` has others, so that no task finds pictures of another one kept."""
    from PIL import Image

    from world import photographs

    every = photographs.load("test")[0]
    own = every[number % (len(every) // GROUP) * GROUP :][:GROUP]
    return [np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BICUBIC)) if side != 28 else p for p in own]


def run(folder: Path | None, side: int, dtype: str, rounds: int, tasks: Sequence[str], without: Sequence[str]) -> int:
    """Measure, print tables, write bench/results/judges.json."""
    if folder is None:
        folder = ROOT / "world" / "judge"
        if not (folder / "config.json").is_file():
            from tests import tiny_judge

            folder = tiny_judge.made()
    before, samples = os.getloadavg()[0], dict[str, dict[str, list[dict[str, float]]]]()
    with contestants(folder, dtype, without) as made, tempfile.TemporaryDirectory() as place:
        for one in made:
            one.send(signal.SIGSTOP)
        for number in track(range(rounds + 1), description="rounds (the first warms up)", console=console):
            for place_of, task in enumerate(tasks):
                images, file = pictures(side, number * len(tasks) + place_of), Path(place) / f"{number}-{place_of}.npy"
                np.save(file, np.stack(images))
                said: dict[str, list[float]] = {}
                for one in made if number % 2 else reversed(made):
                    one.send(signal.SIGCONT)
                    time.sleep(0.3)  # a supervisor that was stopped looks around first
                    cpu = one.cpu()
                    seconds, client, answers = one.ask(task, file, images)
                    sample = {"seconds": seconds, "cpu": one.cpu() - cpu, "client": client}
                    one.send(signal.SIGSTOP)
                    said[one.name] = value(task, answers) if one.url is None else answers  # type: ignore[assignment,arg-type]
                    if number:
                        samples.setdefault(task, {}).setdefault(one.name, []).append(sample)
                if (wanted := said.get(LOOP)) and number:
                    for name, got in said.items():
                        worst = float(np.abs(np.subtract(got, wanted)).max())
                        samples[task][name][-1]["difference"] = worst
        both = [together(one, side, (rounds + 1) * len(tasks)) for one in made if one.name == HERE]
    return _show(folder, side, dtype, rounds, samples, both[0] if both else {}, before)


def together(service: Contestant, side: int, number: int, times: int = 9) -> dict[str, float]:
    """Median ms of one /score with one reward, and with two, each time with other pictures; `number` says from where."""
    assert service.url is not None
    service.send(signal.SIGCONT)
    asked = (
        ["detector"],
        ["forensic_chat"],
        ["detector", "forensic_chat"],
        ["sleep"],
        ["sleep", "other_sleep"],
        ["sleep", "forensic_chat"],
    )
    out: dict[str, list[float]] = {}
    others = itertools.count(number)

    async def work(url: str) -> None:
        async with RewardClient(dict.fromkeys(["detector", "forensic_chat", "sleep", "other_sleep"], url), timeout_s=120) as client:
            for _ in range(times + 1):
                for names in asked:
                    images = pictures(side, next(others))
                    began = time.perf_counter()
                    table = await client.score(images, rewards=names)
                    out.setdefault(" and ".join(names), []).append(1000 * (time.perf_counter() - began))
                    assert table.mask_RB.all(), table.failures

    asyncio.run(work(service.url))
    return {name: statistics.median(values[1:]) for name, values in out.items()}


def _size(folder: Path, side: int) -> dict[str, Any]:
    """Parameters, and tokens of each question, pictures included."""
    from safetensors import safe_open
    from transformers import AutoProcessor

    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as weights:
            count += sum(int(np.prod(weights.get_slice(name).get_shape())) for name in weights.keys())  # noqa: SIM118
    processor: Any = AutoProcessor.from_pretrained(folder)
    tokens = {}
    for task in TASKS:
        chat = judges.questions(task, [np.zeros((side, side, 3), np.uint8)] * 2)[0]
        goes_on = chat.continuation is not None
        opening = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        text = processor.apply_chat_template(chat.messages(lambda picture: {"type": "image"}), tokenize=False, **opening)
        tokens[task] = len(processor(text=[text], images=list(chat.images), return_tensors="np")["input_ids"][0])
    return {"parameters": count, "tokens": tokens}


def _show(
    folder: Path,
    side: int,
    dtype: str,
    rounds: int,
    samples: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
    both: Mapping[str, float],
    before: float,
) -> int:
    console = Console(width=150)
    table = Table(
        "task",
        "way",
        "questions/s",
        "pictures/s",
        "of the loop",
        "of vLLM offline",
        "CPU ms a question",
        "of the loop's",
        "client",
        "difference",
    )
    results: dict[str, Any] = {}
    for task, ways in samples.items():
        count = GROUP * (GROUP - 1) if task == "tournament" else GROUP
        for name, rows in ways.items():
            ratios = {
                other: [b["seconds"] / a["seconds"] for a, b in zip(rows, ways[other], strict=True)]
                for other in (LOOP, OFFLINE)
                if other in ways
            }
            seconds = statistics.median(row["seconds"] for row in rows)
            cpu, client = (1000 * statistics.median(row[key] for row in rows) / count for key in ("cpu", "client"))
            worst = max((row["difference"] for row in rows if "difference" in row), default=None) if task != "tournament" else None
            results.setdefault(task, {})[name] = {
                "questions_per_second": count / seconds,
                "pictures_per_second": GROUP / seconds,
                "ratios": {other: [min(r), statistics.median(r), max(r)] for other, r in ratios.items()},
                "cpu_ms_per_question": cpu,
                "client_cpu_ms_per_question": client,
                "largest_difference_from_the_loop": worst,
            }
            loops = ways.get(LOOP)
            saved = statistics.median(b["cpu"] / a["cpu"] for a, b in zip(rows, loops, strict=True)) if loops else None
            results[task][name]["cpu_of_the_loop"] = saved and 1 / saved
            shown = [
                f"{statistics.median(ratios[o]):.2f} ({min(ratios[o]):.2f}-{max(ratios[o]):.2f})" if o in ratios else ""
                for o in (LOOP, OFFLINE)
            ]
            cells = [
                f"{count / seconds:.0f}",
                f"{GROUP / seconds:.1f}",
                *shown,
                f"{cpu:.1f}",
                f"{1 / saved:.2f}" if saved else "",
                f"{client:.2f}",
            ]
            table.add_row(task, name, *cells, "" if worst is None else f"{worst:.0e}")
    console.print(table)
    if both:
        shared = Table("one /score of 24 pictures with", "ms (median)")
        for name, ms in both.items():
            shared.add_row(name, f"{ms:.0f}")
        console.print(shared)
    out = ROOT / "bench" / "results" / "judges.json"
    out.parent.mkdir(exist_ok=True)
    stamp = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": round(before, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "rounds": rounds,
        "judge": folder.name,
        "side": side,
        "dtype": dtype,
        **_size(folder, side),
    }
    out.write_text(json.dumps({**stamp, "tasks": results, "together_ms": both}, indent=1) + "\n")
    console.print(f"{stamp}\nwritten to {out.relative_to(ROOT)}")
    return 0
