"""The app under a local Ray cluster: two replicas share the work, scores are those of a plain service, load adds a replica.

Needs Ray, which has an environment of its own: `make bench-serving` (or `pip install -r bench/peers/requirements.txt`), then
`.venv-peers/bin/python -m pytest tests/deploy`.
"""

import asyncio
import gc
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import httpx
import numpy as np
import pytest

from services.reward import Item
from shared.client import RewardClient
from shared.schema import RewardInfo, Score

pytest.importorskip("ray.serve", reason="Ray Serve is not installed here: pip install 'ray[serve]', or use .venv-peers")
import ray
from ray import serve

from deploy.ray.app import METRIC, Options, QueuedImages, build

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]


class Pid:
    """Scores the number of its process, after a while: who answered shows."""

    def __init__(self, name: str) -> None:
        self.info = RewardInfo(name=name)

    @classmethod
    def load(cls, name: str, options: Mapping[str, Any], device: str) -> Self:
        del options, device
        return cls(name)

    def score(self, batch: Sequence[Item]) -> list[Score]:
        time.sleep(0.05 * len(batch))
        return [Score.ok(float(os.getpid())) for _ in batch]


def config(folder: Path) -> Path:
    path = folder / "serve.json"
    rewards = {"pid": {"use": "tests.deploy.test_ray:Pid", "batch_cap": 4}, "jpeg_size": {"use": "jpeg_size", "batch_cap": 4}}
    path.write_text(json.dumps({"rewards": rewards}))
    return path


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runtime = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    here = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "object_store_memory": 2**28, "log_to_driver": False}
    try:
        ray.init(num_cpus=4, runtime_env=runtime, **here)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        with warnings.catch_warnings(action="ignore"):  # Ray lets go of its processes before they have ended
            serve.shutdown()
            ray.shutdown()
            gc.collect()


def picture(grey: int) -> np.ndarray:
    return np.full((32, 32, 3), grey, np.uint8)


def running() -> int:
    replicas = serve.status().applications["default"].deployments["verism"].replica_states
    return int(replicas.get("RUNNING", 0))


async def ask_alone(url: str, count: int) -> list[float]:
    """`count` requests of one picture each, all at once."""
    async with RewardClient({"pid": url}, timeout_s=120) as client:
        tables = await asyncio.gather(*(client.score([picture(grey)]) for grey in range(count)))
    assert all(table.mask_RB.all() for table in tables), [table.failures for table in tables]
    return [float(table.values_RB[0, 0]) for table in tables]


def test_two_replicas_share_the_work_and_score_as_a_plain_service(url: str, tmp_path: Path) -> None:
    serve.run(build(Options(config=config(tmp_path), replicas=2, cpus=0.5)), route_prefix="/")
    assert running() == 2
    assert len(set(asyncio.run(ask_alone(url, 40)))) == 2

    async def sizes() -> Any:
        async with RewardClient({"jpeg_size": url}, timeout_s=60) as client:
            return await client.score([picture(7), np.zeros((8, 8, 3), np.uint8)], groups=["g", "g"])

    from services.rewards.jpeg_size import JpegSize

    table = asyncio.run(sizes())
    assert table.mask_RB.tolist() == [[True, False]] and list(table.failures) == ["urn:verism:image-too-small"]
    assert table.values_RB[0, 0] == JpegSize.load("jpeg_size", {}, "cpu").score([Item(picture(7))])[0].value
    refused = httpx.post(f"{url}/score", content=b"\x80\x04", headers={"content-type": "application/msgpack"})
    assert refused.status_code == 415 and refused.headers["content-type"] == "application/problem+json"
    assert httpx.get(f"{url}/readyz", timeout=60).status_code == 200


def test_load_adds_a_replica(url: str, tmp_path: Path) -> None:
    options = Options(config=config(tmp_path), replicas=1, max_replicas=2, images_per_replica=8, cpus=0.5, upscale_delay_s=1)
    serve.delete("default")  # else the two replicas of the test before would stay for downscale_delay_s
    serve.run(build(options), route_prefix="/")
    assert running() == 1

    async def load() -> None:
        end = time.monotonic() + 240
        while running() < 2 and time.monotonic() < end:
            await ask_alone(url, 48)

    asyncio.run(load())
    assert running() == 2


@pytest.mark.parametrize(("images", "replicas"), [([], 0), ([3.0], 1), ([64.0], 1), ([60.0, 80.0], 3)])
def test_the_policy_counts_pictures(images: list[float], replicas: int) -> None:
    metrics = {METRIC: dict(enumerate(images))}
    assert QueuedImages(64)(SimpleNamespace(aggregated_metrics=metrics))[0] == replicas


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_replicas=1 is below replicas=2"):
        Options(config=config(tmp_path), max_replicas=1)
    with pytest.raises(ValueError, match="no configuration at"):
        build(Options(config=Path("nowhere.yaml")))
