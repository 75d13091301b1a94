"""A run and the real service that refits its detector, as processes: both killed, both resumed, equal to the last number."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.fit_wire import Versions
from tests.e2e.test_refit import KEY, LINEAR, Service, linear, served
from tests.trainer.run.service import recipe
from trainer.metrics import read

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
STEPS = 5


def refitted(service: Service, folder: Path, **adversary: Any) -> Path:
    """The smallest run that refits, as a file."""
    raw = recipe(
        service.url,
        sampling={"steps": 3, "window": 1, "window_last": 2, "height": 28, "width": 28, "micro_batch": 8},
        group={"prompts": 2, "size": 6},
        rewards={"linear": {"url": service.url, "part": "logit"}, "frozen": {"url": service.url, "weight": 0}},
        adversary={"linear": {"admin": service.admin, "key_env": "REFIT_TEST_KEY", "lease_s": 3, **adversary}},
        references={"path": "world/photographs", "evaluated": 16},
        eval={"every": 2, "samples": 4, "steps": 2, "grid": 4},
        checkpoint_best="heldout:frozen",
        checkpoint_every=2,
        reward_outage_s=300,
        tensorboard=False,
        steps=STEPS,
    )
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder / "run.yaml"


def rewards() -> dict[str, Any]:
    return {**linear(), "frozen": dict(LINEAR)}


def train(root: Path, recipe: Path, kill: Callable[[list[dict[str, Any]]], bool] = lambda lines: False) -> int:
    """The exit status; SIGKILL as soon as the metrics say so."""
    run = recipe.parent / "run"
    command = [sys.executable, "-m", "trainer", str(recipe), "--resume", "--run-dir", str(run)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "REFIT_TEST_KEY": KEY}
    with (recipe.parent / "log").open("a") as out:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                if kill(read(run / "metrics.jsonl")):
                    process.kill()
                time.sleep(0.01)
        finally:
            process.kill()
        return process.wait()


def numbers(recipe: Path) -> list[dict[str, Any]]:
    lines = read(recipe.parent / "run" / "metrics.jsonl")
    return [{k: v for k, v in line.items() if "seconds" not in k and not k.startswith("pictures/")} for line in lines]


def versions(service: Service) -> Versions:
    with service.client() as client:
        return client.versions()


def steps(lines: list[dict[str, Any]]) -> int:
    return sum(line["kind"] == "step" for line in lines)


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Versions]:
    """The numbers of a run that nobody disturbed, and what the service kept of it."""
    folder = tmp_path_factory.mktemp("whole")
    with served(folder / "service", rewards()) as service:
        made = refitted(service, folder)
        assert train(root, made) == 0, (folder / "log").read_text()
        return numbers(made), versions(service)


def test_the_undisturbed_run_refits_after_each_step(whole: tuple[list[dict[str, Any]], Versions]) -> None:
    lines, kept = whole
    seen = [line for line in lines if line["kind"] == "step"]
    assert [line["adversary/linear/refits"] + line["adversary/linear/kept_out"] for line in seen] == [1, 2, 3, 4, 5]
    assert seen[-1]["adversary/linear/version"] == kept.version >= 3
    assert all(0 <= line["adversary/linear/accuracy"] <= 1 and line["adversary/linear/loss"] > 0 for line in seen)
    looks = [line for line in lines if line["kind"] == "eval"]
    assert len(looks) == 4 and all("adversary/linear/reference_mean" in line for line in looks)
    assert looks[0]["adversary/linear/version"] == 1 and looks[-1]["adversary/linear/version"] == kept.version


def test_the_trainer_killed_in_mid_run(root: Path, whole: tuple[list[dict[str, Any]], Versions], tmp_path: Path) -> None:
    with served(tmp_path / "service", rewards()) as service:
        made = refitted(service, tmp_path)
        assert train(root, made, lambda lines: steps(lines) >= 3) == -signal.SIGKILL  # after the checkpoint of step 2
        assert versions(service).version != 1
        assert train(root, made) == 0, (tmp_path / "log").read_text()
        assert numbers(made) == whole[0]
        assert same(versions(service), whole[1])


def test_the_service_killed_in_mid_run(root: Path, whole: tuple[list[dict[str, Any]], Versions], tmp_path: Path) -> None:
    with served(tmp_path / "service", rewards()) as service:
        made, killed = refitted(service, tmp_path), list[int]()

        def fell(lines: list[dict[str, Any]]) -> bool:
            """The service falls and comes back under the running trainer."""
            if steps(lines) >= 3 and not killed:
                killed.append(steps(lines))
                service.kill()
                service.start()
            return False

        assert train(root, made, fell) == 0, (tmp_path / "log").read_text()
        assert killed and numbers(made) == whole[0]
        assert same(versions(service), whole[1])


def same(a: Versions, b: Versions) -> bool:
    """The newest: weights, replay buffer, steps of the optimiser."""
    one, other = (
        [(v.version, v.weights_sha256, v.replay, v.steps, v.accuracy) for v in told.kept if v.version == told.version]
        for told in (a, b)
    )
    return one == other != []
