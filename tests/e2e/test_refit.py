"""Refits of real services over real HTTP, by shared.fitting's client: restarts, kills in the middle, two trainers, the embedded detector."""

import contextlib
import hashlib
import json
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bench.process import free_port, start, wait
from shared import wire
from shared.client import RequestFailed, RewardClientSync
from shared.errors import ServiceUnreachable
from shared.fit_wire import FitState
from shared.fitting import FitClient
from shared.image import encode
from shared.schema import ScoreItem, ScoreRequest
from tests.services.fitting.linear import pictures
from world import photographs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]
WAIT_S = 600.0  # a machine with much else to do
KEY = "the admin key of a refit test"
FIT: dict[str, Any] = {"optim": {"lr": 0.05}, "ema": 0.5, "augment": None, "batch": 8, "rounds": 3, "until_accuracy": 1.0}
LINEAR = {"use": "tests.services.fitting.linear:Linear", "batch_cap": 16}


class Service:
    """A service in a folder, on the same ports each time."""

    def __init__(self, folder: Path, rewards: dict[str, Any]) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self.url, self.admin = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.admin_port}"
        folder.mkdir(exist_ok=True)
        for name, reward in rewards.items():
            if "fit" in reward:
                reward["fit"].setdefault("folder", str(folder / name))
        self.config = folder / "service.yaml"
        config = {"threads": 1, "admin": {"port": self.admin_port, "env": "REFIT_TEST_KEY"}, "rewards": rewards}
        self.config.write_text(json.dumps(config))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = start(self.config, self.port, subprocess.DEVNULL, {"REFIT_TEST_KEY": KEY})
        wait(self.url, self.process, WAIT_S)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def client(self, reward: str = "linear", **options: Any) -> FitClient:
        return FitClient(self.admin, KEY, reward=reward, timeout_s=WAIT_S, **options)


@contextlib.contextmanager
def served(folder: Path, rewards: dict[str, Any]) -> Iterator[Service]:
    service = Service(folder, rewards)
    try:
        service.start()
        yield service
    finally:
        if service.process is not None and service.process.poll() is None:
            service.stop()


def linear(*names: str, **fit: Any) -> dict[str, Any]:
    return {name: {**LINEAR, "fit": {**FIT, **fit}} for name in names or ("linear",)}


def begin(client: FitClient, seed: int, **asked: Any) -> FitState:
    client.add("real", pictures(40, 120, 2 * seed), ["a bag"] * 40)
    client.add("generated", pictures(40, 140, 2 * seed + 1), ["a bag"] * 40)
    return client.fit(**asked)


def refitted(service: Service, seed: int, reward: str = "linear", **asked: Any) -> FitState:
    with service.client(reward) as client:
        begin(client, seed, **asked)
        return client.wait(WAIT_S)


def plain(state: FitState) -> FitState:
    return state.model_copy(update={"seconds": 0.0})


def scores(service: Service, images: Sequence[np.ndarray], reward: str = "linear") -> tuple[list[float], dict[str, int]]:
    with RewardClientSync({reward: service.url}, timeout_s=WAIT_S) as client:
        table = client.score(list(images))
    assert table.mask_RB.all(), table.failures
    return table.values_RB[0].tolist(), table.versions


def test_a_restart_in_the_middle_of_training_gives_the_same_numbers(tmp_path: Path) -> None:
    """Two rewards alike; one is refitted without the restart, the other on both sides of it."""
    some = pictures(6, 130, 99)

    def told(service: Service, reward: str) -> tuple[Any, ...]:
        with service.client(reward) as client:
            said = client.versions()
        values, versions = scores(service, some, reward)
        return values, versions[reward], said.version, said.kept

    with served(tmp_path, linear("whole", "parts")) as service:
        whole = [plain(refitted(service, n, "whole")) for n in range(3)]
        parts = [plain(refitted(service, n, "parts")) for n in range(2)]
        last = told(service, "whole")
        service.kill()
        service.start()
        parts.append(plain(refitted(service, 2, "parts")))
        assert [state.outcome for state in whole] == ["published"] * 3
        assert parts == whole and whole[2].replayed > whole[1].replayed > 0
        assert told(service, "parts") == last == told(service, "whole")
        assert last[1] == 4


def test_a_kill_in_the_middle_of_a_refit_leaves_the_last_version(tmp_path: Path) -> None:
    some = pictures(6, 130, 99)
    slow = {"head": {"seconds": 0.05, "unsure": True}}
    with served(tmp_path, linear(**slow)) as service:
        assert refitted(service, 0).version == 2
        before = scores(service, some)
        with service.client(seconds=2) as client:
            kept = client.versions()
            begin(client, 1, rounds=1000)
            seen: list[FitState] = []
            with pytest.raises(TimeoutError, match="not refitted after"):
                client.wait(1.5, seen.append)
            assert seen[-1].outcome == "running" and seen[-1].losses and seen[-1].round >= 1
            assert scores(service, some) == before, "scoring goes on with the last version"
            service.kill()
            with pytest.raises(ServiceUnreachable, match="admin listener"):
                client.state()
            service.start()
            with pytest.raises(RequestFailed, match="add the pictures and fit again") as lost:
                client.wait(10)
            assert lost.value.problem().type == "urn:verism:fit-lost" and lost.value.problem().retryable
            assert scores(service, some) == before and client.versions() == kept
            client.lease()  # the one that it had is of another process
            begin(client, 2)
            assert client.wait(WAIT_S).version == 3


