"""Ten minutes at 80 % of a service's capacity, with new weights every 10 s and faults at random: does it leak, mix up, or hang?

    make soak                      or python -m bench.soak --seconds 600

The service is a process of its own; its reward says `version + grey / 1000`, so an answer tells which weights and which picture made
it. Memory is compared between the second tenth of the run and the last; 32 callers at most, and twice as many in the beginning, so that a
later burst is not taken for a leak. Exit status 1 when anything is wrong.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
import psutil
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import track

from bench.process import free_port, start, wait
from services.reward import Item
from shared import wire
from shared.client import Connections
from shared.image import encode
from shared.schema import RewardInfo, Score, ScoreItem, ScoreRequest

ROOT = Path(__file__).resolve().parents[1]
A, B, CAP, GROUP, SIDE = 0.002, 0.008, 32, 8, 128
CALLERS, LOAD, CAPACITY_S, SWAP_S, KEY = 32, 0.8, 10.0, 10.0, "the admin key of a soak"
POISON = 255


class Options(BaseModel):
    """`stamp` stands for the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stamp: int = 1


class Stamped:
    """A batch of n takes A n + B seconds; white pictures raise."""

    def __init__(self, name: str, options: Options) -> None:
        self.stamp = options.stamp
        self.info = RewardInfo(name=name, description="a soak's", weights_sha256=f"{options.stamp:064d}")

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        del device
        return cls(name, Options.model_validate(options))

    def score(self, batch: Sequence[Item]) -> list[Score]:
        time.sleep(A * len(batch) + B)
        greys = [int(item.image[0, 0, 0]) for item in batch]
        if POISON in greys:
            raise ValueError("a white picture")
        return [Score.ok(self.stamp + grey / 1000) for grey in greys]


def body(greys: Sequence[int], name: str, broken: int | None = None) -> bytes:
    """A request of pictures of these greys, no two alike; the one at `broken` is cut short."""
    items = []
    for index, grey in enumerate(greys):
        pixels = np.full((SIDE, SIDE, 3), grey, np.uint8)
        pixels[-1] = np.frombuffer(os.urandom(SIDE * 3), np.uint8).reshape(SIDE, 3)
        image = encode(pixels, "rgb8")
        if index == broken:
            image = image.model_copy(update={"data": image.data[:100]})
        items.append(ScoreItem(id=str(index), image=image))
    return wire.pack_request(ScoreRequest(request_id=name, items=items, priority="train"))


