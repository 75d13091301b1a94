"""What serving costs: Verism and the servers that people use today, with the same model, in one run.

Every contestant is one or more processes here; while one is measured the others are stopped (SIGSTOP), so they cost nothing. Rounds go
through all contestants, each round in another order, and ratios are taken within a round: neighbours in time share the machine's
mood. Every client encodes its pictures inside the clock, as a trainer must; only PNG bodies, which would measure nothing but their
encoder, are made before it, and their encoder's CPU time is counted to the client. The model takes at most 32 pictures in a forward pass,
for everyone.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.console import Console

from bench import models, peers, process, serving_report
from bench.process import free_port
from shared.client import RewardClient

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "bench" / "results" / "logs"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}
VERISM, VERISM_2 = "Verism", "Verism, 2 processes"
START_S = 180.0  # a busy machine starts seven servers slowly
GROUPS, CALLERS, SIDES = (1, 8, 24), (1, 4, 32), (512, 1024)
IN_FLIGHT = (8, 8)  # groups and callers beside those: 64 pictures, two whole batches
FAST = ((8, 4), (24, 4), (24, 1))  # with the model `fast`
DECIDING = {
    ("sleep", 8, 4),
    ("sleep", 24, 4),
    ("sleep", 1, 32),
    ("sleep", *IN_FLIGHT),
    ("detector", 8, 4),
    *(("fast", *each) for each in FAST),
}
WARM = 0.25  # share of a cell's seconds that does not count: callers start together, and drift apart
console = Console(stderr=True)


@dataclass
class Server:
    """The processes of one contestant with one model."""

    name: str
    setting: str
    model: str
    commands: list[list[str]]
    urls: list[str]
    health: str
    peer: peers.Peer | None = None
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _tree: list[psutil.Process] = field(default_factory=list)

    def start(self) -> None:
        """RuntimeError names the log when it does not become ready."""
        LOGS.mkdir(parents=True, exist_ok=True)
        log = LOGS / f"{self.name.replace(' ', '-')}-{self.model}.log"
        with log.open("wb") as out:
            for command in self.commands:
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=out))
        end = time.monotonic() + START_S
        for url in self.urls:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(url + self.health, timeout=60, trust_env=False).status_code == 200:
                        break
                if time.monotonic() > end or any(p.poll() is not None for p in self.processes):
                    raise RuntimeError(f"{self.name} did not start with {self.model}; {log.relative_to(ROOT)} says why")
                time.sleep(0.2)

    def tree(self) -> list[psutil.Process]:
        self._tree = process.tree(self.processes) or self._tree
        return self._tree

    def cpu(self) -> float:
        """Seconds of user and system time of the whole tree so far."""
        return process.cpu_seconds(self.tree())

    def send(self, number: signal.Signals) -> None:
        process.send(self.tree(), number)

    def stop(self) -> None:
        process.end(self.processes, self.tree(), 10)


def verism(model: str, count: int, folder: Path) -> Server:
    ports = [free_port() for _ in range(count)]
    config = folder / f"{model}.json"
    config.write_text(json.dumps({"threads": 1, "rewards": {"model": models.options(model)}}))
    return Server(
        VERISM if count == 1 else VERISM_2,
        "msgpack, raw pixels, RewardClient",
        model,
        [[sys.executable, "-m", "services", str(config), "--port", str(port)] for port in ports],
        [f"http://127.0.0.1:{port}" for port in ports],
        "/livez",
    )


def peer_server(name: str, model: str) -> Server:
    peer, port = peers.find(name), free_port()
    if not peer.python.exists():
        raise RuntimeError(f"{peer.name}: no {peer.environment}; `make bench-serving` makes it")
    command = [str(peer.python), "-m", f"bench.peers.{name}", model, str(port)]
    return Server(peer.name, peer.setting, model, [command], [f"http://127.0.0.1:{port}"], peer.health, peer)


class Pool:
    """Pictures of each side, and the bodies that are made before any clock runs; `encode_ms` is what a picture of these costs."""

    def __init__(self) -> None:
        self.pictures: dict[int, list[np.ndarray]] = {}
        self._bodies: dict[tuple[str, int, int], bytes] = {}
        self.encode_ms: dict[tuple[str, int], float] = {}
        self._stamps = itertools.count(1)

    def images(self, side: int, group: int) -> list[np.ndarray]:
        """Each time other pictures, by their first four bytes: no cache can answer."""
        if side not in self.pictures:
            self.pictures[side] = models.pictures(side, max(GROUPS))
        pool = self.pictures[side]
        for image in pool[:group]:
            image.reshape(-1)[:4] = np.frombuffer(next(self._stamps).to_bytes(4, "little"), np.uint8)
        return pool[:group]

    def body(self, peer: peers.Peer, side: int, group: int) -> bytes:
        if not peer.made_before:
            return peer.encode(self.images(side, group))
        key = (peer.name, side, group)
        if key not in self._bodies:
            images = self.images(side, group)
            began = time.process_time()
            self._bodies[key] = peer.encode(images)
            self.encode_ms[peer.name, side] = 1000 * (time.process_time() - began) / group
        return self._bodies[key]


Ask = Callable[[int, int], Any]


@contextlib.asynccontextmanager
async def asking(server: Server, pool: Pool, priority: str = "train") -> AsyncIterator[Ask]:
    """A function (side, group) -> scores, that raises RuntimeError when a picture was not scored."""
    if server.peer is None:
        async with RewardClient({"model": server.urls}, priority=priority, timeout_s=120) as client:

            async def ask(side: int, group: int) -> list[float]:
                table = await client.score(pool.images(side, group), groups=["g"] * group)
                if not table.mask_RB.all():
                    raise RuntimeError(f"{server.name}: {table.failures}")
                return list(table.values_RB[0])

            yield ask
        return
    peer, url = server.peer, server.urls[0] + server.peer.path
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
    async with httpx.AsyncClient(limits=limits, timeout=120, trust_env=False) as http:

        async def ask(side: int, group: int) -> list[float]:
            answer = await http.post(url, content=pool.body(peer, side, group), headers={"content-type": peer.content_type})
            if answer.status_code != 200:
                raise RuntimeError(f"{server.name}: HTTP {answer.status_code} {answer.text[:200]}")
            scores = peer.decode(answer.content)
            if len(scores) != group:
                raise RuntimeError(f"{server.name}: {len(scores)} scores of {group} pictures")
            return scores

        yield ask


def quantile(values: Sequence[float], q: float) -> float:
    return float(np.quantile(values, q, method="higher")) if values else float("nan")


async def cell(server: Server, pool: Pool, side: int, group: int, callers: int, seconds: float, limit: float) -> dict[str, Any]:
    """Closed loop: each caller sends its next group when the last one is answered. The rate is that between two answers: the last one in the
    first quarter of the time (or the start), and the last one of all while every caller asks.

    Callers stop after `seconds`; what is not answered by `limit` is cancelled, and `censored` says so.
    """
    latencies: list[float] = []
    finished: list[float] = []
    async with asking(server, pool) as ask:
        await ask(side, group)
        cpu, own, began = server.cpu(), time.process_time(), time.perf_counter()

        async def caller() -> None:
            while (sent := time.perf_counter()) - began < seconds:
                await ask(side, group)
                finished.append(time.perf_counter() - began)
                latencies.append(finished[-1] - (sent - began))

        done, late = await asyncio.wait([asyncio.create_task(caller()) for _ in range(callers)], timeout=limit)
        wall, cpu, own = time.perf_counter() - began, server.cpu() - cpu, time.process_time() - own
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        failures = [str(task.exception()) for task in done if task.exception()]
        if late:
            await ask(side, 1)  # what was cancelled may still be worked on
    inside = sorted([t for t in finished if t <= seconds] or finished)
    first = max((t for t in inside if t <= WARM * seconds), default=0.0)
    counted = [t for t in inside if t > first]
    images, encode = len(finished) * group, pool.encode_ms.get((server.name, side), 0.0)
    return {
        "images_per_second": len(counted) * group / (counted[-1] - first) if counted else 0.0,
        "p50_ms": 1000 * quantile(latencies, 0.5),
        "p99_ms": 1000 * quantile(latencies, 0.99),
        "server_cpu_ms": 1000 * cpu / images if images and not late else None,
        "client_cpu_ms": 1000 * own / images + encode if images and not late else None,
        "groups": len(latencies),
        "wall_s": wall,
        "censored": len(late),
        "failures": failures[:3],
    }


async def ad_hoc(server: Server, pool: Pool, seconds: float) -> dict[str, Any]:
    """One person with one 512x512 picture at a time, while four trainers send groups of 24."""
    latencies: list[float] = []
    async with asking(server, pool) as train, asking(server, pool, "interactive") as ask:
        await ask(512, 1)
        trainers = [asyncio.create_task(_forever(train, 512, 24)) for _ in range(4)]
        await asyncio.sleep(0.5)
        end = time.perf_counter() + seconds
        while (sent := time.perf_counter()) < end or not latencies:
            await ask(512, 1)
            latencies.append(time.perf_counter() - sent)
            await asyncio.sleep(0.02)
        await _end(trainers)
        await ask(512, 1)
    return {"p50_ms": 1000 * quantile(latencies, 0.5), "p99_ms": 1000 * quantile(latencies, 0.99), "asked": len(latencies)}


async def alive(server: Server, pool: Pool, seconds: float) -> dict[str, Any]:
    """The health page every 10 ms, first while nothing happens, then while forward passes of 500 ms run."""
    out: dict[str, Any] = {}
    async with httpx.AsyncClient(timeout=30, trust_env=False) as http, asking(server, pool) as ask:
        for state in ("idle", "loaded"):
            tasks = [asyncio.create_task(_forever(ask, 512, 8)) for _ in range(2 if state == "loaded" else 0)]
            await asyncio.sleep(0.7)
            times: list[float] = []
            end = time.perf_counter() + seconds
            while (sent := time.perf_counter()) < end or not times:
                (await http.get(server.urls[0] + server.health)).raise_for_status()
                times.append(time.perf_counter() - sent)
                await asyncio.sleep(0.01)
            await _end(tasks)
            out[state] = {"p50_ms": 1000 * quantile(times, 0.5), "p99_ms": 1000 * quantile(times, 0.99), "asked": len(times)}
    return out


async def _forever(ask: Ask, side: int, group: int) -> None:
    while True:
        await ask(side, group)


async def _end(tasks: Sequence["asyncio.Task[None]"]) -> None:
    """Cancel; a task that had failed by itself raises its error here."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