def test_two_trainers_and_one_that_died(tmp_path: Path) -> None:
    with served(tmp_path, linear()) as service:
        first, second = service.client(holder="run one", seconds=1.5), service.client(holder="run two")
        first.lease()
        with pytest.raises(RequestFailed, match="'run one'") as refused:
            second.add("real", pictures(9, 120, 0))
        problem = refused.value.problem()
        assert (problem.status, problem.type) == (409, "urn:verism:leased") and problem.retry_after_ms
        time.sleep(1.6)  # it is not heard of any more
        assert begin(second, 0).outcome == "running"
        assert second.wait(WAIT_S).version == 2
        with pytest.raises(RequestFailed, match="'run two'") as refused:
            first.fit()
        assert refused.value.problem().type == "urn:verism:no-lease"
        second.close()
        first.lease()
        first.close()
        with service.client("nobody") as nobody, pytest.raises(RequestFailed) as unknown:
            nobody.versions()
        assert unknown.value.problem().status == 404
        with FitClient(service.admin, "a wrong key", reward="linear") as stranger, pytest.raises(RequestFailed) as locked:
            stranger.versions()
        assert locked.value.problem().status == 401


def test_snapshot_rollback_publish_and_an_expired_version(tmp_path: Path) -> None:
    some = pictures(6, 130, 99)
    with served(tmp_path, linear()) as service, service.client() as client:
        refitted_two = begin(client, 0)
        assert refitted_two.rounds == 3
        client.wait(WAIT_S)
        assert [one.version for one in client.snapshot().kept if one.snapshot] == [2]
        at_two = scores(service, some)
        begin(client, 1, publish=False, until_accuracy=0.95, rounds=2)
        state = client.wait(WAIT_S)
        assert (state.outcome, state.version, state.candidate, state.rounds) == ("ready", 2, 3, 2)
        assert scores(service, some) == at_two
        service.kill()
        service.start()
        client.lease()
        assert client.publish().version == 3
        assert scores(service, some)[1] == {"linear": 3}
        item = ScoreItem(id="0", image=encode(some[0]))
        request = ScoreRequest(request_id="r", items=[item], rewards=["linear"], require_version={"linear": 2})
        answer = httpx.post(
            f"{service.url}/score", content=wire.pack_request(request), headers={"content-type": wire.MSGPACK}, timeout=WAIT_S
        )
        assert answer.status_code == 409 and answer.json()["type"] == "urn:verism:wrong-version"
        assert [one.version for one in client.rollback(2).kept] == [1, 2]
        assert scores(service, some) == at_two
        weights = httpx.post(
            f"{service.admin}/admin/rewards/linear/weights", json={"seconds": 0}, headers={"authorization": f"Bearer {KEY}"}
        )
        assert weights.status_code == 422 and "rollback" in weights.json()["title"]
        other = start(service.config, free_port(), subprocess.PIPE, {"REFIT_TEST_KEY": KEY})
        assert b"in use by another service" in b" ".join(other.communicate(timeout=WAIT_S)[1].split()) and other.returncode == 2


def degraded(images: np.ndarray) -> list[np.ndarray]:
    """What an airbrush leaves: every pixel the mean of its neighbours."""
    padded = np.pad(images.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    shifted = [padded[:, y : y + 28, x : x + 28] for y in range(3) for x in range(3)]
    return list(np.mean(shifted, axis=0).round().astype(np.uint8))


def test_the_embedded_detector_is_refitted_while_it_scores(tmp_path: Path) -> None:
    fit = {"optim": {"lr": 0.003}, "ema": 0.5, "augment": None, "rounds": 3, "until_accuracy": 0.99}
    rewards = {
        "realism": {"use": "realism", "parts": {"detector": {"weight": 1}}},
        "detector": {"use": "detector", "folder": "world/detector", "batch_cap": 16, "fit": fit},
    }
    images = photographs.load("test")[0][:160]
    real, made = list(images[:80]), degraded(images[80:])
    wrong: list[str] = []
    ended = threading.Event()
    with served(tmp_path, rewards) as service:

        def ask() -> None:
            with RewardClientSync({"detector": service.url}, timeout_s=WAIT_S) as client:
                while not ended.is_set():
                    table = client.score(real[:8])
                    if not table.mask_RB.all() or table.versions["detector"] not in (1, 2):
                        wrong.append(str((table.failures, table.versions)))

        caller = threading.Thread(target=ask)
        caller.start()
        try:
            before = scores(service, [*real, *made], "detector")
            with service.client("detector") as client:
                client.add("real", real)
                client.add("generated", made)
                client.fit()
                state = client.wait(WAIT_S)
        finally:
            ended.set()
            caller.join(30)
        assert state.outcome == "published" and state.version == 2, state
        assert state.accuracy is not None and state.accuracy_before is not None and state.accuracy >= state.accuracy_before
        assert not wrong
        after, versions = scores(service, [*real, *made], "detector")
        assert versions == {"detector": 2} and after != before[0]
        by = {hashlib.sha256(one.tobytes()).hexdigest(): value for one, value in zip([*real, *made], after, strict=True)}
        assert len(state.evaluated) == 16
        for key, value in state.evaluated.items():
            assert by[key] == pytest.approx(value, abs=1e-5), "fitting and scoring agree"
        assert scores(service, real[:4], "realism")[0] == pytest.approx(after[:4], abs=1e-5)
        metrics = httpx.get(f"{service.url}/metrics").text
        assert 'verism_fit_outcomes_total{outcome="published",reward="detector"} 1.0' in metrics
        service.kill()
        service.start()
        assert scores(service, [*real, *made], "detector") == (pytest.approx(after, abs=1e-5), {"detector": 2})
