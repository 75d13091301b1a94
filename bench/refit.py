"""What a refit costs those who score meanwhile, and what a swap does to them: `make bench-refit`, or `python -m bench.refit --quick`.

The embedded detector is a service of its own, one thread a forward pass, and is refitted over its admin listener. First rounds of scoring
without a refit and beside one that goes on all the time (with RealGen's augmentation, so the backbone runs at every step); ratios are taken
within a round. Then callers ask all the time while refits are published one after the other, each another version: every answer must come,
be by one version, and as soon as others. That an answer is by one version is seen in its numbers: a picture has one log-odds in all
answers of a version, and another in those of the next.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.process import free_port, start, wait
from shared import wire
from shared.client import Connections
from shared.fitting import FitClient
from shared.image import encode
from shared.schema import ScoreItem, ScoreRequest
from world import photographs

ROOT = Path(__file__).resolve().parents[1]
KEY, REWARDS = "the admin key of a benchmark", {"enduring": 1e-9, "swapped": 3e-3}  # learning rates
CALLERS, GROUP, BATCH, SIDE = 8, 8, 32, 128  # requests at once, pictures of one, most of a forward pass, pictures of a refit's side
NEAR_S, AGREE, APART = 0.25, 1e-3, 1e-2
Quantiles = dict[str, float]


@dataclass(frozen=True)
class Answer:
    """One request of pictures `first`, `first + 1`, ...: when, how long, what came."""

    sent: float
    seconds: float
    status: int
    first: int
    version: int | None = None
    logits: tuple[float, ...] = ()


class Callers:
    """So many who always ask, for groups of photographs."""

    def __init__(self, url: str, reward: str, images: Sequence[np.ndarray], group: int) -> None:
        self.url, self.reward, self.group, self.answers = url, reward, group, list[Answer]()
        self._items = [ScoreItem(id=str(i), image=encode(image, "rgb8")) for i, image in enumerate(images)]
        self._number = itertools.count()

    async def _one(self, client: httpx.AsyncClient) -> None:
        number = next(self._number)
        first = number * self.group % (len(self._items) - self.group)
        items = self._items[first : first + self.group]
        request = ScoreRequest(request_id=f"{self.reward}-{number}", items=items, rewards=[self.reward], priority="train")
        body, sent = wire.pack_request(request), time.monotonic()
        try:
            answer = await client.post(f"{self.url}/score", content=body, headers={"content-type": wire.MSGPACK})
        except httpx.HTTPError:
            self.answers.append(Answer(sent, time.monotonic() - sent, 0, first))
            return
        seconds = time.monotonic() - sent
        if answer.status_code != 200:
            self.answers.append(Answer(sent, seconds, answer.status_code, first))
            return
        got = wire.parse_answer(answer.content, wire.MSGPACK)
        scores = [item.scores[self.reward] for item in got.items]
        logits = tuple(score.parts.get("logit", float("nan")) for score in scores)
        self.answers.append(Answer(sent, seconds, 200, first, got.rewards[self.reward].version, logits))

    async def ask(self, callers: int, going: asyncio.Event) -> None:
        async def caller() -> None:
            while going.is_set():
                await self._one(client)

        async with httpx.AsyncClient(transport=Connections(callers), timeout=120, trust_env=False) as client:
            await asyncio.gather(*(caller() for _ in range(callers)))


def throughput(url: str, admin: str, images: Sequence[np.ndarray], rounds: int, seconds: float) -> dict[str, Any]:
    """Pictures a second without and beside a refit, by rounds; the first round warms up."""
    rates: dict[str, list[float]] = {"alone": [], "beside": []}
    steps: list[float] = []

    def window() -> float:
        callers = Callers(url, "enduring", images, GROUP)

        async def run() -> float:
            going = asyncio.Event()
            going.set()
            began = time.monotonic()
            asking = asyncio.ensure_future(callers.ask(CALLERS, going))
            await asyncio.sleep(seconds)
            going.clear()
            await asking
            return time.monotonic() - began

        elapsed = asyncio.run(run())
        if any(answer.status != 200 for answer in callers.answers):
            raise RuntimeError("a request failed while throughput was measured")
        return GROUP * len(callers.answers) / elapsed

    def steps_so_far() -> float:
        text = httpx.get(f"{url}/metrics", trust_env=False).text
        found = [line for line in text.splitlines() if line.startswith('verism_fit_steps_total{reward="enduring"}')]
        return float(found[0].split()[-1]) if found else 0.0

    with FitClient(admin, KEY, reward="enduring", holder="bench") as fits:
        for number in track(range(rounds + 1), description="rounds (the first warms up)"):
            for way in ("alone", "beside") if number % 2 else ("beside", "alone"):
                if way == "beside":
                    fits.add("real", images[:SIDE])
                    fits.add("generated", images[SIDE : 2 * SIDE])
                    fits.fit(until_accuracy=1.0, rounds=10_000)
                    while (state := fits.state()).round == 0 and state.outcome == "running":
                        time.sleep(0.1)
                    before = steps_so_far()
                rate = window()
                if way == "beside":
                    if fits.state().outcome != "running":
                        raise RuntimeError(f"the refit did not last: {fits.state()}")
                    steps.append((steps_so_far() - before) / seconds)
                    fits.rollback(1)
                if number:
                    rates[way].append(rate)
    ratios = [beside / alone for alone, beside in zip(rates["alone"], rates["beside"], strict=True)]
    return {
        "pictures_per_second_alone": statistics.median(rates["alone"]),
        "pictures_per_second_beside": statistics.median(rates["beside"]),
        "ratio": statistics.median(ratios),
        "ratio_range": (min(ratios), max(ratios)),
        "refit_steps_per_second": statistics.median(steps),
    }


def swaps(url: str, admin: str, images: Sequence[np.ndarray], requests: int, times: int) -> dict[str, Any]:
    """`requests` at least, and `times` new versions while they are asked."""
    callers, group = Callers(url, "swapped", images, 2), CALLERS
    outcomes: list[str] = []

    def refits() -> None:
        with FitClient(admin, KEY, reward="swapped", holder="bench") as fits:
            for number in track(range(times), description="refits that are published"):
                while len(callers.answers) < requests * number / (times + 1):
                    time.sleep(0.05)
                chosen = np.random.default_rng(number).permutation(len(images))[: 2 * SIDE]
                fits.add("real", [images[i] for i in chosen[:SIDE]])
                fits.add("generated", [images[i] for i in chosen[SIDE:]])
                fits.fit(rounds=1)
                outcomes.append(fits.wait(600).outcome)

    async def run() -> float:
        going = asyncio.Event()
        going.set()
        began = time.monotonic()
        asking = asyncio.ensure_future(callers.ask(group, going))
        await asyncio.to_thread(refits)
        while len(callers.answers) < requests:
            await asyncio.sleep(0.05)
        going.clear()
        await asking
        return time.monotonic() - began

    elapsed = asyncio.run(run())
    return {**judged(callers.answers), "seconds": elapsed, "refits": {name: outcomes.count(name) for name in set(outcomes)}}


def judged(answers: Sequence[Answer]) -> dict[str, Any]:
    """Errors, answers by two versions, and latencies near a swap and far from one."""
    good = [answer for answer in answers if answer.status == 200]
    by: dict[tuple[int, int], list[float]] = {}
    for answer in good:
        for offset, logit in enumerate(answer.logits):
            by.setdefault((answer.version or 0, answer.first + offset), []).append(logit)
    middle = {place: statistics.median(values) for place, values in by.items()}
    mixed = sum(
        any(abs(z - middle[answer.version or 0, answer.first + k]) > AGREE or z != z for k, z in enumerate(answer.logits))
        for answer in good
    )
    versions = sorted({answer.version or 0 for answer in good})
    moved = [
        statistics.median(
            abs(middle[later, i] - z) for (version, i), z in middle.items() if version == earlier and (later, i) in middle
        )
        for earlier, later in itertools.pairwise(versions)
        if any(version == earlier and (later, i) in middle for version, i in middle)
    ]
    swapped = [min(answer.sent + answer.seconds for answer in good if answer.version == version) for version in versions[1:]]
    near = [
        answer.seconds
        for answer in good
        if any(answer.sent - NEAR_S <= moment <= answer.sent + answer.seconds + NEAR_S for moment in swapped)
    ]
    far = [
        answer.seconds
        for answer in good
        if not any(answer.sent - NEAR_S <= moment <= answer.sent + answer.seconds + NEAR_S for moment in swapped)
    ]
    return {
        "requests": len(answers),
        "errors": len(answers) - len(good),
        "swaps": len(versions) - 1,
        "mixed": mixed,
        "least_move_between_versions": min(moved, default=0.0),
        "near_swaps": quantiles(near),
        "elsewhere": quantiles(far),
    }


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """In milliseconds."""
    if not seconds:
        return {"requests": 0}
    p50, p99, most = (1000 * float(value) for value in np.quantile(seconds, (0.5, 0.99, 1.0)))
    return {"requests": len(seconds), "p50_ms": p50, "p99_ms": p99, "max_ms": most}


def main(argv: Sequence[str] | None = None) -> int:
    """0 when what was asked for holds: 0.7 of the throughput, no error, no mixed answer."""
    parser = argparse.ArgumentParser("refit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, 1,000 requests, 5 swaps: two minutes")
    parser.add_argument("--rounds", type=int, default=5, help="of throughput, with and without a refit (default 5)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of one measurement (default 10)")
    parser.add_argument("--requests", type=int, default=10_000, help="at least, across the swaps (default 10000)")
    parser.add_argument("--swaps", type=int, default=20, help="versions that are published meanwhile (default 20)")
    parser.add_argument("--share", type=float, default=0.25, help="of a core for the refit while scoring goes on (default 0.25)")
    parser.add_argument("--lora", type=int, default=0, help="rank of a LoRA on the backbone; 0 fits the head alone")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.seconds, options.requests, options.swaps = 2, 5.0, 1_000, 5
    images = list(photographs.load("test")[0][:1024])
    port, admin = free_port(), free_port()
    head = {"lora": {"rank": options.lora}} if options.lora else {}
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        fit = {"share": options.share, "head": head, "worse": 0.5, "ema": 0.0}
        rewards = {
            name: {
                "use": "detector",
                "folder": "world/detector",
                "batch_cap": BATCH,
                "fit": {**fit, "folder": f"{folder}/{name}", "optim": {"lr": lr}},
            }
            for name, lr in REWARDS.items()
        }
        file = Path(folder) / "service.json"
        file.write_text(json.dumps({"threads": 1, "admin": {"port": admin, "env": "BENCH_REFIT_KEY"}, "rewards": rewards}))
        server = start(file, port, subprocess.DEVNULL, {"BENCH_REFIT_KEY": KEY})
        try:
            url = f"http://127.0.0.1:{port}"
            wait(url, limit_s=180)
            rates = throughput(url, f"http://127.0.0.1:{admin}", images, options.rounds, options.seconds)
            across = swaps(url, f"http://127.0.0.1:{admin}", images[: 2 * SIDE], options.requests, options.swaps)
        finally:
            server.terminate()
            server.wait(60)
    return report(rates, across, options, before)


def report(rates: dict[str, Any], across: dict[str, Any], options: argparse.Namespace, load: float) -> int:
    """Print, write bench/results/refit.json (of `--quick` refit-quick.json), and judge."""
    console = Console()
    table = Table("scoring", "pictures/s", "of alone", "min to max", title="while a refit runs")
    table.add_row("alone", f"{rates['pictures_per_second_alone']:.0f}", "1.00", "")
    low, high = rates["ratio_range"]
    table.add_row(
        "beside a refit", f"{rates['pictures_per_second_beside']:.0f}", f"{rates['ratio']:.2f}", f"{low:.2f} to {high:.2f}"
    )
    console.print(table)
    console.print(f"{rates['refit_steps_per_second']:.2f} steps of the refit a second")
    table = Table("requests", "", "p50 ms", "p99 ms", "max ms", title=f"across {across['swaps']} swaps")
    for name in ("near_swaps", "elsewhere"):
        row = across[name]
        table.add_row(
            name.replace("_", " "), str(row["requests"]), *(f"{row.get(key, 0):.0f}" for key in ("p50_ms", "p99_ms", "max_ms"))
        )
    console.print(table)
    console.print(
        f"{across['requests']} requests, {across['errors']} errors, {across['mixed']} answers by two versions; refits {across['refits']}"
    )
    stamp = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "share": options.share,
        "lora": options.lora,
        "rounds": options.rounds,
    }
    out = ROOT / "bench" / "results" / ("refit-quick.json" if options.quick else "refit.json")
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({**stamp, "throughput": rates, "swaps": across}, indent=1) + "\n")
    console.print(f"written to {out.relative_to(ROOT)}")
    sound = (
        across["errors"] == across["mixed"] == 0
        and across["swaps"] >= options.swaps
        and across["least_move_between_versions"] > APART
    )
    return int(not sound or rates["ratio"] < 0.7)


if __name__ == "__main__":
    sys.exit(main())
