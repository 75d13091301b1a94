"""What HTTP costs: the same detector in a plain loop, in plain batches, and behind the service, in one run.

Every way scores the same photographs with the same number of threads. Plain ways run in a child process of their own, the
service in another, the client here; rounds are interleaved, and the median counts. CPU is counted per process: what the scoring process
used, and, apart from it, what the client used. Other work on the same cores changes every figure; the load is written beside them.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.process import free_port, start, wait
from shared.client import RewardClient
from world import photographs

Sample = tuple[float, float, float]  # seconds: wall, CPU of the process that scores, CPU of the client

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
BATCH = 32
PLAIN = """
import sys, time
from world import photographs
from services.reward import Item
from services.rewards.detector import Detector
detector = Detector.load("detector", {"folder": "world/detector"}, "cpu")
items = [Item(p) for p in photographs.load("test")[0][:int(sys.argv[1])]]
for line in sys.stdin:
    size = int(line)
    wall, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(items), size):
        detector.score(items[start : start + size])
    print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)
"""


def run(rounds: int, pictures: int) -> int:
    """Measure, print a table, write bench/results/http.json."""
    port = free_port()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as config:
        json.dump(
            {
                "threads": 1,
                "rewards": {"detector": {"use": "detector", "folder": "world/detector", "cache_items": 0, "batch_cap": BATCH}},
            },
            config,
        )
        config.flush()
        quiet: dict[str, Any] = {"cwd": ROOT, "env": ENVIRONMENT, "stderr": subprocess.DEVNULL}
        server = start(config.name, port, subprocess.DEVNULL)
        plain = subprocess.Popen(
            [sys.executable, "-c", PLAIN, str(pictures)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **quiet
        )
        try:
            wait(f"http://127.0.0.1:{port}")
            images = list(photographs.load("test")[0][:pictures])
            ways: dict[str, list[Sample]] = {}
            before = os.getloadavg()[0]
            for _ in track(range(rounds + 1), description="rounds (the first warms up)"):
                for size, name in ((1, "plain loop"), (BATCH, "plain batches")):
                    ways.setdefault(name, []).append(_plain(plain, size))
                for size, name in ((BATCH, "HTTP, requests of 32"), (1, "HTTP, 32 requests of 1 at a time")):
                    ways.setdefault(name, []).append(_http(server, f"http://127.0.0.1:{port}", images, size))
        finally:
            server.terminate()
            plain.terminate()
            server.wait(30)
            plain.wait(30)
    return _show({name: values[1:] for name, values in ways.items()}, pictures, before)


def _plain(process: subprocess.Popen[str], size: int) -> Sample:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"{size}\n")
    process.stdin.flush()
    wall, cpu = process.stdout.readline().split()
    return float(wall), float(cpu), 0.0


def _http(server: subprocess.Popen[bytes], url: str, images: list[np.ndarray], size: int) -> Sample:
    """Requests of `size`, 32 pictures being scored at any time (with requests of 32, the next one waits at the door)."""
    watched = psutil.Process(server.pid)

    async def work() -> float:
        async with RewardClient({"detector": url}) as client:
            gate = asyncio.Semaphore(BATCH // size if size < BATCH else 2)

            async def one(start: int) -> None:
                async with gate:
                    table = await client.score(images[start : start + size])
                    assert table.mask_RB.all(), table.failures

            began = time.perf_counter()
            await asyncio.gather(*(one(start) for start in range(0, len(images), size)))
            return time.perf_counter() - began

    server_before, client_before = sum(watched.cpu_times()[:2]), time.process_time()
    wall = asyncio.run(work())
    return wall, sum(watched.cpu_times()[:2]) - server_before, time.process_time() - client_before


def _show(ways: dict[str, list[Sample]], pictures: int, load: float) -> int:
    """`of plain batches` is the median over rounds of the ratio within a round: neighbours in time share the machine's mood."""
    table = Table("way", "images/s", "min to max", "of plain batches", "min to max", "CPU ms per image", "of the client")
    rates = {name: [pictures / wall for wall, *_ in values] for name, values in ways.items()}
    results = {}
    for name, values in ways.items():
        median = statistics.median(rates[name])
        ratios = [mine / plain for mine, plain in zip(rates[name], rates["plain batches"], strict=True)]
        cpu, client = (1000 * statistics.median(value[i] for value in values) / pictures for i in (1, 2))
        results[name] = {
            "images_per_second": median,
            "images_per_second_range": (min(rates[name]), max(rates[name])),
            "of_plain_batches": statistics.median(ratios),
            "of_plain_batches_range": (min(ratios), max(ratios)),
            "cpu_ms_per_image": cpu,
            "client_cpu_ms_per_image": client,
        }
        spread, relative = (f"{min(v):{f}} to {max(v):{f}}" for v, f in ((rates[name], ".0f"), (ratios, ".2f")))
        table.add_row(name, f"{median:.0f}", spread, f"{statistics.median(ratios):.2f}", relative, f"{cpu:.2f}", f"{client:.2f}")
    Console().print(table)
    out = ROOT / "bench" / "results" / "http.json"
    out.parent.mkdir(exist_ok=True)
    stamp = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "rounds": len(rates["plain batches"]),
        "pictures": pictures,
        "batch": BATCH,
    }
    out.write_text(json.dumps({**stamp, "ways": results}, indent=1) + "\n")
    Console().print(f"written to {out.relative_to(ROOT)}")
    return 0