@contextlib.contextmanager
def running(servers: Sequence[Server], failed: dict[str, str]) -> Iterator[list[Server]]:
    """Start all, leave out what does not start, stop all."""
    up: list[Server] = []
    try:
        for server in servers:
            try:
                server.start()
                up.append(server)
                console.print(f"[dim]{server.name} serves {server.model}[/]")
            except RuntimeError as error:
                failed[server.name] = str(error)
                console.print(f"[yellow]left out:[/] {error}")
                server.stop()
        yield up
    finally:
        for server in up:
            server.stop()


@contextlib.contextmanager
def alone(server: Server, all_of_them: Sequence[Server]) -> Iterator[None]:
    """Everyone else is stopped meanwhile."""
    for other in all_of_them:
        other.send(signal.SIGCONT if other is server else signal.SIGSTOP)
    try:
        yield
    finally:
        for other in all_of_them:
            other.send(signal.SIGCONT)


class Plain:
    """The model without a server: `rate(side, seconds)` in pictures per second, batches of 32, in a process of its own."""

    def __init__(self, model: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.models", model],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def rate(self, side: int, seconds: float) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{side} {seconds}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@dataclass(frozen=True)
class Plan:
    """How much to measure; `cells` are (model, side, group, callers, rounds), `longer` the seconds of those that decide. Past `minutes` no cell
    gets another round."""

    cells: tuple[tuple[str, int, int, int, int], ...]
    seconds: float
    longer: float
    limit: float
    adhoc_s: float
    idle_s: float
    livez_s: float
    minutes: float


def plan(quick: bool) -> Plan:
    if quick:
        few = [("sleep", 512, 24, 4), ("sleep", 512, 8, 4), ("sleep", 512, 1, 32), ("sleep", 512, 1, 1)]
        few += [("sleep", 512, *IN_FLIGHT), ("fast", 512, 24, 4), ("fast", 512, 8, 4), ("detector", 512, 8, 4)]
        return Plan(tuple((*each, 1) for each in few), 0.8, 1.6, 3.0, 1.5, 10.0, 2.0, 4.0)

    def rounds(model: str, side: int, group: int, callers: int) -> int:
        return 1 if side > 512 or group * callers > 128 else 3

    every = [("sleep", *each) for each in itertools.product(SIDES, GROUPS, CALLERS)] + [("sleep", 512, *IN_FLIGHT)]
    every += [("fast", 512, *each) for each in FAST]
    every += [("detector", *each) for each in itertools.product(SIDES, GROUPS, CALLERS)]
    return Plan(tuple((*each, rounds(*each)) for each in every), 1.0, 3.0, 6.0, 3.0, 10.0, 4.0, 30.0)


def measure(the_plan: Plan, wanted: Sequence[str]) -> dict[str, Any]:
    """Everything, as one JSON document."""
    pool, failed = Pool(), {}
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    plain_rates: dict[str, list[float]] = {}
    extra: dict[str, dict[str, Any]] = {"ad_hoc": {}, "idle_percent": {}, "alive": {}}
    settings: dict[str, str] = {}
    load, began = os.getloadavg(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:

        def contestants(model: str) -> Iterator[Server]:
            for name in wanted:
                try:
                    own = {"verism": 1, "verism2": 2}.get(name)
                    server = verism(model, own, Path(folder)) if own else peer_server(name, model)
                except (RuntimeError, ImportError) as error:
                    failed[name] = str(error)
                    continue
                settings[server.name] = server.setting
                yield server

        for model in dict.fromkeys(each[0] for each in the_plan.cells):
            with running(list(contestants(model)), failed) as servers:
                plain = Plain(model)
                try:
                    if model == "sleep":
                        extra["idle_percent"] = idle(servers, pool, the_plan.idle_s)
                    for turn in range(max(each[4] for each in the_plan.cells)):
                        share = {"sleep": 0.45, "fast": 0.55}.get(model, 1.0)
                        if turn and time.monotonic() - began > 60 * the_plan.minutes * share:
                            break
                        order = servers[turn % len(servers) :] + servers[: turn % len(servers)]
                        for _, side, group, callers, _ in (c for c in the_plan.cells if c[0] == model and c[4] > turn):
                            key = f"{model} {side} {group}x{callers}"
                            for server in servers:
                                server.send(signal.SIGSTOP)
                            seconds = the_plan.longer if side == 512 and (model, group, callers) in DECIDING else the_plan.seconds
                            rate = plain.rate(side, seconds)
                            plain_rates.setdefault(key, []).append(rate)
                            for server in order:
                                if server.peer is not None and server.peer.made_before:
                                    pool.body(server.peer, side, group)
                                with alone(server, servers):
                                    try:
                                        work = cell(server, pool, side, group, callers, seconds, the_plan.limit)
                                        got = asyncio.run(work)
                                    except (RuntimeError, httpx.HTTPError) as error:
                                        got = {"images_per_second": 0.0, "failures": [repr(error)]}
                                got["of_plain"] = got["images_per_second"] / rate
                                got["load"] = round(os.getloadavg()[0], 2)
                                cells.setdefault(key, {}).setdefault(server.name, []).append(got)
                            fastest = ", ".join(f"{s.name} {cells[key][s.name][-1]['images_per_second']:.0f}" for s in order)
                            console.print(f"[dim]{time.monotonic() - began:5.0f} s[/] {key}: plain {rate:.0f}, {fastest}")
                        for server in order if model != "fast" else []:
                            with alone(server, servers):
                                try:
                                    got = asyncio.run(ad_hoc(server, pool, the_plan.adhoc_s))
                                except (RuntimeError, httpx.HTTPError) as error:
                                    got = {"failures": [repr(error)]}
                            extra["ad_hoc"].setdefault(model, {}).setdefault(server.name, []).append(got)
                finally:
                    plain.stop()
        console.print(f"[dim]{time.monotonic() - began:5.0f} s[/] health pages during forward passes of 500 ms")
        for server in contestants("slow"):
            if server.name in failed or server.name == VERISM_2:
                continue
            with running([server], failed) as up:
                for one in up:
                    try:
                        extra["alive"][one.name] = asyncio.run(alive(one, pool, the_plan.livez_s))
                    except (RuntimeError, httpx.HTTPError) as error:
                        extra["alive"][one.name] = {"failures": [repr(error)]}
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "cores": os.cpu_count(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "load_before": [round(value, 2) for value in load],
        "load_after": [round(value, 2) for value in os.getloadavg()],
        "seconds_per_cell": the_plan.seconds,
        "settings": settings,
        "left_out": failed,
        "plain": plain_rates,
        "cells": cells,
        **extra,
    }


def idle(servers: Sequence[Server], pool: Pool, seconds: float) -> dict[str, float]:
    """Percent of a core that each uses while nobody asks, all in one window, after one group each has been answered."""

    async def once(server: Server) -> None:
        async with asking(server, pool) as ask:
            await ask(512, 8)

    for server in servers:
        asyncio.run(once(server))
    time.sleep(2)
    before, began = {s.name: s.cpu() for s in servers}, time.perf_counter()
    time.sleep(seconds)
    wall = time.perf_counter() - began
    return {s.name: 100 * (s.cpu() - before[s.name]) / wall for s in servers}


def main() -> int:
    names = ("verism", "verism2", *peers.NAMES)
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="about three minutes: a few cells, one round; docs stay as they are")
    parser.add_argument("--only", default=",".join(names), help=f"contestants, separated by commas: {', '.join(names)}")
    parser.add_argument("--show", action="store_true", help="measure nothing; print and write the last run again")
    arguments = parser.parse_args()
    out = ROOT / "bench" / "results" / ("serving-quick.json" if arguments.quick else "serving.json")
    if not arguments.show:
        unknown = [name for name in arguments.only.split(",") if name not in names]
        if unknown:
            parser.error(f"unknown contestant {unknown[0]!r}; known: {', '.join(names)}")
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(measure(plan(arguments.quick), arguments.only.split(",")), indent=1) + "\n")
    result = json.loads(out.read_text())
    serving_report.show(result)
    if not arguments.quick:
        serving_report.write(result, ROOT / "docs" / "benchmarks.md")
    print(f"written to {out.relative_to(ROOT)}" + ("" if arguments.quick else " and docs/benchmarks.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
