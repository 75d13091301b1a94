"""verism-train killed at random moments, also in mid-save: however often, the final numbers are those of the undisturbed run.

`make kill-test` does it with more kills, and with processes that start from nothing.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.forks import ENVIRONMENT, Forks
from tests.trainer.run.runs import numbers
from tests.trainer.run.service import recipe, serve

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
KILLS = int(os.environ.get("VERISM_KILLS", "10"))
FRESH = "VERISM_KILLS" in os.environ
Kill = Callable[[float], bool]  # seconds since the start -> whether now is the moment
Start = Callable[[list[str], Path, Kill], int]


def never(since: float) -> bool:
    return False


def watched(process: int, ended: Callable[[], int | None], kill: Kill) -> int:
    """The exit status; SIGKILL at the moment that `kill` chooses."""
    start, sent = time.monotonic(), False
    while (status := ended()) is None:
        if not sent and kill(time.monotonic() - start):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            sent = True
        time.sleep(0.001)
    return status


@contextmanager
def forks(root: Path) -> Iterator[Start]:
    """Starts in a fork of a process that has loaded the libraries."""
    with Forks(root) as server:
        yield lambda arguments, log, kill: watched(server.start(arguments, log), server.ended, kill)


@contextmanager
def processes(root: Path) -> Iterator[Start]:
    """Starts from nothing, as a user does."""

    def start(arguments: list[str], log: Path, kill: Kill) -> int:
        with log.open("a") as out:
            command = [sys.executable, "-m", "trainer", *arguments]
            process = subprocess.Popen(command, cwd=root, env=os.environ | ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT)
            return watched(process.pid, process.poll, kill)

    yield start


def moments(folder: Path, whole_s: float, seed: int) -> Iterator[tuple[str, Kill]]:
    """Every third in mid-save, or just behind one; the others anywhere from the start of the process to its end."""
    rng, saves = random.Random(seed), folder / "checkpoints"

    def at(after: float) -> Kill:
        return lambda since: since >= after

    def saving(count: int, pause: float) -> Kill:
        seen: list[float] = []

        def now(since: float) -> bool:
            if any(saves.glob(".step_*.building")) and (not seen or since - seen[-1] > 0.05):
                seen.append(since)
            return len(seen) >= count and since >= seen[-1] + pause

        return now

    for n in itertools.count():
        if n % 3 == 2:
            yield "in mid-save", saving(rng.randint(1, 2), rng.uniform(0, 0.01))
        else:
            yield "anywhere", at(rng.uniform(0.1, 0.6) * whole_s)


def test_killed_at_random_moments_it_ends_with_the_numbers_of_the_undisturbed_run(root: Path, tmp_path: Path) -> None:
    with serve() as service, (processes if FRESH else forks)(root) as start:
        smaller = {
            "sampling": {"steps": 3, "window": 1, "window_last": 2, "height": 28, "width": 28, "micro_batch": 4},
            "group": {"prompts": 1, "size": 4},
            "eval": {"every": 3, "samples": 4, "steps": 2, "grid": 4},
        }
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe(service.url, **smaller, steps=6, checkpoint_every=1)))

        def go(name: str, kill: Kill = never) -> int:
            return start(
                [str(tmp_path / "tiny.yaml"), "--resume", "--run-dir", str(tmp_path / name)], tmp_path / f"{name}.log", kill
            )

        began = time.monotonic()
        assert go("whole") == 0, (tmp_path / "whole.log").read_text()
        whole_s, died = time.monotonic() - began, list[tuple[str, int, bool]]()
        for how, kill in itertools.islice(moments(tmp_path / "killed", whole_s, seed=5), 3 * KILLS):
            if sum(status != 0 for _, status, _ in died) == KILLS:
                break
            status = go("killed", kill)
            assert status in (-signal.SIGKILL, 0), (tmp_path / "killed.log").read_text()
            half = any((tmp_path / "killed" / "checkpoints").glob(".step_*.building"))
            died.append((how, status, half))
            if status == 0:  # it was quicker than its killer: a new one
                (tmp_path / "killed").rename(tmp_path / f"finished_{len(died)}")
                assert numbers(tmp_path / f"finished_{len(died)}") == numbers(tmp_path / "whole")
        assert go("killed") == 0, (tmp_path / "killed.log").read_text()
    kills = [entry for entry in died if entry[1] != 0]
    print(
        f"{len(kills)} of {len(died)} runs were killed, {sum(half for *_, half in kills)} in mid-save; a whole one took {whole_s:.1f} s"
    )
    assert len(kills) == KILLS
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert not [p for p in (tmp_path / "killed").rglob("*") if p.name.endswith((".building", ".old"))]
    adapters = [load_file(tmp_path / name / "adapter/pytorch_lora_weights.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(value, adapters[1][key]) for key, value in adapters[0].items())
