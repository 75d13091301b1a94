"""The fault grid: nothing hangs, no score is wrong, no traceback reaches a caller, whatever goes wrong around a real service."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bench.process import free_port, start, wait
from shared import wire
from shared.client import RewardClient, RewardClientSync
from shared.image import encode
from shared.schema import ImageData, ScoreItem, ScoreRequest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
ADMIN = "an admin key of a test"


class Service:
    """`verism-serve` as a process, with the faulty reward."""

    def __init__(self, folder: Path, reward: dict[str, Any] | None = None, **config: Any) -> None:
        self.port, self.admin = free_port(), free_port()
        options = {"use": "tests.e2e.faulty:Faulty", "batch_cap": 8, "cache_items": 0, **(reward or {})}
        config = {"device": "cpu", "rewards": {"faulty": options}, "admin": {"port": self.admin, "env": "ADMIN"}, **config}
        file = folder / f"{self.port}.yaml"
        file.write_text(json.dumps(config))
        self.url, self.log = f"http://127.0.0.1:{self.port}", folder / f"{self.port}.log"
        with self.log.open("w") as log:
            self.process = start(file, self.port, stderr=log, variables={"ADMIN": ADMIN})
        try:
            wait(self.url, self.process)
        except RuntimeError as error:
            raise AssertionError(self.log.read_text()) from error

    def metric(self, name: str, **labels: str) -> float:
        found = 0.0
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            match = re.fullmatch(r"verism_(\w+)(?:\{(.*)\})? (\S+)", line)
            if match and match[1] == name and all(f'{k}="{v}"' in (match[2] or "") for k, v in labels.items()):
                found += float(match[3])
        return found

    def until(self, name: str, least: float, **labels: str) -> None:
        end = time.monotonic() + 10
        while self.metric(name, **labels) < least:
            assert time.monotonic() < end, f"{name} stays below {least}"
            time.sleep(0.02)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    one = Service(tmp_path_factory.mktemp("faults"), {"room": 4, "a": 0.002})
    yield one
    one.stop()
    log = one.log.read_text()
    assert all(line.startswith("{") for line in log.splitlines() if "faulty" in line and "reference" in line)


def grey(value: int, side: int = 32) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def item(name: str, image: ImageData) -> ScoreItem:
    return ScoreItem(id=name, image=image)


def request(values: list[int], request_id: str = "r", **more: Any) -> ScoreRequest:
    return ScoreRequest(request_id=request_id, items=[item(str(i), encode(grey(v), "rgb8")) for i, v in enumerate(values)], **more)


def post(url: str, body: bytes, timeout: float = 30, kind: str = wire.MSGPACK) -> httpx.Response:
    return httpx.post(f"{url}/score", content=body, headers={"content-type": kind}, timeout=timeout)


def right(answer: httpx.Response, values: list[int], offset: int = 1) -> None:
    assert answer.status_code == 200, answer.text
    scores = [one.scores["faulty"].value for one in wire.parse_answer(answer.content, wire.MSGPACK).items]
    assert scores == pytest.approx([offset + v / 1000 for v in values], abs=1e-9)


def bomb() -> bytes:
    """A PNG of a few kilobytes whose header promises 30000x30000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def broken(kind: str) -> ImageData:
    png = encode(grey(99), "png").data
    return {
        "corrupt": ImageData(encoding="png", height=32, width=32, data=b"\x89PNG\r\n\x1a\n" + os.urandom(200)),
        "truncated": ImageData(encoding="png", height=32, width=32, data=png[: len(png) // 2]),
        "bomb": ImageData(encoding="png", height=30_000, width=30_000, data=bomb()),
        "bomb that lies": ImageData(encoding="png", height=32, width=32, data=bomb()),
        "short raw": ImageData(encoding="rgb8", height=32, width=32, data=b"123"),
        "NaN": encode(grey(14), "rgb8"),
        "poison": encode(grey(13), "rgb8"),
    }[kind]


@pytest.mark.parametrize("kind", ["corrupt", "truncated", "bomb", "bomb that lies", "short raw", "NaN", "poison"])
def test_one_bad_picture_of_eight(service: Service, kind: str) -> None:
    items = [item(str(i), encode(grey(100 + i), "rgb8")) for i in range(8)]
    items[5] = item("bad", broken(kind))
    answer = post(service.url, wire.pack_request(ScoreRequest(request_id=kind, items=items)))
    scores = [one.scores["faulty"] for one in wire.parse_answer(answer.content, wire.MSGPACK).items]
    assert scores[5].value is None and scores[5].error is not None
    assert [s.value for i, s in enumerate(scores) if i != 5] == pytest.approx([1.1 + i / 1000 for i in range(8) if i != 5])
    assert b"Traceback" not in answer.content and b"secret" not in answer.content


def test_out_of_memory_halves_the_batches_and_loses_nothing(service: Service) -> None:
    values = list(range(100, 116))
    right(post(service.url, wire.pack_request(request(values))), values)
    assert service.metric("oom_total") > 0 and service.metric("batch_cap") <= 4


def test_a_version_that_does_not_exist(service: Service) -> None:
    answer = post(service.url, wire.pack_request(request([1], require_version={"faulty": 77})))
    assert answer.status_code == 409 and answer.json()["observed"] == 1


def test_a_repeated_request_id(service: Service) -> None:
    before = service.metric("joined_total"), service.metric("items_total", reward="faulty")
    body, other = (wire.pack_request(request([v] * 60, "same")) for v in (50, 60))
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda b: post(service.url, b), [body, body, other, body]))
    for answer, value in zip(answers, (50, 50, 60, 50), strict=True):
        right(answer, [value] * 60)
    joined, scored = service.metric("joined_total") - before[0], service.metric("items_total", reward="faulty") - before[1]
    assert joined >= 1 and scored == 60 * (4 - joined), "a joined request is not scored again"


