"""The parent of bench/trainer.py: services, contestants, rounds, and what came out."""

import contextlib
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import process, random_pipeline, rounds
from bench.rounds import Contestant, Rows, Stamp, console, shown, spread
from bench.trainer import HERE, LOOP, REWARDS, SLEEP_MS, TOLERANCE, VARIANTS, WORK

WANTED = {"cpu": 1.2, "cuda": 1.5}
WAITING = 0.05


@contextlib.contextmanager
def services(place: Path) -> Iterator[dict[str, str]]:
    """Three of `verism-serve`, started together, each a process with one reward that sleeps; URLs by name."""
    sleep = {"use": "bench.models:Sleep", "base_ms": SLEEP_MS, "per_image_ms": 0.0, "batch_cap": 32, "cache_items": 0}
    urls, made = {}, []
    try:
        for name in REWARDS:
            file, port = place / f"{name}.json", process.free_port()
            file.write_text(json.dumps({"threads": 1, "device": "cpu", "rewards": {name: sleep}}))
            made.append(process.start(file, port, subprocess.DEVNULL))
            urls[name] = f"http://127.0.0.1:{port}"
        for one, url in zip(made, urls.values(), strict=True):
            process.wait(url, one)
        yield urls
    finally:
        process.end(made, process.tree(made), 20)


def measure(size: str, variants: Sequence[str], count: int, told: dict[str, Any], place: Path) -> dict[str, Any]:
    """Parameters, how far the two are apart, and a row for each round of each contestant."""
    told = {**told, "size": size, "folder": str(place / size), "prompts": str(place / f"{size}.jsonl")}
    needed = (count + 1) * WORK[size].prompts
    texts = [json.dumps({"id": n, "prompt": text}) for n, text in enumerate(random_pipeline.prompts(needed))]
    Path(told["prompts"]).write_text("\n".join(texts))
    made: list[Contestant] = []

    def start(variant: str) -> Contestant:
        made.append(Contestant(variant, "bench.trainer", {**told, "variant": variant}, place / f"{size}-{len(made)}.log"))
        return made[-1]

    try:
        with console.status(f"{size}: random weights, and do both compute the same?"):
            parameters = start("write").answer()
            apart = start("agree").answer()
        worst = max(apart["loss"], apart["gradient"])
        if random_pipeline.SIZES[size].dtype == "float32" and not worst <= TOLERANCE:
            raise RuntimeError(f"{size}: the loop and Verism do not compute the same: {apart}")
        rows = rounds.run(start, variants, count, size)
        return {"parameters": parameters, "apart": apart, "rows": rows}
    finally:
        for one in made:
            one.end()


def ratios(rows: Rows, a: str, b: str, key: str = "step") -> list[float]:
    """a / b, round by round."""
    return [x[key] / y[key] for x, y in zip(rows[a], rows[b], strict=True)]


def summary(size: str, rows: Rows) -> dict[str, Any]:
    """Medians, with ratios as [least, median, most]."""
    pictures = WORK[size].prompts * WORK[size].group
    out: dict[str, Any] = {}
    for name, told in rows.items():
        middle = {key: statistics.median(row[key] for row in told) for key in told[0]}
        out[name] = {
            "seconds_per_step": middle["step"],
            "sampling_ms_per_picture": 1000 * middle["sample"] / pictures,
            "training_ms_per_picture": 1000 * middle["train"] / pictures,
            "cpu_ms_per_picture": 1000 * middle["cpu"] / pictures,
            "waiting_share": statistics.median(row["wait"] / row["step"] for row in told),
            "peak_mb": max(row["peak"] for row in told),
        }
        for key, other in (("faster_than_the_loop", LOOP), ("slower_than_verism", HERE)):
            if other in rows:
                got = ratios(rows, other, name) if other == LOOP else ratios(rows, name, other)
                out[name][key] = spread(got)
    return out