class Soak:
    """Callers, faults, swaps and a watch on memory, beside one service."""

    def __init__(self, url: str, admin: str, process: psutil.Process) -> None:
        self.url, self.admin, self.process = url, admin, process
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[tuple[float, int]] = []
        self.latest = 1

    async def one(self, client: httpx.AsyncClient, n: int, chance: random.Random) -> None:
        greys = [chance.randrange(250) for _ in range(GROUP)]
        fault = chance.choices(["none", "poison", "broken", "leave", "garbage"], [90, 3, 3, 3, 1])[0]
        spot = chance.randrange(GROUP) if fault in ("poison", "broken") else None
        if fault == "poison" and spot is not None:
            greys[spot] = POISON
        content = os.urandom(300) if fault == "garbage" else body(greys, f"r{n}", spot if fault == "broken" else None)
        asked = client.post(f"{self.url}/score", content=content, headers={"content-type": wire.MSGPACK})
        self.counts[f"sent: {fault}"] += 1
        lowest = self.latest
        try:
            answer = await (asyncio.wait_for(asked, chance.uniform(0, 0.05)) if fault == "leave" else asked)
        except TimeoutError:
            return
        except httpx.HTTPError as error:
            self.wrong.append(f"request {n}: {type(error).__name__}")
            return
        self.counts[f"status {answer.status_code}"] += 1
        if answer.status_code != 200:
            if not (fault == "garbage" and answer.status_code in (400, 415, 422)) and answer.status_code != 429:
                self.wrong.append(f"request {n} ({fault}): {answer.text[:200]}")
            return
        got = wire.parse_answer(answer.content, wire.MSGPACK)
        used = got.rewards["soak"]
        if used.weights_sha256 != f"{used.version:064d}" or used.version < lowest:
            self.wrong.append(f"request {n}: version {used.version}, weights {used.weights_sha256}, at least {lowest}")
        for index, (item, grey) in enumerate(zip(got.items, greys, strict=True)):
            value = item.scores["soak"].value
            good = value is None if index == spot else value is not None and abs(value - used.version - grey / 1000) < 1e-9
            if not good:
                self.wrong.append(f"request {n}, item {index}: {value}, expected {used.version} + {grey}/1000")
        self.counts["items"] += GROUP

    async def swap(self, client: httpx.AsyncClient) -> None:
        while True:
            await asyncio.sleep(SWAP_S)
            version = self.latest + 1
            answer = await client.post(
                f"{self.admin}/admin/rewards/soak/weights", json={"stamp": version}, headers={"authorization": f"Bearer {KEY}"}
            )
            if answer.status_code != 200:
                self.wrong.append(f"swap to {version}: {answer.text[:200]}")
            self.latest = version
            self.counts["swaps"] += 1

    async def capacity(self) -> float:
        """Requests a second that come through when twice the callers always ask, faults and all: a poisoned batch runs again in halves."""
        callers = 2 * CALLERS

        async def caller(number: int) -> int:
            n = 0
            while time.monotonic() - began < CAPACITY_S:
                await self.one(client, -1 - callers * n - number, random.Random(callers * n + number))
                n += 1
            return n

        async with httpx.AsyncClient(transport=Connections(callers), timeout=60, trust_env=False) as client:
            began = time.monotonic()
            return sum(await asyncio.gather(*map(caller, range(callers)))) / (time.monotonic() - began)

    async def run(self, seconds: float) -> None:
        chance = random.Random(0)
        tasks: set[asyncio.Task[None]] = set()
        async with httpx.AsyncClient(transport=Connections(CALLERS), timeout=60, trust_env=False) as client:
            rate = LOAD * await self.capacity()
            swapping = asyncio.create_task(self.swap(client))
            began, n = time.monotonic(), 0
            for tick in track(range(int(seconds)), description=f"{rate * GROUP:.0f} pictures a second"):
                while (now := time.monotonic() - began) < tick + 1:
                    while n < rate * now:
                        tasks.add(task := asyncio.create_task(self.one(client, n, random.Random(n))))
                        task.add_done_callback(tasks.discard)
                        n += 1
                    await asyncio.sleep(chance.uniform(0.001, 0.02))
                self.memory.append((now, self.process.memory_info().rss))
            await asyncio.wait_for(asyncio.gather(*tasks), 60)
            swapping.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    """0 when memory stays flat and every answer is right."""
    parser = argparse.ArgumentParser("soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    seconds = parser.parse_args(argv).seconds
    port, admin = free_port(), free_port()
    config = {
        "device": "cpu",
        "admin": {"port": admin, "env": "SOAK_KEY"},
        "rewards": {"soak": {"use": "bench.soak:Stamped", "batch_cap": CAP}},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "soak.yaml"
        file.write_text(json.dumps(config))
        server = start(file, port, subprocess.DEVNULL, {"SOAK_KEY": KEY})
        try:
            url = f"http://127.0.0.1:{port}"
            wait(url)
            soak = Soak(url, f"http://127.0.0.1:{admin}", psutil.Process(server.pid))
            asyncio.run(soak.run(seconds))
        finally:
            server.terminate()
            code = server.wait(60)
    return report(soak, seconds, code)


def report(soak: Soak, seconds: float, code: int) -> int:
    """Print, write bench/results/soak.json, and judge."""
    console, tenth = Console(), max(1, len(soak.memory) // 10)
    early = statistics.median(rss for _, rss in soak.memory[tenth : 2 * tenth])
    late = statistics.median(rss for _, rss in soak.memory[-tenth:])
    growth = late / early - 1
    result = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "growth": round(growth, 4),
        "resident_mib": round(late / 2**20, 1),
        "wrong": len(soak.wrong),
        "exit": code,
        "counts": dict(soak.counts),
    }
    out = ROOT / "bench" / "results" / "soak.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(result)
    for line in soak.wrong[:20]:
        console.print(line, markup=False)
    return int(growth > 0.02 or bool(soak.wrong) or code != 0)


if __name__ == "__main__":
    sys.exit(main())