def test_a_slow_body_is_cut_off_and_nobody_waits_for_it(tmp_path: Path) -> None:
    service = Service(tmp_path, body_timeout_s=1.0)
    try:
        with socket.create_connection(("127.0.0.1", service.port)) as slow:
            slow.sendall(b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-type: application/msgpack\r\ncontent-length: 1000\r\n\r\nabc")
            right(post(service.url, wire.pack_request(request([7]))), [7])
            slow.settimeout(10)
            assert b" 400 " in slow.recv(4096)
    finally:
        service.stop()


def test_silent_connections_are_closed_and_others_served(tmp_path: Path) -> None:
    service = Service(tmp_path, header_timeout_s=3.0, max_connections=300)
    silent = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(199)]
    half = socket.create_connection(("127.0.0.1", service.port))
    half.sendall(b"POST /score HTTP/1.1\r\nhost: ")
    try:
        right(post(service.url, wire.pack_request(request([7]))), [7])
        for one in [*silent, half]:
            one.settimeout(10)
            assert one.recv(100) == b"", "closed by the service"
        more = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(301)]
        time.sleep(0.3)
        more[-1].settimeout(10)
        assert b" 503 " in more[-1].recv(200), "one too many"
        for one in more:
            one.close()
    finally:
        for one in [*silent, half]:
            one.close()
        service.stop()


def test_a_caller_who_leaves_is_dropped_and_counted(tmp_path: Path) -> None:
    service = Service(tmp_path, {"a": 0.02})
    try:
        body = wire.pack_request(request([1] * 200, priority="bulk"))
        head = f"POST /score HTTP/1.1\r\nhost: x\r\ncontent-type: {wire.MSGPACK}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", service.port)) as caller:
            caller.sendall(head + body)
            service.until("inflight_images", 200)
        service.until("dropped_total", 150, why="cancelled")
        began = time.monotonic()
        right(post(service.url, wire.pack_request(request([7]))), [7])
        assert time.monotonic() - began < 2.0, "the 4 s of work that nobody waits for are not done"
        assert service.metric("inflight_images") == 0
    finally:
        service.stop()