def run(sizes: Sequence[str], device: str, count: int, variants: Sequence[str], threads: int, quick: bool) -> int:
    """Measure, print tables, write bench/results/trainer.json (trainer-quick.json)."""
    stamp, results = Stamp(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as place, services(Path(place)) as urls:
        for size in sizes:
            told = {"device": device, "threads": threads, "urls": urls}
            got = measure(size, variants, count, told, Path(place))
            results[size] = {**got, "summary": summary(size, got["rows"]), "work": vars(WORK[size])}
            show(size, device, results[size])
    about = stamp.told(threads=threads, device=device, rounds=count, sleep_ms=SLEEP_MS)
    rounds.keep("trainer-quick" if quick else "trainer", {**about, "sizes": results})
    return 0


def show(size: str, device: str, result: Mapping[str, Any]) -> None:
    """Tables of one size: the ways, the measures, and what was wanted."""
    console, rows, told, work = Console(width=150), result["rows"], result["summary"], WORK[size]
    million = {name: f"{count / 1e6:.1f}M" for name, count in result["parameters"].items()}
    side = random_pipeline.SIZES[size].side
    step = f"{work.prompts} groups of {work.group}, micro-batches of {work.micro_batch}"
    title = f"{size}: transformer of {million['transformer']}, {side}x{side}; {step}"
    table = Table(
        "way",
        "s a step",
        "times the loop's speed",
        "sampling ms/picture",
        "training ms/picture",
        "waiting %",
        "peak MB",
        "of the loop's",
        title=title,
    )
    for name, row in told.items():
        table.add_row(
            name,
            shown([r["step"] for r in rows[name]]),
            shown(ratios(rows, LOOP, name)) if name != LOOP else "1.00",
            f"{row['sampling_ms_per_picture']:.1f}",
            f"{row['training_ms_per_picture']:.1f}",
            f"{100 * row['waiting_share']:.1f}",
            f"{row['peak_mb']:.0f}",
            f"{row['peak_mb'] / told[LOOP]['peak_mb']:.2f}",
        )
    console.print(table)
    parts = Table("measure", "a step is quicker by a factor of", "memory by", "what was switched")
    for name in (n for n in VARIANTS if n in rows and n != HERE):
        off, on = (name, HERE) if name.startswith("without") else (HERE, name)
        memory = told[on]["peak_mb"] / told[off]["peak_mb"]
        parts.add_row(
            name.split(" ", 1)[1],
            shown(ratios(rows, off, on)),
            f"{memory:.2f}",
            WHAT[name].format(large=work.large, drawn=work.drawn),
        )
    if parts.row_count:
        console.print(parts)
    own, apart = told[HERE], result["apart"]
    speed, memory = own["faster_than_the_loop"][1], own["peak_mb"] / told[LOOP]["peak_mb"]
    wanted = Table("wanted", "seen", "")
    for text, seen, good in (
        (f"{WANTED[device]} times the loop's speed", f"{speed:.2f}", speed >= WANTED[device]),
        (
            "less than 5 % of a step spent waiting for rewards",
            f"{100 * own['waiting_share']:.1f} %",
            own["waiting_share"] < WAITING,
        ),
        ("not more memory than the loop", f"{memory:.2f}", memory <= 1.0),
        (f"loss and gradient of one trajectory agree to {TOLERANCE:g}", f"{max(apart['loss'], apart['gradient']):.0e}", True),
    ):
        wanted.add_row(text, seen, "yes" if good else "NO")
    console.print(wanted)


WHAT = {
    "without kept texts": "off: each text is encoded again for every micro-batch",
    "without shared prefix": "off: every picture walks its whole way (sampling.prefix=own)",
    "without overlap": "off: the rewards of each rollout are waited for before the next is sampled",
    "without oneDNN": "off: products with frozen weights by MKL, as torch alone computes them (policy.onednn)",
    "without larger sampling batches": "off: as many pictures in a pass of sampling as in one of training (sampling.draw_batch; on: {drawn})",
    "with larger training batches": "on: {large} pictures in a pass of training too (sampling.micro_batch)",
    "with fewer guided passes": "on: none behind the window (sampling.guided_steps=[0, 6]), which gives other pictures",
    "with one step ahead": "on: the next step is sampled before this one is learned from (sampling.ahead), one step off-policy",
    "with torch.compile": "on: policy.compile",
}