def test_sigterm_under_load_answers_every_accepted_item(tmp_path: Path) -> None:
    service = Service(tmp_path, {"a": 0.01, "b": 0.02})
    values = [[100 + i] * 5 for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        asked = [
            pool.submit(post, service.url, wire.pack_request(request(v, f"r{i}", priority="train"))) for i, v in enumerate(values)
        ]
        service.until("inflight_images", 60)
        time.sleep(0.1)
        accepted = service.metric("inflight_images")
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        with contextlib.suppress(httpx.TransportError):
            assert post(service.url, wire.pack_request(request([1]))).status_code == 503
        answered = 0
        for one, expected in zip(asked, values, strict=True):
            answer = one.result(30)
            if answer.status_code == 200:
                right(answer, expected)
                answered += 5
            else:
                assert answer.status_code == 503
    assert answered >= accepted
    assert service.process.wait(30) == 0


def test_a_replica_lost_in_mid_group_costs_nothing_but_time(tmp_path: Path) -> None:
    first, second = Service(tmp_path, {"a": 0.02}), Service(tmp_path, {"a": 0.02})
    images = [grey(v) for v in range(100, 196)]

    async def score() -> None:
        async with RewardClient({"faulty": [first.url, second.url]}, timeout_s=60) as client:
            asked = [asyncio.create_task(client.score(images[i : i + 24])) for i in range(0, 96, 24)]
            await asyncio.sleep(0.25)
            first.process.kill()
            tables = await asyncio.gather(*asked)
        for n, table in enumerate(tables):
            assert table.mask_RB.all(), table.failures
            assert table.values_RB[0].tolist() == pytest.approx([1 + (100 + 24 * n + i) / 1000 for i in range(24)])

    try:
        asyncio.run(score())
    finally:
        first.process.wait(30)
        second.stop()


def test_twice_the_load_is_refused_honestly_and_the_rest_is_done(tmp_path: Path) -> None:
    """30 s of open arrivals at twice the capacity: goodput at least 0.9 of it, the rest 429 with a time that holds."""
    a, b, cap = 0.004, 0.008, 8
    service = Service(tmp_path, {"a": a, "b": b, "batch_cap": cap}, max_waiting_items=48)
    capacity = cap / (a * cap + b)  # images per second
    seconds, group = 30.0, 4
    done = refused = 0
    waits: list[float] = []

    async def load() -> None:
        nonlocal done, refused
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(limits=limits, timeout=30) as client:

            async def one(n: int) -> None:
                nonlocal done, refused
                v = [n % 200 + 20] * group
                v = [20 if x in (13, 14) else x for x in v]
                body = wire.pack_request(request(v, f"r{n}", priority="train"))
                answer = await client.post(f"{service.url}/score", content=body, headers={"content-type": wire.MSGPACK})
                if answer.status_code == 200:
                    right(answer, v)
                    done += group
                else:
                    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
                    waits.append(answer.json()["retry_after_ms"] / 1000)
                    refused += group

            tasks, began, n = [], time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                while n * group < 2 * capacity * (time.perf_counter() - began):
                    tasks.append(asyncio.create_task(one(n)))
                    n += 1
                await asyncio.sleep(0.005)
            await asyncio.gather(*tasks)

    try:
        asyncio.run(load())
    finally:
        service.stop()
    print(f"goodput {done / seconds / capacity:.3f} of capacity, refused {refused}, waits {min(waits):.2f} to {max(waits):.2f} s")
    assert done / seconds >= 0.9 * capacity and refused > 0
    assert max(waits) <= 2 * 48 / capacity, "never longer than all that may wait takes"


def test_weights_swapped_under_load_never_mix(tmp_path: Path) -> None:
    """Every answer names the version that made it; the value's integer part says which weights they were."""
    service = Service(tmp_path, {"a": 0.002})
    headers = {"authorization": f"Bearer {ADMIN}"}
    stop = threading.Event()
    versions: list[int] = []

    def caller(seed: int) -> None:
        n = 0
        while not stop.is_set():
            n += 1
            values = [(seed * 31 + n + i) % 200 + 20 for i in range(12)]
            answer = post(service.url, wire.pack_request(request(values, f"{seed}-{n}", priority="train")))
            right(answer, values, offset=(version := wire.parse_answer(answer.content, wire.MSGPACK).rewards["faulty"].version))
            versions.append(version)

    try:
        refused = httpx.post(f"http://127.0.0.1:{service.admin}/admin/rewards/faulty/weights", json={})
        assert refused.status_code == 401
        with ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(caller, n) for n in range(4)]
            for version in range(2, 12):
                swap = httpx.post(
                    f"http://127.0.0.1:{service.admin}/admin/rewards/faulty/weights",
                    json={"offset": version},
                    headers=headers,
                    timeout=30,
                )
                assert swap.status_code == 200 and swap.json()["version"] == version, swap.text
                time.sleep(0.1)
            bad = httpx.post(
                f"http://127.0.0.1:{service.admin}/admin/rewards/faulty/weights", json={"offset": "x"}, headers=headers, timeout=30
            )
            assert bad.status_code == 422
            stop.set()
            for one in callers:
                one.result()
        assert len(set(versions)) >= 8
        with RewardClientSync({"faulty": service.url}) as client:
            assert client.info()["faulty"].version == 11
    finally:
        stop.set()
        service.stop()
